"""Ranks that die, raise and hang, and runs that are told to stop, as a user meets them: one exit code, a name, no orphans, no loss."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.command import ROOT, SHORT, SLOWLY, Command, all_end, family, rank_of
from tests.processes import SERVER, finish, free_port, logs, start_ranks
from tests.test_exact import assert_same_run
from tests.thresholds import FAILURE_SECONDS

LONGER = [*SHORT, "loop.epochs=6"]
RANKS = [*LONGER, "distributed=local", "distributed.processes=2"]
HANG_SECONDS = 10  # distributed.timeout where a rank hangs: more than the ranks of a busy machine take to meet


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks, undisturbed."""
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    assert finish(start_ranks(directory, LONGER, 2)) == [0, 0], logs(directory)
    return directory


def ranks_of(command: Command) -> dict[str, int]:
    """The process of each rank."""
    return {rank: pid for pid in family(command.pid) if (rank := rank_of(pid)) is not None}


def struck(command: Command, step: int, what: int, rank: str | None = None) -> float:
    """Send a signal to a rank, or to the command itself, once it has done a step. The seconds until the command has ended."""
    # One of its own: the run before it may have got further than it was waited for.
    command.wait_until(lambda: command.steps_done() >= step and "\nstep " in command.said)
    pids = family(command.pid)
    started = time.monotonic()
    os.kill(ranks_of(command)[rank] if rank else command.pid, what)
    command.code()
    assert all_end(pids), "a process was left over"
    return time.monotonic() - started


def test_a_run_on_two_ranks_survives_all_that_can_happen_to_it(tmp_path, unbroken):
    """One run directory: a rank is killed, a rank hangs, the run is told to stop, interrupted, and at last left alone."""
    runs = tmp_path / "runs"

    command = Command(runs, *RANKS, environment=SLOWLY)
    seconds = struck(command, 1, signal.SIGKILL, rank="1")
    assert command.code() == 6 and seconds < FAILURE_SECONDS, command.said
    assert "rank 1 of 2 was killed by SIGKILL (out of memory?)" in command.said
    assert "the same command goes on from the last checkpoint; distributed.max_restarts=1 does so by itself" in command.said
    assert command.directory.read_status()["state"] == "failed"

    command = Command(runs, *RANKS, f"distributed.timeout={HANG_SECONDS}", environment=SLOWLY)
    seconds = struck(command, 2, signal.SIGSTOP, rank="1")
    assert command.code() == 6 and seconds < HANG_SECONDS + FAILURE_SECONDS, command.said
    assert command.directory.read_status()["state"] == "failed"
    assert "rank 1 on " in command.said and f"has not answered for {HANG_SECONDS} s (distributed.timeout)" in command.said

    command = Command(runs, *RANKS, environment=SLOWLY)
    struck(command, 4, signal.SIGTERM)
    assert command.code() == 75, command.said
    assert "going on at step" in command.said  # after the kill and the hang
    assert "received SIGTERM: stopped at a step boundary with a checkpoint saved" in command.said
    assert command.directory.read_status()["state"] == "preempted"

    command = Command(runs, *RANKS, environment=SLOWLY)
    struck(command, 6, signal.SIGINT)
    assert command.code() == 130, command.said
    assert "the same command goes on from there" in command.said
    assert command.directory.read_status()["state"] == "interrupted"

    with torchrun(runs, tmp_path / "torchrun.log") as process:
        command.wait_until(lambda: command.steps_done() >= 10, process)
        assert process.pid
        pids = family(process.pid)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode not in (0, None)  # torchrun's own: it knows of no run that stops in order
        assert all_end(pids)
    assert command.directory.read_status()["state"] == "preempted", (tmp_path / "torchrun.log").read_text()

    directory = command.directory.path
    assert finish(start_ranks(directory, LONGER, 2)) == [0, 0], logs(directory)
    assert "going on at step" in logs(directory)
    assert_same_run(unbroken, directory)


def test_a_run_on_its_own_is_stopped_and_interrupted(tmp_path):
    runs = tmp_path / "runs"
    for step, what, code, state in ((2, signal.SIGTERM, 75, "preempted"), (4, signal.SIGINT, 130, "interrupted")):
        command = Command(runs, *SHORT, environment=SLOWLY)
        struck(command, step, what)
        assert command.code() == code and "stopped at a step boundary with a checkpoint saved" in command.said, command.said
        assert command.directory.read_status()["state"] == state
        assert "Traceback" not in command.said
    command = Command(runs, *SHORT)
    assert command.code() == 0 and "going on at step" in command.said, command.said


@contextmanager
def torchrun(runs: Path, log: Path) -> Iterator[ForkServerProcess]:
    """`torchrun --nproc-per-node=2 launch.py`, slowly."""
    process = SERVER.Process(target=_torchrun, args=(str(log), [f"runs_dir={runs}", *LONGER]))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _torchrun(log: str, arguments: list[str]) -> None:
    with open(log, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update({"OMP_NUM_THREADS": "1"} | SLOWLY)
    from torch.distributed.run import main

    main(["--nproc-per-node=2", f"--master-port={free_port()}", str(ROOT / "launch.py"), *arguments])
