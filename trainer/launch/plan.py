"""`python -m trainer plan OVERRIDES`: a sweep without starting it. What its jobs are, how they differ, what they will cost."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config import LoggerConfig, Progressing, Resume
from trainer.config.launcher import SlurmLauncherConfig
from trainer.errors import ConfigError, Problem
from trainer.launch.door import override_arguments
from trainer.launch.jobs import Plan, Planned, plan, ranks_of
from trainer.rundir import RunDirectory, run_directory
from trainer.surroundings import as_if, num_ranks
from trainer.sweep.drive import ROOT, python_path
from trainer.sweep.estimate import Cost, History, total_steps
from trainer.sweep.outcome import last_words

PROBE_STEPS = 20
_MOST_ROWS = 40  # of a table for people


@dataclass(frozen=True)
class Row:
    """One job of the table."""

    index: int
    job: Planned
    state: str  # "new", or what its run directory says
    ranks: int
    cost: Cost


def arguments() -> ArgumentParser:
    parser = override_arguments("plan", "A sweep without starting it: its jobs, GPU hours and disk.")
    parser.add_argument("-m", "--multirun", action="store_true", help="may be left out: a plan is of a sweep")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--budget", metavar="HOURS", help="end with 2 where the sweep would cost more GPU hours")
    parser.add_argument(
        "--probe", metavar="STEPS", help=f"try out jobs unlike any finished run, for so many steps (--probe alone: {PROBE_STEPS})"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the plan of a command line. With `--json`, for programs; with `--budget=HOURS`, 2 where it would cost more; with
    `--probe`, jobs unlike any finished run are tried out for a few steps."""
    options = arguments().parse_intermixed_args(
        ["--probe=" if word == "--probe" else word for word in argv]
    )  # a word behind it is no number
    budget, steps = _positive("--budget", options.budget, "hours"), _positive("--probe", options.probe or None, "optimizer steps")
    planned = plan(options.overrides, options.config_dir)
    if planned is None:
        raise ConfigError(Problem("hydra/launcher", "", "only sweeps of our own launchers can be planned", "hydra/launcher=local"))
    history = History()
    if options.probe is not None:
        probe(planned, history, round(steps or PROBE_STEPS))
    rows = rows_of(planned, history)
    if options.json:
        print(json.dumps([_as_json(row) for row in rows], indent=1))
    else:
        print(table(planned, rows))
    total = hours_of(rows)
    if budget is not None and total is not None and total > budget:
        print(f"{total:.1f} GPU hours are more than the budget of {budget:g}", file=sys.stderr)
        return ConfigError.exit_code
    return 0


def _positive(name: str, text: str | None, unit: str) -> float | None:
    try:
        if text is None or float(text) > 0:
            return None if text is None else float(text)
    except ValueError:
        pass
    raise ConfigError(Problem(name, text, f"is a number of {unit}, > 0", f"{name}=100"))


def probe(planned: Plan, history: History, steps: int) -> None:
    """Run one job of each kind that nothing is known of, for a few steps, in a folder that is thrown away."""
    for job in expected(planned):
        if job.run.loop.stages or total_steps(job.run) is None or history.cost(job.run, 1).hours is not None:
            continue  # stages have a speed each
        with tempfile.TemporaryDirectory() as folder:
            loop = dataclasses.replace(
                job.run.loop, steps=steps, epochs=None, validate_every=None, max_validation_batches=1, progress=Progressing.none
            )
            short = dataclasses.replace(job.run, runs_dir=folder, loop=loop, logger=LoggerConfig(plots=False), resume=Resume.auto)
            directory = RunDirectory(run_directory(short))
            directory.write_config(short)
            command, log = [sys.executable, "-P", "-m", "trainer", "start", str(directory)], Path(folder) / "log"
            with log.open("wb") as out:
                code = subprocess.run(command, env=os.environ | python_path(ROOT), stdout=out, stderr=out, check=False).returncode
            if code:
                raise ConfigError(Problem("--probe", str(job), f"the probe ended with exit code {code}: {last_words(log)}"))
            history.probed(job.run, directory.path)


def expected(planned: Plan) -> list[Planned]:
    """The jobs; of a search, which does not know them yet, as many as it may start, each with the settings that all share."""
    if not planned.search:
        return planned.jobs
    count = planned.search["n_trials"] * len(planned.search["repeats"])
    return [Planned([], {}, planned.run, {})] * count


