"""train.log: what a run says in words. Everything goes into the file; the terminal shows what a person should know.

Knows Python's logging only. Imports no torch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import TrainyardError

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
OURS = ("trainer", "tasks")


@contextmanager
def open_log(directory: Path, rank: int = 0) -> Iterator[None]:
    """While this is open, what is logged goes to train.log (train.rank1.log …), and the main rank's to the terminal too.

    Notes of ours show from INFO on, those of other packages from WARNING on. An error that passes through is written into
    the file, with its traceback unless it is one of ours, and left to the caller to show.
    """
    path = Path(directory) / ("train.log" if rank == 0 else f"train.rank{rank}.log")
    handlers: list[logging.Handler] = [LogFile(path, delay=True, encoding="utf-8")]
    handlers[0].setFormatter(logging.Formatter(FORMAT))
    if rank == 0:
        handlers.append(Terminal())
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in OURS}
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    _enable()
    for handler in handlers:
        root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    except BaseException as error:
        expected = isinstance(error, TrainyardError)
        said = error if expected else "ended by an error"
        trace = None if expected else (type(error), error, error.__traceback__)
        handlers[0].handle(logging.LogRecord("trainer", logging.ERROR, "", 0, "%s", (said,), trace))
        raise
    finally:
        logging.captureWarnings(False)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class LogFile(logging.FileHandler):
    """A line that finds the disk full is lost: what cannot do without the disk says so, once and in words."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # of what it could not write before
            super().close()


class Terminal(logging.Handler):
    """Shows notes and warnings on stderr, whatever that is at the moment: while a bar is drawn, rich stands before it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "trainer.progress":  # the display shows these in its own way
            return
        text = record.getMessage()
        if record.name == "py.warnings":  # "path:line: Category: text", then the line of code
            text = text.split("\n", 1)[0].split(": ", 1)[-1]
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
            if text in self.shown:
                return
            self.shown.add(text)
        try:
            print(text, file=sys.stderr, flush=True)
        except (OSError, ValueError):  # the terminal has gone
            self.handleError(record)


def _enable() -> None:
    """Hydra's logging set-up switches off the loggers that exist when it runs."""
    for name, log in logging.Logger.manager.loggerDict.items():
        if isinstance(log, logging.Logger) and name.split(".", 1)[0] in OURS:
            log.disabled = False
