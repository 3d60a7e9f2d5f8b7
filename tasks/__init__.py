"""One folder per task. Importing the package makes every task's schema known, and imports no torch."""

from trainer.config.schemas import announce_schemas

announce_schemas(__name__, __path__[0], "*/config.py")
