"""`python -m trainer plan OVERRIDES`: a sweep without starting it. What its jobs are, how they differ, what they will cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.launcher import SlurmLauncherConfig
from trainer.errors import ConfigError, Problem
from trainer.launch.jobs import Plan, Planned, plan, ranks_of
from trainer.rundir import RunDirectory, run_directory
from trainer.surroundings import as_if, num_ranks
from trainer.sweep.estimate import Cost, History

_MOST_ROWS = 40  # of a table for people


@dataclass(frozen=True)
class Row:
    """One job of the table."""

    index: int
    job: Planned
    state: str  # "new", or what its run directory says
    ranks: int
    cost: Cost


def main(argv: Sequence[str]) -> int:
    """Print the plan of a command line. With `--json`, for programs; with `--budget=HOURS`, 2 where it would cost more."""
    budget = _option(argv, "--budget")
    overrides = [word for word in argv if not word.startswith("--") and word != "-m"]
    planned = plan(overrides)
    if planned is None:
        raise ConfigError(Problem("hydra/launcher", "", "only sweeps of our own launchers can be planned", "hydra/launcher=local"))
    rows = rows_of(planned)
    if "--json" in argv:
        print(json.dumps([_as_json(row) for row in rows], indent=1))
    else:
        print(table(planned, rows))
    total = hours_of(rows)
    if budget is not None and total is not None and total > budget:
        print(f"{total:.1f} GPU hours are more than the budget of {budget:g}", file=sys.stderr)
        return ConfigError.exit_code
    return 0


def _option(argv: Sequence[str], name: str) -> float | None:
    text = next((word.partition("=")[2] for word in argv if word.startswith(name + "=")), None)
    try:
        return None if text is None else float(text)
    except ValueError:
        raise ConfigError(Problem(name, text, "is a number of hours", f"{name}=100")) from None


def rows_of(planned: Plan) -> list[Row]:
    """Every job with its state and its cost."""
    history, rows = History(), []
    for index, job in enumerate(planned.jobs):
        state = RunDirectory(run_directory(job.run)).read_status().get("state", "new") if job.run.resume.name != "never" else "new"
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
    lines = [f"{len(rows)} jobs, hydra/launcher={planned.launcher}; common to all: {' '.join(planned.base) or 'nothing'}", ""]
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
    left = [row for row in rows if row.state != "completed"]
    unknown = [row for row in left if row.cost.hours is None]
    lines += ["", f"{len(left)} to run, {len(rows) - len(left)} finished already"]
    if (total := hours_of(rows)) is not None:
        disk = sum(row.cost.disk or 0 for row in left)
        lines.append(
            f"about {_number(total)} GPU hours and {_size(disk)} of disk, from {left[0].cost.source if not unknown else 'finished runs like them'}"
        )
    if unknown:
        lines.append(
            f"{len(unknown)} cannot be estimated: {unknown[0].cost.source} in {unknown[0].job.run.runs_dir}/{unknown[0].job.run.name}"
        )
    return "\n".join(lines)


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
