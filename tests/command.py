"""`python launch.py ...` as a user types it, in a process of its own that is forked from one which has imported torch already."""

from __future__ import annotations

import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.processes import SERVER
from tests.test_exact import MODELS
from trainer.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[1]

# A run of nine steps and three epochs whose every step is a checkpoint, of a network that is quick to build.
SHORT = [*MODELS["vit"], "loop.batch_size=16", "loop.samples_per_epoch=48", "loop.epochs=3", "loop.log_every=1", "loop.checkpoint_every_steps=1",
         "loop.max_validation_batches=2", "logger.plots=false", "dataset.num_workers=0", "name=run"]  # fmt: skip
# Each checkpoint takes this long to write, and each waits for the one before: a short run that lasts, until it is started without.
SLOWLY = {"TRAINYARD_CHECKPOINT_FAULT": "sync:0.4"}
KILLED = {"TRAINYARD_CHECKPOINT_FAULT": "sync:kill:6"}  # while it writes its sixth checkpoint


class Command:
    """Started at once. What it prints goes to a file in `logs`, where it runs too; the folder of `runs_dir` if nothing else is said."""

    def __init__(self, runs_dir: Path, *arguments: str, environment: Mapping[str, str] | None = None, logs: Path | None = None) -> None:
        self.runs_dir = runs_dir
        self.log = (logs or runs_dir.parent) / f"command.{time.monotonic_ns()}.log"
        variables = {"OMP_NUM_THREADS": "1", **(environment or {})}
        self.process = SERVER.Process(target=_be, args=(str(runs_dir), str(self.log), arguments, variables))
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    def code(self, timeout: float = 120.0) -> int | None:
        """The exit code; whoever has not ended after `timeout` seconds is killed."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode

    @property
    def said(self) -> str:
        """Standard output and standard error."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def directory(self) -> RunDirectory:
        """The only run that there is."""
        (path,) = self.runs_dir.glob("run/*")
        return RunDirectory(path)

    def wait_until(self, condition: Callable[[], bool], process: BaseProcess | None = None, seconds: float = 90.0) -> None:
        """Wait for something that happens while this process, or another one, is at work."""
        end = time.monotonic() + seconds
        while not condition():
            assert (process or self.process).is_alive(), f"ended too early\n{self.said}"
            assert time.monotonic() < end, f"in vain for {seconds:g} s\n{self.said}"
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Until that step's line is in the record."""
        self.wait_until(lambda: self.steps_done() >= step)

    def steps_done(self) -> int:
        files = list(self.runs_dir.glob("run/*/metrics.jsonl"))
        return sum('"train/loss"' in line for line in files[0].read_text().splitlines()) if files else 0


def family(pid: int) -> list[int]:
    """The processes that `pid` has started, and theirs."""
    try:
        own = [int(child) for thread in Path(f"/proc/{pid}/task").iterdir() for child in (thread / "children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*own, *(grandchild for child in own for grandchild in family(child))]


def rank_of(pid: int) -> str | None:
    """The RANK that a process was started with."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), None)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids: list[int], seconds: float = 5.0) -> bool:
    """Whether none of these processes is left, after a moment."""
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _be(runs_dir: str, log: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    with open(log, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(environment)
    os.chdir(Path(log).parent)
    sys.argv = [str(ROOT / "launch.py"), f"runs_dir={runs_dir}", *arguments]
    code: object = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
