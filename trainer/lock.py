"""One writer per directory, on one host or on many that mount the same disk. Imports no torch.

A lock is a file `.lock-<generation>`, made by linking a finished file to that name: atomic on NFS too, where `flock` may be
missing. The file with the highest generation is the lock; it is never deleted, only marked as released. To take the place
of a holder that is gone is to link the next generation, which exactly one of several racing processes can do:

    highest released or its holder gone  ->  link generation + 1  ->  still the highest?  ->  ours

A process that looked at a stale listing may link a generation below the highest; it sees that afterwards, and withdraws.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from trainer.errors import ConfigError, Problem, StorageError
from trainer.files import partial_path, storage_error, write_atomically

HEARTBEAT_SECONDS = 5.0
# A holder on another host that has not been heard of for this long is taken for dead. Far above what a swapping host or a
# network filesystem's attribute cache (60 s by default) can delay.
STALE_SECONDS = 180.0

log = logging.getLogger(__name__)


class Busy(ConfigError):
    """Another process that is alive writes here."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, precisely enough to tell a live process from another that got its number."""

    host: str
    pid: int
    started: int  # the process's start, in clock ticks since boot; 0 = not known
    machine: str  # boot id and process namespace: within one, pids can be compared
    job_id: str | None
    restarts: int  # how often the scheduler has started this job again
    since: float  # unix time
    token: str
    released: bool = False

    @classmethod
    def this_process(cls) -> Holder:
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_start_ticks(os.getpid()) or 0,
            machine=_machine(),
            job_id=job_id(),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            since=time.time(),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        job = f", job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}, since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.since))}"


class Lock:
    """`acquire()` makes this process the only writer of `directory`; `beat()` says every few seconds that it is alive."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path: Path | None = None
        self.holder: Holder | None = None

    def acquire(self) -> None:
        """Take the lock, or raise `Busy`. A lock whose holder is gone is broken, aloud."""
        while True:
            generation, path = _highest(self.directory)
            found = _read(path) if path else None
            if path and (found is None or not found.released):
                if gone := _why_gone(path, found):
                    log.warning("%s was held by %s, which is gone (%s): going on in its place", self.directory, found or "someone", gone)
                elif path.exists():
                    raise Busy(busy_problem(self.directory, found))
                else:
                    continue  # replaced between listing and reading: look again
            if self._link(generation + 1):
                break
        for old in self.directory.glob(".lock-*"):
            if _generation(old) <= generation:
                old.unlink(missing_ok=True)

    def _link(self, generation: int) -> bool:
        """Make the lock of this generation ours. False where another process was faster."""
        holder = Holder.this_process()
        target = self.directory / f".lock-{generation:06d}"
        if not _create_whole(target, json.dumps(asdict(holder)).encode()):
            return False
        highest, _ = _highest(self.directory)
        if highest != generation:  # our listing was out of date: the real lock is above
            target.unlink(missing_ok=True)
            return False
        self.path, self.holder = target, holder
        return True

    def beat(self) -> None:
        """Say that the holder is alive. StorageError where another process has taken over meanwhile."""
        assert self.path is not None, "beat() without acquire()"
        assert self.holder is not None
        found = _read(self.path)
        if found is None or found.token != self.holder.token or _highest(self.directory)[1] != self.path:
            raise StorageError(
                f"{self.directory} was taken over by another process while this one hung for more than {STALE_SECONDS:.0f} s: "
                "this one stops, so that two do not write the same files"
            )
        try:
            os.utime(self.path)  # by the file server's clock, which the reader compares with too
        except OSError as error:  # a disk that does not answer now may do so at the next beat
            log.debug("heartbeat of %s: %s", self.path, error)

    def release(self) -> None:
        """Leave the directory to others. The file stays: generations must only ever grow."""
        if self.path is None or self.holder is None or self.holder.pid != os.getpid():  # a forked worker holds nothing
            return
        found = _read(self.path)
        if found is not None and found.token == self.holder.token:
            try:
                write_atomically(self.path, json.dumps(asdict(self.holder) | {"released": True}), durable=False)
            except StorageError as error:  # a full disk, as a rule; whoever comes next sees that this process is gone
                log.debug("%s", error)
        self.path = self.holder = None


def live_holder(directory: Path) -> Holder | None:
    """Who writes in `directory` right now; None where nobody does."""
    _, path = _highest(directory)
    found = _read(path) if path else None
    if path is None or found is None or found.released or _why_gone(path, found):
        return None
    return found


def job_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """The scheduler's id of this job, as `scancel` takes it."""
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def busy_problem(directory: Path, holder: Holder | None) -> Problem:
    """Who writes in `directory` already, and what to do about it."""
    return Problem(
        "resume", "auto", f"{directory} is being written by {holder or 'a process that has just started'}",
        "wait for it or stop it; or resume=never for another run beside it, or version=<a name> for a run of its own",
    )  # fmt: skip


def _why_gone(path: Path, holder: Holder | None) -> str:
    """Why the holder cannot be alive any more; empty where it may be."""
    if holder is not None and holder.machine == _machine():
        if _start_ticks(holder.pid) == holder.started:
            return ""
        return "no such process any more"
    # SLURM never runs two incarnations of one job at once.
    if holder is not None and holder.job_id and holder.job_id == job_id() and holder.restarts < Holder.this_process().restarts:
        return "the job was started again"
    silent = _age(path)
    return f"silent for {silent:.0f} s" if silent > STALE_SECONDS else ""


def _age(path: Path) -> float:
    """Seconds since `path` was touched, by the clock of the file's own server: hosts' clocks differ."""
    probe = partial_path(path)
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
    except OSError:  # read-only: our own clock will have to do
        now = time.time()
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # replaced just now: somebody is alive


def _create_whole(target: Path, content: bytes) -> bool:
    """Create `target` with `content`, visible only when complete. False where it exists."""
    partial = partial_path(target)
    try:
        partial.write_bytes(content)
        try:
            os.link(partial, target)
            return True
        except FileExistsError:
            return partial.stat().st_nlink == 2  # NFS may repeat a request whose answer was lost: then the link is ours
        except OSError:  # no hard links on this filesystem; a reader that sees the file empty goes by its age
            try:
                with open(target, "xb") as file:
                    file.write(content)
                return True
            except FileExistsError:
                return False
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _highest(directory: Path) -> tuple[int, Path | None]:
    best = max(directory.glob(".lock-*"), key=_generation, default=None)
    return (_generation(best), best) if best else (0, None)


def _generation(path: Path) -> int:
    digits = path.name.removeprefix(".lock-")
    return int(digits) if digits.isdigit() else -1


def _read(path: Path) -> Holder | None:
    """The holder written in a lock file; None where it is gone or not complete yet."""
    try:
        content = json.loads(path.read_text())
        return Holder(**{f.name: content[f.name] for f in fields(Holder)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _start_ticks(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None where it does not run (any more)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in brackets may hold spaces and brackets itself; after it: state, ..., start time is the 20th (proc(5)).
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _machine() -> str:
    """Names the set of processes that this one can see: containers of one host do not see each other's."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class Heart(threading.Thread):
    """Calls `beat` every few seconds until stopped. What it raises is kept in `trouble`, for the main thread to raise."""

    def __init__(self, beat: Callable[[], None]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.beat = beat
        self.trouble: StorageError | None = None
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(HEARTBEAT_SECONDS):
            try:
                self.beat()
            except StorageError as error:
                if self.trouble is None:
                    log.error("%s", error)
                self.trouble = error
                return

    def stop(self) -> None:
        self._stop_asked.set()
        if self.is_alive():
            self.join(timeout=HEARTBEAT_SECONDS)