def rows_of(planned: Plan, history: History) -> list[Row]:
    """Every job with its state and its cost."""
    rows = []
    for index, job in enumerate(expected(planned)):
        known = not planned.search and job.run.resume is not Resume.never
        state = RunDirectory(run_directory(job.run)).read_status().get("state", "new") if known else "new"
        with as_if(ranks_of(planned.settings, job.resources)):
            ranks = num_ranks(job.run.distributed)
        rows.append(Row(index, job, state, ranks, history.cost(job.run, ranks)))
    return rows


def hours_of(rows: Sequence[Row]) -> float | None:
    """GPU hours of the jobs that are left and can be estimated; None where none can."""
    known = [row.cost.gpu_hours for row in rows if row.state != "completed" and row.cost.gpu_hours is not None]
    return sum(known) if known else None


def table(planned: Plan, rows: Sequence[Row]) -> str:
    """For people."""
    common = f"hydra/launcher={planned.launcher}; common to all: {' '.join(planned.base) or 'nothing'}"
    if planned.search:
        return "\n".join(
            [f"a search of {planned.search['n_trials']} trials over {' '.join(planned.search['space'])}, {common}", "", *_sums(rows)]
        )
    lines = [f"{len(rows)} jobs, {common}", ""]
    width = max([len(str(row.job)) for row in rows[:_MOST_ROWS]] + [9])
    lines.append(f"{'job':>4}  {'overrides':{width}}  {'state':10}  {'ranks':>5}  {'hours':>8}  {'GPU hours':>9}  {'disk':>8}")
    for row in rows[:_MOST_ROWS]:
        cost = row.cost
        limit = (
            ""
            if cost.hours is None or not _is_too_long(planned, row)
            else f"  longer than its limit of {_limit(planned, row)} min: goes on in another turn"
        )
        lines.append(
            f"{row.index:>4}  {row.job!s:{width}}  {row.state:10}  {row.ranks:>5}  {_number(cost.hours):>8}  {_number(cost.gpu_hours):>9}  {_size(cost.disk):>8}{limit}"
        )  # fmt: skip
    if len(rows) > _MOST_ROWS:
        lines.append(f"      and {len(rows) - _MOST_ROWS} more")
    return "\n".join([*lines, "", *_sums(rows)])


def _sums(rows: Sequence[Row]) -> list[str]:
    """What all that is left takes."""
    left = [row for row in rows if row.state != "completed"]
    unknown = [row for row in left if row.cost.hours is None]
    lines = [f"{len(left)} to run, {len(rows) - len(left)} finished already"]
    if (total := hours_of(rows)) is not None:
        disk = sum(row.cost.disk or 0 for row in left)
        lines.append(
            f"about {_number(total)} GPU hours and {_size(disk)} of disk, from {left[0].cost.source if not unknown else 'finished runs like them'}"
        )
    if unknown:
        lines.append(
            f"{len(unknown)} cannot be estimated: {unknown[0].cost.source} in {unknown[0].job.run.runs_dir}/{unknown[0].job.run.name}; --probe tries them out"
        )
    return lines


def _is_too_long(planned: Plan, row: Row) -> bool:
    return row.cost.hours is not None and (limit := _limit(planned, row)) is not None and row.cost.hours * 60 > limit


def _limit(planned: Plan, row: Row) -> int | None:
    settings = planned.settings
    return row.job.resources.get("timeout_min", settings.timeout_min) if isinstance(settings, SlurmLauncherConfig) else None


def _as_json(row: Row) -> dict[str, object]:
    cost = row.cost
    return {
        "index": row.index, "overrides": row.job.overrides, "state": row.state, "directory": str(run_directory_of(row.job)), "ranks": row.ranks,
        "resources": row.job.resources, "images": cost.images, "hours": cost.hours, "gpu_hours": cost.gpu_hours, "disk": cost.disk, "source": cost.source,
    }  # fmt: skip


def run_directory_of(job: Planned) -> str | None:
    """None where the directory is only chosen when the run starts."""
    return None if job.run.resume.name == "never" else str(run_directory(job.run))


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.1f}"


def _size(value: int | None) -> str:
    if value is None:
        return "?"
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
