"""Disks that fail, files that are spoilt, two runs in one place: the right exit code, a way out, and nothing lost."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.command import KILLED, SHORT, SLOWLY, Command
from tests.test_exact import assert_same_run, last
from trainer.files import sha256_of


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others have to end like."""
    command = Command(tmp_path_factory.mktemp("unbroken") / "runs", *SHORT)
    assert command.code() == 0, command.said
    return command.directory.path


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `runs` of a run that was killed while it wrote its sixth checkpoint."""
    runs = tmp_path_factory.mktemp("killed") / "runs"
    assert Command(runs, *SHORT, environment=KILLED).code() == -9
    return runs


def finished_like(unbroken: Path, command: Command) -> None:
    assert command.code() == 0, command.said
    assert_same_run(unbroken, command.directory.path)


# Checkpoints that cannot be used


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def malicious(path: Path) -> None:
    """With a sum that fits: whoever can write the one can write the other."""
    torch.save({"step": 10_000, "task": Malicious(path.parent / "pwned")}, path)
    path.with_name(f"{path.name}.sha256").write_text(f"{sha256_of(path)}  {path.name}\n")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(path.parent / "pwned")))
    path.with_name(f"{path.name}.sha256").unlink()


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "its content has changed since it was written"),
    "altered": (altered, "its content has changed since it was written"),
    "emptied": (emptied, "the file is empty"),
    "folder": (folder, "Is a directory"),
    "malicious": (malicious, "could run code when loaded"),
    "pickled": (pickled, "could run code when loaded"),
}


@pytest.fixture
def runs(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "runs", symlinks=True))


def checkpoints(runs: Path) -> Path:
    (path,) = runs.glob("run/*/checkpoints")
    return path


@pytest.mark.parametrize("how", SPOILT)
def test_a_bad_checkpoint_is_refused_and_the_one_before_it_used(how, runs, unbroken):
    spoil, why = SPOILT[how]
    step = last(checkpoints(runs).parent)["step"]
    spoil(checkpoints(runs) / "last.pt")
    command = Command(runs, *SHORT)
    finished_like(unbroken, command)
    assert "last.pt cannot be used" in command.said and why in command.said
    assert f"last.pt is not used; going on from {checkpoints(runs)}/previous.pt (step {step - 1}) instead" in command.said
    assert not list(runs.rglob("pwned"))
    assert (checkpoints(runs) / "last.pt.damaged").exists()
    assert "Traceback" not in command.said


def test_a_kill_right_after_that_still_leaves_a_good_one(runs, unbroken):
    """The bad file must not become previous.pt, in the place of the only good one."""
    for path in checkpoints(runs).glob("*.pt"):
        if path.stem not in ("last", "previous"):
            path.unlink()
    truncated(checkpoints(runs) / "last.pt")
    assert Command(runs, *SHORT, environment={"TRAINYARD_CHECKPOINT_FAULT": "rename:kill:1"}).code() == -9
    finished_like(unbroken, Command(runs, *SHORT))


def test_without_one_good_checkpoint_the_ways_out_are_told_and_work(runs, unbroken):
    for path in checkpoints(runs).glob("*.pt"):
        truncated(path)
    before = {path: path.read_bytes() for path in checkpoints(runs).iterdir()}
    command = Command(runs, *SHORT)
    assert command.code() == 5
    assert "none of the checkpoints in" in command.said and "last.pt: its content has changed" in command.said
    assert "bring back one of them from a copy" in command.said and "resume=never" in command.said
    assert "Traceback" not in command.said
    assert command.directory.read_status()["state"] == "failed"
    assert {path: path.read_bytes() for path in checkpoints(runs).iterdir()} == before
    anew = Command(runs, *SHORT, "resume=never")
    assert anew.code() == 0, anew.said
    (beside,) = runs.glob("run/*-2")
    assert_same_run(unbroken, beside)


# Disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for a few checkpoints of 3 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a small disk, which takes root and CAP_SYS_ADMIN: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> Path:
    """A file that takes all that is left."""
    ballast = path / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


def test_a_place_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("a file")
    command = Command(tmp_path / "runs", *SHORT)
    assert command.code() == 5
    assert "a file stands where a directory should be: set runs_dir= to a directory" in command.said
    assert "Traceback" not in command.said


def test_a_disk_that_is_mounted_read_only(disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    command = Command(disk / "runs", *SHORT, logs=tmp_path)
    assert command.code() == 5
    assert "the disk is mounted read-only: set runs_dir= to a place you can write to" in command.said
    assert "Traceback" not in command.said


def test_a_run_directory_that_became_read_only(disk, tmp_path, unbroken):
    runs = disk / "runs"
    assert Command(runs, *SHORT, logs=tmp_path, environment=KILLED).code() == -9
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    command = Command(runs, *SHORT, logs=tmp_path)
    assert command.code() == 5
    assert "read-only" in command.said and "Traceback" not in command.said
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    finished_like(unbroken, Command(runs, *SHORT, logs=tmp_path))


def test_a_disk_that_is_full_from_the_start(disk, tmp_path):
    ballast = fill(disk)
    command = Command(disk / "runs", *SHORT, logs=tmp_path)
    assert command.code() == 5
    assert "the disk is full" in command.said and "free some space, or set runs_dir=" in command.said
    assert "Traceback" not in command.said
    ballast.unlink()


def test_a_disk_that_fills_up_while_training(disk, tmp_path, unbroken):
    runs = disk / "runs"
    command = Command(runs, *SHORT, logs=tmp_path, environment=SLOWLY)
    command.wait_for_step(4)
    ballast = fill(disk)
    assert command.code() == 5
    assert "the disk is full" in command.said and "free some space" in command.said
    assert "Traceback" not in command.said and "Logging error" not in command.said
    step = last(command.directory.path)["step"]
    assert 1 <= step < 9
    ballast.unlink()
    finished_like(unbroken, Command(runs, *SHORT, logs=tmp_path))


def test_a_log_that_cannot_be_written_costs_lines_of_it_only(runs, unbroken):
    log = checkpoints(runs).parent / "train.log"
    log.unlink()
    log.symlink_to("/dev/full")
    command = Command(runs, *SHORT)
    finished_like(unbroken, command)
    assert "Logging error" not in command.said and "Traceback" not in command.said


# Two at once


def test_of_two_runs_in_one_directory_one_trains(tmp_path, unbroken):
    runs = tmp_path / "runs"
    both = [Command(runs, *SHORT, environment=SLOWLY) for _ in range(2)]
    codes = [command.code() for command in both]
    assert set(codes) == {0, 2}, "\n".join(command.said for command in both)
    first, second = (both[codes.index(code)] for code in (0, 2))
    assert f"is being written by process {first.pid} on " in second.said
    assert "wait for it or stop it; or resume=never for another run beside it" in second.said
    assert "Traceback" not in second.said
    assert_same_run(unbroken, first.directory.path)


def test_ranks_are_not_started_where_another_run_is_at_work(tmp_path):
    runs = tmp_path / "runs"
    first = Command(runs, *SHORT, environment=SLOWLY)
    first.wait_for_step(1)
    started = time.monotonic()
    second = Command(runs, *SHORT, "distributed=local", "distributed.processes=2")
    assert second.code() == 2
    assert f"is being written by process {first.pid} on " in second.said and "2 ranks" not in second.said
    assert first.process.is_alive(), f"the answer took {time.monotonic() - started:.0f} s"
    assert first.code() == 0
