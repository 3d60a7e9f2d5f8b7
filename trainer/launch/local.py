"""Ranks on this host: one process each, started, signalled, watched and ended together.

Which rank is which and when all start anew is torch's elastic agent's affair (`trainer.launch.agent`); the processes are ours,
because the agent's own ones are killed 30 s after a signal, restarted when they stop as told, and outlive a killed agent.
Torch is not imported before there is something to start.
"""

from __future__ import annotations

import json
import os
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from trainer.errors import ConfigError, DataError, DistributedError, Diverged, Interrupted, Stopped, StorageError
from trainer.rundir import RunDirectory
from trainer.surroundings import LAUNCHER_PID

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# Ranks leave together (`open_world`), and a failure ends the others within 10 s, so what is left after this hangs.
PATIENCE = {"ended": 60.0, "failed": 18.0, "told twice": 3.0}  # seconds from the first rank's end to the last's
_STACKS = 2.0  # seconds a hanging rank has to print its stacks
_TAIL = 25  # lines shown of a failed rank's log

# Starting again does not help against these.
FINAL = {0, *(kind.exit_code for kind in (ConfigError, DataError, Diverged, StorageError, Stopped, Interrupted))}


def start_local_ranks(run_dir: Path | str, processes: int, max_restarts: int, *, command: Sequence[str] | None = None) -> int:
    """Run `python -m trainer start RUN_DIR` as `processes` ranks on this host; the exit code of the run.

    SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 go to every rank, which end the run at a step boundary. `max_restarts` times, all
    ranks are started again after one has died; never after the run was told to stop or has ended for good.
    """
    from trainer.launch.agent import run_agent

    command = command or [sys.executable, "-m", "trainer", "start", str(Path(run_dir).absolute())]
    with tempfile.TemporaryDirectory(prefix="trainyard-") as words:
        ranks = LocalRanks(command, RunDirectory(run_dir), Path(words))
        with ranks.forwarding():
            try:
                run_agent(ranks, processes, max_restarts)
            finally:
                ranks.stop()
        code = ranks.verdict()
        if code not in (0, Stopped.exit_code, Interrupted.exit_code):
            account = ranks.account()
            print(account, file=sys.stderr)
            if code == DistributedError.exit_code and ranks.directory.has_checkpoint():
                print("the same command goes on from the last checkpoint; distributed.max_restarts=1 does so by itself", file=sys.stderr)
            if ranks.directory.read_status().get("state") == "running":  # the rank that would have said so was killed
                ranks.directory.status("failed", reason=account.strip().splitlines()[0])
    return code


