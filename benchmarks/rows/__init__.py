"""What is compared with what, and the target of each comparison. One module a subject; every module is found by itself."""

from importlib import import_module
from pkgutil import iter_modules


def load() -> None:
    """Import every module of this package, which registers its rows."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
