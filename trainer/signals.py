"""Signals and clocks that end a run early. They only set a flag; the training loop acts on it where every rank's state is whole."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType

from trainer.errors import Interrupted, Stopped, TrainyardError
from trainer.surroundings import job_end

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# One Ctrl-C can arrive twice (timeout(1), a launcher that forwards what the terminal has sent already); a second one by hand takes longer.
_ECHO = 0.3  # seconds
_MARGIN = 30.0  # seconds kept free before SLURM's end, besides twice the time a save takes


class Reason(IntEnum):
    """Why a run stops early. Where ranks differ the greatest counts."""

    none = 0
    deadline = 1
    SIGUSR1 = 2
    SIGUSR2 = 3
    SIGTERM = 4
    SIGINT = 5


def stop_error(reason: int, directory: Path | str | None = None) -> TrainyardError:
    """The error that ends a run stopped for `reason`, its checkpoint being saved."""
    what = {Reason.deadline: "the time is up", Reason.SIGINT: "interrupted"}.get(Reason(reason), f"received {Reason(reason).name}")
    where = f" in {directory}" if directory is not None else ""
    kind = Interrupted if reason == Reason.SIGINT else Stopped
    return kind(f"{what}: stopped at a step boundary with a checkpoint saved{where}; the same command goes on from there")


class StopSignals:
    """While entered, SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set a flag, and the clock is watched.

    A second SIGINT leaves at once with 130. Handlers that were there before come back at the end; `hand_over` gives them
    the signal that was kept from them.
    """

    def __init__(self, *, max_hours: float | None = None, save_seconds: float = 0.0, clock: Callable[[], float] = time.time) -> None:
        """`save_seconds`: how long a checkpoint takes to write; may be set anew once it has been measured."""
        self.save_seconds = save_seconds
        self._clock = clock
        self._own_end = clock() + max_hours * 3600 if max_hours is not None else float("inf")
        self._slurm_end = job_end()
        self._reason = Reason.none
        self._interrupted_at = float("-inf")
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python installs no handlers
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: installed by C code

    def told(self) -> int:
        """A `Reason` to stop, 0 for none."""
        return self._reason or self._deadline()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._reason == Reason.SIGINT and now - self._interrupted_at > _ECHO:
                os._exit(Interrupted.exit_code)
            self._interrupted_at = now
        self._reason = max(self._reason, Reason[signal.Signals(number).name])

    def _deadline(self) -> int:
        # SLURM kills at its end, so everything has to be written by then; max_hours is the user's own wish.
        end = min(self._own_end - self.save_seconds, self._slurm_end - 2 * self.save_seconds - _MARGIN)
        if self._clock() >= end:
            self._reason = max(self._reason, Reason.deadline)
        return self._reason

    def hand_over(self, reason: int) -> None:
        """Give the handler that was installed before ours (submitit's, which requeues the job and exits) the signal we kept.

        To be called when the checkpoint is on the disk.
        """
        number = getattr(signal, Reason(reason).name, 0)  # 0: the deadline came without a signal
        previous = self._previous.get(number)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, None)
