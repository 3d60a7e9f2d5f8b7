"""What it costs to start many runs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import ROOT, Command, Worker, race
from benchmarks.table import Effort, Line, at_least, at_most, limit, row

SANDBOX = ROOT / "tests" / "slurm" / "sandbox.sh"
OURS, BASIC, SUBMITIT = "our pool", "hydra/launcher=basic", "hydra/launcher=submitit_local"
FEW, MANY = "100 jobs", "1,000 jobs"


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a SLURM with no nodes to spare, for the time of a row; nothing but its folder where it cannot start."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"SLURM_SANDBOX": f"{folder}/slurm", "SLURM_PORT": "29817", "SLURM_ACCT": "none"}
        subprocess.run(["bash", str(SANDBOX), "up"], env=os.environ | environment, capture_output=True)
        try:
            yield {"SLURM_CONF": f"{folder}/slurm/slurm.conf", "FOLDER": folder}
        finally:
            subprocess.run(["bash", str(SANDBOX), "down"], env=os.environ | environment, capture_output=True)


@row("sweep_submit", "a sweep composed, checked, written and queued on SLURM, from the command line to the prompt, in seconds")
def sweep_submit(effort: Effort) -> Iterator[Line]:
    with slurm() as environment:

        def command(name: str, count: int) -> Command:
            line = ["-m", "hydra/launcher=slurm", "optimizer=adamw,sgd", f"seed=range(0,{count // 2})",
                    "hydra.launcher.additional_parameters={hold: true}"]  # fmt: skip
            # Another folder each time ($$): the same sweep twice at once is refused.
            typed = f"exec {shlex.join([sys.executable, str(ROOT / 'launch.py'), *line])} runs_dir=$FOLDER/runs-$$"
            return Command(name, ["bash", "-c", typed], cwd=Path(environment["FOLDER"]), environment=environment)

        few = race([command(FEW, 100)], effort.rounds(5, 2))
        yield limit(few, FEW, 3.0, unit="s")
        if not effort.quick:
            both = race([command(FEW, 100), command(MANY, 1000)], 1)
            yield limit(both, MANY, 30.0, unit="s")
            yield at_most(both, MANY, FEW, 12.0, unit="s", what="1,000 jobs over 100: linear")


@row("sweep_local", "jobs that do nothing, on this host")
def sweep_local(effort: Effort) -> Iterator[Line]:
    count = effort.rounds(100, 20)
    app = "benchmarks/peers/hydra_app/app.py"
    with tempfile.TemporaryDirectory() as folder:
        line = ["-m", f"+x=range(0,{count})", f"hydra.sweep.dir={folder}"]
        commands = [
            Command(OURS, [sys.executable, "-m", "benchmarks.peers.sweeping", "sweep", str(count)]),
            Command(BASIC, [sys.executable, app, *line]),
            Command(SUBMITIT, [sys.executable, app, *line, "hydra/launcher=submitit_local"]),
        ]
        times = race(commands, effort.rounds(3, 1))
    yield at_most(times, OURS, BASIC, 1.0, unit="s", what=f"{count} jobs")
    yield at_least(times, SUBMITIT, OURS, 5.0, unit="s", what=f"{count} jobs, theirs over ours")
    name = "from a job's end to the next one's start"
    yield limit(race([Worker(name, "benchmarks.peers.sweeping:latency", {"count": 30})], effort.rounds(5, 2)), name, 50.0, unit="ms")
