"""Jobs side by side on this host, each in a process of its own with its own GPUs or cores; the next starts when one has ended.

The processes are forked by `trainer.sweep.server`. This side imports no torch, keeps the manifest, and passes signals on.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import site
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from trainer.errors import Interrupted, Stopped, TrainyardError
from trainer.sweep.manifest import Job, Manifest, State
from trainer.sweep.outcome import describe, explain_end, has_passed
from trainer.sweep.slots import Slot
from trainer.sweep.source import Source

CANCEL = "cancel.json"  # in a sweep's directory: indices of jobs that somebody wants stopped; null: and no new ones
_GRACE = 60.0  # seconds a job has to save and end once it was told to
_ASKING = 0.5  # seconds between two looks for requests and at the canary
_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Running:
    """A job in its slot."""

    job: Job
    slot: Slot
    pid: int = 0  # 0: the server has not answered yet
    since: float = 0.0
    told: bool = False  # to stop


class Pool:
    """Runs jobs of a manifest to their ends. `say` gets a line for everything that happens."""

    def __init__(
        self,
        manifest: Manifest,
        slots: Sequence[Slot],
        *,
        canary_steps: int = 0,
        code: Path = _ROOT,
        say: Callable[[str], None] = print,
        server: Sequence[str] = ("-m", "trainer.sweep.server"),
        source: Source | None = None,
    ) -> None:
        """`code`: the folder whose code jobs run; `server`: Python's arguments that start the process which forks them; `source`:
        where further jobs come from."""
        self.source = source
        self.manifest, self.slots, self.code, self.say, self.server = manifest, deque(slots), code, say, server
        self.canary_steps = canary_steps  # 0: no canary
        self.queue: deque[Job] = deque()
        self.running: dict[int, Running] = {}  # by index
        self.codes: dict[int, int] = {}  # of the jobs that have ended
        self.signals: list[int] = []
        self._stopped_at: float | None = None
        self._canary: Job | None = None
        self._rest = b""
        self._unsaved = False  # whether the manifest on disk lacks how a job has ended

    def run(self, jobs: Sequence[Job]) -> int:
        """The exit code: 0 if every job is completed, else that of the first that is not."""
        logs = self.manifest.path / "logs"
        logs.mkdir(exist_ok=True)
        self._line_up(jobs)
        self._feed()
        self.manifest.save()
        if self.queue:
            self._canary = self.queue[0] if self.canary_steps and len(self.queue) > 1 else None
            with self._server() as line, self._listening():
                self._loop(line)
        if self.signals:
            return Interrupted.exit_code if signal.SIGINT in self.signals else Stopped.exit_code
        return next((code for _, code in sorted(self.codes.items()) if code), 0)

    def _line_up(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self.manifest.directory(job).is_finished():
                self._note(job, "completed", None)
                self.say(f"{self._name(job)} is finished already")
            else:
                self.queue.append(job)

    def _feed(self) -> None:
        """Ask for further jobs where there is room for one."""
        while self.source and self.slots and not self.queue and not self.signals and (jobs := self.source.more()):
            self._line_up(jobs)

    def _loop(self, line: socket.socket) -> None:
        waiting = selectors.DefaultSelector()
        waiting.register(line, selectors.EVENT_READ)
        asked = 0.0
        while True:
            self._feed()
            self._fill(line)
            if self._unsaved:
                self._save()
            if not self.running and not (self.queue and not self.signals):
                return
            if waiting.select(timeout=_ASKING):
                self._hear(line)
            if time.monotonic() - asked >= _ASKING:
                asked = time.monotonic()
                self._look_around()

    # Starting

    def _fill(self, line: socket.socket) -> None:
        """A job for every free slot."""
        if self.slots and self.queue:
            self._cancel()  # nobody wants to see a job start that was cancelled a moment ago
        for _ in range(len(self.queue)):
            if self.signals or not self.slots or (self._canary and self.running):
                return
            job = self.queue.popleft()
            if self.manifest.directory(job).live_writer() is not None:  # left by a launcher that is gone, and saving
                self.queue.append(job)
                continue
            self._start(line, job)

    def _start(self, line: socket.socket, job: Job) -> None:
        slot = self.slots.popleft()
        job.attempts += 1
        self._note(job, "running", None)
        self._save()  # before it starts: a launcher killed in between has started nothing
        self.running[job.index] = Running(job, slot, since=time.monotonic())
        request = {
            "job": job.index, "directory": str(self.manifest.directory(job)), "log": str(self.log_of(job)),
            "environment": slot.environment, "cores": slot.cores,
        }  # fmt: skip
        line.sendall(json.dumps(request).encode() + b"\n")

    def log_of(self, job: Job) -> Path:
        """What the job prints."""
        return self.manifest.path / "logs" / f"{job.index:04d}.log"

    @contextmanager
    def _server(self) -> Iterator[socket.socket]:
        ours, theirs = socket.socketpair()
        paths = [str(self.code)] if str(self.code) not in site.getsitepackages() else []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))}
        process = subprocess.Popen(
            [sys.executable, "-P", *self.server, str(theirs.fileno())],
            pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
            cwd=self.manifest.cwd if os.path.isdir(self.manifest.cwd) else None,
        )  # fmt: skip
        theirs.close()
        try:
            yield ours
        finally:
            for running in self.running.values():
                self._kill(running)
            ours.close()
            process.wait()

    # Ending

    def _hear(self, line: socket.socket) -> None:
        received = line.recv(1 << 16)
        if not received:
            raise TrainyardError("the process that starts the jobs has ended before them; what it said is above")
        *lines, self._rest = (self._rest + received).split(b"\n")
        for message in map(json.loads, lines):
            if "pid" in message:
                running = self.running[message["job"]]
                running.pid = message["pid"]
                self.say(f"{self._name(running.job)} started: {self.manifest.directory(running.job)}")
                if self.signals:
                    self._send(running, self.signals[-1])
            elif "code" in message:
                self._ended(self.running.pop(message["job"]), message["code"])

    def _ended(self, running: Running, code: int) -> None:
        job, directory = running.job, self.manifest.directory(running.job)
        self._kill(running)  # what it may have left behind
        self.slots.append(running.slot)
        self.codes[job.index] = code if code >= 0 else 128 - code
        state, reason = explain_end(directory, code, self.log_of(job), cancelled=running.told and not self.signals)
        self._note(job, state, reason)
        self._unsaved = True  # with the start of the job that takes its slot, so that this one does not wait for two of them
        self.say(f"{self._name(job)} {describe(directory, State(state, reason))}, after {time.monotonic() - running.since:.0f} s")
        if state == "failed":
            self.say(f"    {self.log_of(job)} has the rest")
        if job is self._canary:
            self._canary = None
            if state != "completed":
                self._hold()

    def _hold(self) -> None:
        """The canary has failed: nothing else is tried."""
        while self.queue:
            job = self.queue.popleft()
            self._note(job, "held", "the first job did not get far enough (hydra.launcher.canary)")
            self.codes.setdefault(job.index, 1)
        self._save()
        self.say("the other jobs are held; python -m trainer resume starts them all the same")

    def _look_around(self) -> None:
        if self._canary and self._canary.index in self.running and has_passed(self.manifest.directory(self._canary), self.canary_steps):
            self.say(f"{self._name(self._canary)} has passed {self.canary_steps} steps; the others start")
            self._canary = None
        self._cancel()
        for job in self.source.unwanted() if self.source else ():
            if job.index in self.running:
                self._send(self.running[job.index], signal.SIGTERM)
        if self._stopped_at is not None and time.monotonic() - self._stopped_at > _GRACE:
            for running in self.running.values():
                self._kill(running)

    def _cancel(self) -> None:
        """Stop what `python -m trainer cancel` has asked for."""
        wanted = requested(self.manifest.path)
        if wanted is None:
            return
        if None in wanted:
            self.source = None
        for job in [job for job in self.queue if job.index in wanted]:
            self.queue.remove(job)
            self._note(job, "cancelled", "cancelled before it started")
            self.manifest.directory(job).status("cancelled", reason=job.reason)
        for index, running in self.running.items():
            if index in wanted:
                running.told = True
                self._send(running, signal.SIGTERM)
        self._save()

    # Signals

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Signals to the launcher go to every job, which ends at a step boundary with a checkpoint."""
        previous = {number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        self._stopped_at = self._stopped_at or time.monotonic()
        for running in self.running.values():
            self._send(running, number)

    def _send(self, running: Running, number: int) -> None:
        if running.pid:
            with suppress(ProcessLookupError):
                os.kill(running.pid, number)

    def _kill(self, running: Running) -> None:
        if running.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(running.pid, signal.SIGKILL)

    def _save(self) -> None:
        self.manifest.save(durable=False)
        self._unsaved = False

    def _note(self, job: Job, state: str, reason: str | None) -> None:
        job.state, job.reason = state, reason

    def _name(self, job: Job) -> str:
        return f"[{job.index}] {job}"


def requested(sweep: Path) -> set[int | None] | None:
    """What `python -m trainer cancel` has asked the launcher of a sweep for, once; None where it has not."""
    try:
        wanted = set(json.loads((sweep / CANCEL).read_text()))
        (sweep / CANCEL).unlink()
    except (OSError, ValueError):
        return None
    return wanted
