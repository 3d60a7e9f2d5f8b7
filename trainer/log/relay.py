"""Hands rows to a sink on a thread of its own, so that training neither waits for a server nor dies of one.

It knows neither files nor servers; a sink is whatever has `write`, `images` and `close`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

logger = logging.getLogger(__name__)

LIMIT = 10_000  # messages waiting for a sink; some 10 MB of rows


class Sink(Protocol):
    """Where rows go besides the record. It may raise: it is then reported once and dropped."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def images(self, step: int, paths: Sequence[Path]) -> None: ...
    def best(self, row: Mapping[str, Any]) -> None: ...
    def failed(self, why: str) -> None: ...
    def close(self, state: str) -> None: ...


class Relay:
    """A queue and a thread in front of one sink, which is opened, fed and closed on that thread."""

    def __init__(
        self, name: str, open_sink: Callable[[], Sink], advice: str, *,
        patience: float, abandon: Callable[[], None] = lambda: None, lost: Callable[[], None] = lambda: None, limit: int = LIMIT,
    ) -> None:  # fmt: skip
        self.name, self.open_sink = name, open_sink
        self.advice = advice  # how to get at the data when the sink is gone
        self.patience = patience  # seconds that closing may take
        self.abandon = abandon  # called where it takes longer, so that the process can end all the same
        self.lost = lost  # called when the sink is dropped: what it has not taken has to be brought to it later
        self.limit = limit
        self.queue: SimpleQueue[Callable[[Sink], None] | None] = SimpleQueue()
        self.thread: threading.Thread | None = None
        self.sink: Sink | None = None
        self.opened = threading.Event()  # the sink is there, or never will be
        self.state = "completed"  # of the run, when it has ended
        self.dropped = False

    def send(self, message: Callable[[Sink], None]) -> None:
        """Queue one call of the sink. Never waits."""
        if self.dropped:
            return
        if self.queue.qsize() >= self.limit:
            self._drop(f"does not keep up: {self.limit} rows are waiting for it")
            return
        self.queue.put(message)
        if self.thread is None:
            self.start()

    def start(self) -> None:
        if self.thread is None:
            # A daemon: a sink that hangs must not keep the process from ending.
            self.thread = threading.Thread(target=self._work, name=f"log-{self.name}", daemon=True)
            self.thread.start()

    def finish(self, state: str) -> None:
        """Ask the sink to close once it has everything. Does not wait."""
        self.state = state
        self.queue.put(None)

    def join(self, deadline: float) -> None:
        """Wait for the sink to have closed, until `deadline` (of time.monotonic)."""
        if self.thread is None:
            return
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            self._drop(f"did not finish within {self.patience:g} s")
            self.abandon()

    def _work(self) -> None:
        try:
            self.sink = self.open_sink()
            self.opened.set()
            while (message := self.queue.get()) is not None:
                if not self.dropped:
                    message(self.sink)
            self.sink.close(self.state)
        except (Exception, SystemExit) as error:  # a library that wants to leave must not take its thread's end for ours
            logger.debug("%s failed", self.name, exc_info=True)
            self._drop(f"failed ({type(error).__name__}: {_first_line(error)})")
        finally:
            self.opened.set()

    def _drop(self, why: str) -> None:
        if self.dropped:
            return
        self.dropped = True
        logger.warning("%s %s. The run goes on without it; %s", self.name, why, self.advice)
        self.lost()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
