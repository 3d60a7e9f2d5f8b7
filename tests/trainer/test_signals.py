"""Signals and clocks set a flag, and nothing else; a second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tests.processes import SERVER
from trainer.errors import Interrupted, Stopped
from trainer.signals import Reason, StopSignals, stop_error

ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_is_noted_and_nothing_else_happens(number):
    before = [signal.getsignal(n) for n in ALL]
    with StopSignals() as signals:
        assert signals.told() == 0
        os.kill(os.getpid(), number)
        assert Reason(signals.told()).name == number.name
        assert signals.told() == signals.told()
    assert [signal.getsignal(n) for n in ALL] == before


def test_ctrl_c_counts_more_than_the_scheduler():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.told() == Reason.SIGINT


@pytest.mark.parametrize(
    ("reason", "kind", "code"),
    [(r, Interrupted if r is Reason.SIGINT else Stopped, 130 if r is Reason.SIGINT else 75) for r in Reason if r],
)
def test_the_error_that_ends_the_run(reason, kind, code):
    error = stop_error(reason, "runs/a/b")
    assert type(error) is kind and error.exit_code == code and "runs/a/b" in str(error)


@pytest.mark.parametrize(("pause", "code"), [(0.5, 130), (0.0, 0)], ids=["a second one", "an echo of the first"])
def test_a_second_ctrl_c_leaves_at_once(pause, code):
    process = SERVER.Process(target=interrupt_twice, args=(pause,))
    process.start()
    process.join(30)
    assert process.exitcode == code


def interrupt_twice(pause: float) -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    os._exit(0)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_max_hours_leaves_time_for_a_save():
    clock = Clock()
    signals = StopSignals(max_hours=2, clock=clock)
    signals.save_seconds = 60
    clock.now += 7200 - 61
    assert signals.told() == 0
    clock.now += 2
    assert signals.told() == Reason.deadline
    clock.now -= 1000  # a clock that is set back does not take it back
    assert signals.told() == Reason.deadline


def test_slurms_end_leaves_more_time_as_it_kills(monkeypatch):
    clock = Clock()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(clock.now) + 3600))
    signals = StopSignals(max_hours=100, save_seconds=60, clock=clock)
    clock.now += 3600 - 2 * 60 - 31
    assert signals.told() == 0
    clock.now += 2
    assert signals.told() == Reason.deadline


def test_the_signal_is_handed_over_to_who_was_there_before():
    """As submitit, which requeues the job in its handler."""
    got = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: got.append(number))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert got == []
            signals.hand_over(signals.told())
            assert got == [signal.SIGUSR2]
            signals.hand_over(Reason.SIGINT)  # Python's own handler would raise KeyboardInterrupt
            signals.hand_over(Reason.SIGTERM)
            signals.hand_over(Reason.deadline)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert got == [signal.SIGUSR2]


def test_without_the_main_thread_the_clock_still_counts():
    told = []

    def work() -> None:
        with StopSignals(max_hours=0.0) as signals:
            told.append(signals.told())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == [Reason.deadline]
