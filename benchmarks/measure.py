"""Times contenders side by side. Knows processes and clocks; not what is timed.

A contender is a function `module:function` in a process of its own that prepares once and then measures one block each
time it is asked. Blocks are interleaved (A B C A B C ...), so that whatever else the machine does falls on all alike, and
ratios are taken within a round before the median is.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Importing lightning sets this to 1, and every `optimizer.step()` then tries to open a library that is not there.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "0",
    "PYTHONWARNINGS": "ignore",
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
}


class Absent(Exception):
    """A contender cannot run here: its package is missing, or it broke. Never a reason to pass."""


class Contender(Protocol):
    name: str

    def __enter__(self) -> Contender: ...
    def __exit__(self, *exception: object) -> None: ...
    def measure(self) -> float: ...


@dataclass
class Worker:
    """A function of this package, `module:function`, kept ready in a process of its own.

    The function gets `options` and returns a function that measures one block and returns one number. An optional
    `environment` is laid over that of the process.
    """

    name: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    timeout: float = 300.0  # seconds for one block

    def __enter__(self) -> Worker:
        self._log = tempfile.TemporaryFile("w+")  # closed in __exit__
        command = [sys.executable, "-m", "benchmarks.worker", self.function, json.dumps(self.options)]
        environment = {**os.environ, **ONE_THREAD, **self.environment}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        try:
            self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()  # the worker leaves at the end of its input
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def measure(self) -> float:
        assert self._process.stdin
        self._process.stdin.write("measure\n")
        self._process.stdin.flush()
        return float(self._read()["value"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise Absent(_broke(self._process.returncode, 0, self._log.read()))
        answer = json.loads(line)
        if "absent" in answer:
            raise Absent(answer["absent"])
        return answer


@dataclass
class Command:
    """A command, timed from its start to its end, in seconds."""

    name: str
    arguments: Sequence[str]
    exit_code: int = 0
    cwd: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Command:
        self.measure()  # fills the page cache and writes the .pyc files
        return self

    def __exit__(self, *exception: object) -> None: ...

    def measure(self) -> float:
        environment = {**os.environ, **ONE_THREAD, **self.environment}
        started = time.perf_counter()
        done = subprocess.run(self.arguments, cwd=self.cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        if done.returncode != self.exit_code:
            raise Absent(_broke(done.returncode, self.exit_code, done.stdout + done.stderr))
        return seconds


def _broke(code: int, expected: int, output: str) -> str:
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip() and line[0] != " "), "it printed nothing")
    return f"ended with exit code {code} instead of {expected}: {last[:200]}"


@dataclass(frozen=True)
class Ratio:
    """Of two contenders measured in the same rounds."""

    median: float
    low: float
    high: float


class Race:
    """What every contender took in every round, and who could not start."""

    def __init__(self, times: dict[str, list[float]], absent: dict[str, str]) -> None:
        self.times = times
        self.absent = absent

    def scaled(self, factor: float) -> Race:
        """The same in another unit."""
        return Race({name: [t * factor for t in times] for name, times in self.times.items()}, self.absent)

    def inverted(self, factor: float) -> Race:
        """Rates instead of times."""
        return Race({name: [factor / t for t in times] for name, times in self.times.items()}, self.absent)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def ratio(self, name: str, against: str) -> Ratio:
        """Median over rounds of `name` / `against`, paired within the round."""
        ratios = [a / b for a, b in zip(self.times[name], self.times[against], strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def race(contenders: Sequence[Contender], rounds: int) -> Race:
    """Measure all contenders `rounds` times, interleaved; whoever went first in a round goes last in the next."""
    absent: dict[str, str] = {}
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        ready = _started(contenders, stack, times, absent)
        for i in range(rounds):
            shift = i % max(len(ready), 1)
            for contender in ready[shift:] + ready[:shift]:
                if contender.name not in absent:
                    try:
                        times[contender.name].append(contender.measure())
                    except Absent as reason:
                        absent[contender.name] = str(reason)
    return Race(times, absent)


def _started(contenders: Sequence[Contender], stack: ExitStack, times: dict[str, list[float]], absent: dict[str, str]) -> list[Contender]:
    """Those that can start, and have so far; `absent` learns of the others."""
    ready: list[Contender] = []
    for contender in contenders:
        if contender.name in absent:
            continue
        try:
            ready.append(stack.enter_context(contender))
            times.setdefault(contender.name, [])
        except Absent as reason:
            absent[contender.name] = str(reason)
    return ready
