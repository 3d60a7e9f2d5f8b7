"""Keeps the pictures in plots/ up to date, by starting `trainer.log.draw` beside the run. Imports neither matplotlib nor torch."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import trainer

logger = logging.getLogger(__name__)

# Seconds from the beginning of one drawing to that of the next at least, the longest pause while no epoch ends, and the share of the
# time that may be spent on drawing: what takes 2 s is drawn at the end of every epoch of 40 s and more. On a CPU that is busy
# training more would be felt, low priority or not: threads that wait for one another wait for the one that shares its core.
FLOOR, PAUSE, SHARE = 5.0, 120.0, 0.05
SLOWEST = 120.0  # seconds: where its fonts are not indexed yet, matplotlib's first start takes tens


class Plotter:
    """A thread that draws at the end of every epoch, of very short ones at every few, and once more at the end. Training does not wait."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.record = directory / "metrics.jsonl"
        self.drawn = 0  # bytes of the record at the last drawing
        self.process: subprocess.Popen[str] | None = None
        self.ends = threading.Event()
        self.wake = threading.Event()  # an epoch is over, or the run
        self.thread = threading.Thread(target=self._work, name="log-plots", daemon=True)
        self.thread.start()

    def epoch(self) -> None:
        """An epoch is over: draw it, at once unless the last drawing was just now. Does not wait."""
        self.wake.set()

    def finish(self) -> None:
        """Draw the end. Does not wait."""
        self.ends.set()
        self.wake.set()

    def join(self, deadline: float) -> None:
        """Wait for the last drawing, until `deadline` (of time.monotonic)."""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            process, self.process = self.process, None
            if process is not None:
                process.kill()
            self._report("it takes too long")

    def _work(self) -> None:
        pause = FLOOR
        try:
            while not self.ends.wait(pause):
                self.wake.wait(PAUSE)
                if self.ends.is_set():
                    break
                self.wake.clear()
                cost = self._draw()
                pause = max(FLOOR - cost, cost * (1 / SHARE - 1))
            self._draw()
        except Exception as error:
            if self.process is not None:
                self._report(str(error))

    def _draw(self) -> float:
        """Draw in a process of its own, if the record has grown, and wait for it. Returns the seconds it took."""
        began = time.monotonic()
        size = self.record.stat().st_size if self.record.exists() else 0
        if size == self.drawn:
            return 0.0
        self.drawn = size
        # The package may be on sys.path for this process only (`python launch.py` from elsewhere).
        path = os.pathsep.join(filter(None, [str(Path(trainer.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainer.log.draw", str(self.directory)],
            env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            _, said = self.process.communicate(timeout=SLOWEST)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        if self.process.returncode > 0:  # less than 0: a signal, which was meant for the run
            raise RuntimeError((said.strip().splitlines() or ["no message"])[-1])
        return time.monotonic() - began

    def _report(self, why: str) -> None:
        logger.warning("the plots are not drawn (%s). Later: python -m trainer.log.draw %s", why, self.directory)
