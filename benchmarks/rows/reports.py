"""How long reading a sweep of 500 jobs takes, from the command to its last line, and opening the page made of it."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Absent, Command, race
from benchmarks.peers.many_runs import make_sweep, settings
from benchmarks.table import Effort, Line, at_most, limit, row

STATUS, REPORT, DIFF, PAGE = "status, 501 jobs, CPU s", "report, 501 jobs in 167 arms, CPU s", "diff, CPU s", "report.html opens, s"
SCIPY = "python -c 'import scipy.stats'"


@row("reports", "a sweep of 500 jobs: its status, its table, its page")
def reports(effort: Effort) -> Iterator[Line]:
    with tempfile.TemporaryDirectory() as folder:
        home = make_sweep(Path(folder), settings(167), epochs=30)
        runs = sorted(home.parents[1].glob("s*-*"))
        contenders = [
            _verb(STATUS, "status", "--once", str(home)),
            _verb(REPORT, "report", str(home)),
            _verb(DIFF, "diff", str(runs[0]), str(runs[1])),
            Processor(SCIPY, [sys.executable, "-c", "import scipy.stats"]),
            Page(PAGE, home / "report.html"),
        ]
        times = race(contenders, effort.rounds(full=9, quick=3))
    yield limit(times, STATUS, 1.0)
    yield limit(times, REPORT, 1.0, note="its statistics are our own")
    yield at_most(times.scaled(1e3), REPORT, SCIPY, 1.0, unit="ms", what="report, CPU, against that import")
    yield limit(times, DIFF, 1.0)
    yield limit(times, PAGE, 2.0, note="headless Chromium, to the end of its scripts")


def _verb(name: str, *arguments: str) -> Processor:
    return Processor(name, [sys.executable, "-m", "trainer", *arguments])


class Processor(Command):
    """A command, by the processor time that it takes: on a quiet machine the time until it has answered, on a busy one still nearly so."""

    def measure(self) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        super().measure()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@dataclass
class Page:
    """A page, timed by its own clock from the beginning of the navigation to the end of its scripts, in seconds."""

    name: str
    path: Path

    def __enter__(self) -> Page:
        self.browser = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
        if self.browser is None:
            raise Absent("no Chromium here")
        self.profile = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *exception: object) -> None:
        self.profile.cleanup()

    def measure(self) -> float:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        command = [str(self.browser), *options, f"--user-data-dir={self.profile.name}", "--dump-dom", self.path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        found = re.search(r'data-ready="(\d+)"', done.stdout)
        if found is None:
            raise Absent("the page did not get ready")
        return int(found.group(1)) / 1000
