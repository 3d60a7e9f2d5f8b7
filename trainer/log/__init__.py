"""Everything a run says: the record on disk, the sinks fed from it, the terminal and the text log. Imports no torch."""

from trainer.log.display import Display, open_display
from trainer.log.journal import Journal, ending, open_journal
from trainer.log.table import show_facts, show_result
from trainer.log.text import open_log

__all__ = ["Display", "Journal", "ending", "open_display", "open_journal", "open_log", "show_facts", "show_result"]