class LocalRanks:
    """The processes of one attempt, by local rank."""

    def __init__(self, command: Sequence[str], directory: RunDirectory, words: Path) -> None:
        """`words`: an empty folder for what failed ranks have to say."""
        self.command, self.directory, self._words = list(command), directory, words
        self.processes: list[subprocess.Popen[bytes]] = []
        self.codes: dict[int, int] = {}  # rank -> exit code (-n: ended by signal n), in the order they ended
        self.sent: list[int] = []  # signals forwarded
        self._stopped: set[int] = set()  # ranks that we have killed
        self._log_starts: dict[int, int] = {}  # bytes that were in a rank's log before
        self._waiting_since: float | None = None  # for the last ranks to end

    def start(self, environments: Sequence[Mapping[str, str]]) -> list[int]:
        """Start one process for each environment; their ids."""
        if self.sent:
            raise (Interrupted if signal.SIGINT in self.sent else Stopped)(
                f"received {signal.Signals(self.sent[0]).name} before the ranks had started"
            )
        self.processes, self.codes, self._stopped, self._waiting_since = [], {}, set(), None
        for rank, environment in enumerate(environments):
            log = self._open_log(rank)
            self.processes.append(
                subprocess.Popen(
                    self.command, env=os.environ | self._paths() | dict(environment) | self._own_variables(rank),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,  # a terminal's Ctrl-C reaches the ranks once, through us
                )
            )  # fmt: skip
            if log is not None:
                log.close()
        return [process.pid for process in self.processes]

    def _open_log(self, rank: int) -> IO[bytes] | None:
        """Rank 0 has the terminal; what the others print goes to their logs."""
        if rank == 0:
            return None
        log = self.directory.log_path(rank).open("ab")
        self._log_starts[rank] = log.tell()
        return log

    def _own_variables(self, rank: int) -> dict[str, str]:
        self._words_of(rank).unlink(missing_ok=True)
        return {LAUNCHER_PID: str(os.getpid()), "TORCHELASTIC_ERROR_FILE": str(self._words_of(rank))}

    def _words_of(self, rank: int) -> Path:
        return self._words / f"rank{rank}.json"

    def _paths(self) -> dict[str, str]:
        """`python -m trainer` must find this package where launch.py was started from another folder."""
        root = str(Path(__file__).resolve().parents[2])
        if root in site.getsitepackages():
            return {}
        return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Signals to this process go to every rank."""
        previous = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.sent.append(number)
        for process in self.processes:
            process.send_signal(number)  # does nothing where it has ended

    def ended(self) -> bool:
        """Whether all ranks have ended. Those that hang after another's end are ended here."""
        for rank, process in enumerate(self.processes):
            code = process.poll()
            if code is not None and rank not in self.codes:
                self.codes[rank] = code
        if len(self.codes) == len(self.processes):
            return True
        if self._waiting_since is None and (self.codes or self._told_twice()):
            self._waiting_since = time.monotonic()
        if self._waiting_since is not None and time.monotonic() - self._waiting_since > self._patience():
            self.stop()
            return True
        return False

    def _told_twice(self) -> bool:
        return self.sent.count(signal.SIGINT) > 1

    def _patience(self) -> float:
        never_began = any(code < 0 and -code in self.sent for code in self.codes.values())  # no handlers yet: nothing to save
        if never_began or self._told_twice():
            return PATIENCE["told twice"]
        return PATIENCE["ended" if all(code in FINAL for code in self.codes.values()) else "failed"]

    def stop(self) -> None:
        """End what still runs: stacks first (`open_world` has SIGQUIT print them), then SIGKILL."""
        running = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
        for rank in running:
            self._stopped.add(rank)
            self.processes[rank].send_signal(signal.SIGQUIT)
        deadline = time.monotonic() + _STACKS
        for rank in running:
            try:
                self.processes[rank].wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.processes[rank].kill()
        for rank in running:
            self.codes[rank] = self.processes[rank].wait()

    def is_final(self) -> bool:
        """Whether starting again would be wrong or of no use."""
        return bool(self.sent) or self.verdict() in FINAL

    def verdict(self) -> int:
        """The exit code of all: that of the cause, not of those who went down with it."""
        own = {rank: code for rank, code in self.codes.items() if rank not in self._stopped}
        told = {-number for number in self.sent}
        causes = [
            code for code in own.values() if code > 0 and code not in (DistributedError.exit_code, Stopped.exit_code, Interrupted.exit_code)
        ]
        if causes:
            return causes[0]
        if DistributedError.exit_code in own.values() or any(code < 0 and code not in told for code in own.values()):
            return DistributedError.exit_code
        if Interrupted.exit_code in own.values() or self._told_twice() or (told and -signal.SIGINT in own.values()):
            return Interrupted.exit_code
        if Stopped.exit_code in own.values() or any(code < 0 for code in own.values()):
            return Stopped.exit_code
        return DistributedError.exit_code if self._stopped else 0

    def account(self) -> str:
        """Which rank failed, how, and where it says why."""
        rank, words = self._culprit()
        fate = "did not end and was killed" if rank in self._stopped else _fate(self.codes[rank])
        text = f"\nrank {rank} of {len(self.processes)} {fate}{': ' if words else ''}{words}"
        told = words and self.codes[rank] in FINAL  # an error of ours says in words what a log's end could say
        tail = self._tail(rank) if rank and not told else ""
        return f"{text}\n{self.directory.log_path(rank)} ends:\n{tail}" if tail else text

    def _culprit(self) -> tuple[int, str]:
        """The rank that failed first, and its last words, if it had time for any."""
        spoken = {}  # seconds since 1970 -> rank, words
        for rank in self.codes:
            if self._words_of(rank).exists():
                said = json.loads(self._words_of(rank).read_text())["message"]
                spoken[float(said["extraInfo"]["timestamp"])] = (rank, said["message"])
        killed = [rank for rank, code in self.codes.items() if code < 0 and -code not in self.sent and rank not in self._stopped]
        if killed and self.verdict() == DistributedError.exit_code:
            return killed[0], ""
        if self._stopped and self.verdict() == DistributedError.exit_code:  # the others did not fail, they missed this one
            return min(self._stopped), ""
        if spoken:
            return spoken[min(spoken)]
        return next((rank for rank, code in self.codes.items() if code == self.verdict()), next(iter(self.codes))), ""

    def _tail(self, rank: int) -> str:
        with self.directory.log_path(rank).open("rb") as log:
            log.seek(max(self._log_starts.get(rank, 0), log.seek(0, os.SEEK_END) - 10_000))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-_TAIL:])


def _fate(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
