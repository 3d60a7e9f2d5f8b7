"""A real SLURM of two nodes, for the session. Skips where its packages are not installed; `sandbox.sh install` does that on Debian."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LARGEST_ARRAY = 6  # jobs: smaller than some of the sweeps
SANDBOX = Path(__file__).with_name("sandbox.sh")
NEEDED = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "sbatch")


class Slurm:
    """Commands to the sandbox."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=240).stdout

    def word(self, job_id: str) -> str:
        """SLURM's word for a job's state, from accounting."""
        line = self("sacct", "-X", "-n", "-P", "-o", "State", "-j", job_id).strip()
        return line.split()[0] if line else ""

    def comes(self, job_id: str, *words: str, seconds: float = 120) -> str:
        return self.until(lambda: self.word(job_id) in words and self.word(job_id), f"{job_id} {words}", seconds)

    def until(self, what: Callable[[], Any], told: str, seconds: float = 120) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(0.2)
        raise AssertionError(f"{told} did not come in {seconds} s:\n{self('squeue')}\n{self('sacct', '-X')}")

    def at_once(self, job_id: str, directory: Path) -> None:
        """A requeued job waits for two minutes; here only until nothing of its earlier life is left."""
        self.until(lambda: "PENDING" in self("squeue", "-h", "-r", "-o", "%T", "-j", job_id), f"{job_id} pending again")
        self.until(lambda: not self("pgrep", "-f", str(directory)), f"the end of {directory}")
        time.sleep(1.0)  # slurmd tells its controller
        self("scontrol", "update", f"jobid={job_id}", "StartTime=now")


def sandbox(verb: str, folder: Path, port: int, **more: str) -> subprocess.CompletedProcess[str]:
    settings = {"SLURM_KILLWAIT": "3", "SLURM_GRACE": "2", "SLURM_MAXARRAY": str(LARGEST_ARRAY + 1)}
    environment = os.environ | {"SLURM_SANDBOX": str(folder), "SLURM_PORT": str(port)} | settings | more
    return subprocess.run(["bash", str(SANDBOX), verb], env=environment, capture_output=True, text=True, timeout=300)


def free_ports() -> int:
    """The first of the sandbox's ports: several sandboxes may run at once."""
    for base in random.sample(range(20000, 30000, 500), 20):
        try:
            for port in (base, base + 2, base + 3, base + 11, base + 12):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
    raise RuntimeError("no free ports for a SLURM")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """One for all tests of this folder, which one worker runs (`tests/conftest.py`)."""
    with started(tmp_path_factory.mktemp("slurm") / "sandbox") as one:
        yield one


@contextmanager
def started(folder: Path, **more: str) -> Iterator[Slurm]:
    """A SLURM that commands of this process and of its children talk to."""
    missing = [name for name in NEEDED if shutil.which(name, path=f"/usr/sbin:/sbin:{os.environ['PATH']}") is None]
    if missing:
        pytest.skip(f"no SLURM to test with ({', '.join(missing)} missing): as root on Debian, bash tests/slurm/sandbox.sh install")
    port = free_ports()
    done = sandbox("up", folder, port, **more)
    if done.returncode:
        sandbox("down", folder, port)
        pytest.skip(f"the sandbox's SLURM does not start here: {done.stderr[-500:]}")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            yield Slurm(folder)
    finally:
        sandbox("down", folder, port)
