"""`python launch.py -m ...`: a sweep from its command line to its first job. Everything is checked before anything is written."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from trainer.config import Resume, RunConfig
from trainer.config.launcher import LauncherConfig, SlurmLauncherConfig
from trainer.errors import ConfigError, Problem
from trainer.launch.jobs import Plan, Planned
from trainer.rundir import RunDirectory, run_directory
from trainer.sweep.drive import CODE, drive
from trainer.sweep.manifest import Job, Manifest, new_directory, relative_directory


def start_sweep(plan: Plan, argv: Sequence[str]) -> int:
    """Write down a sweep and start it; the exit code.

    Raises:
        ConfigError: the cluster cannot run it, or some of its jobs are run already.
    """
    if isinstance(plan.settings, SlurmLauncherConfig):
        from trainer.sweep.slurm import check

        check(plan.settings, [job.resources for job in plan.jobs])
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    _refuse_what_runs(plan)
    _keep_to_the_budget(plan)
    manifest = write_down(plan, argv)
    print(f"sweep {manifest.path}", flush=True)
    return drive(manifest, [job for job in manifest.jobs if job.state != "completed"])


def _keep_to_the_budget(plan: Plan) -> None:
    """Ask before a sweep that will take more GPU hours than `hydra.launcher.budget`; where nobody can answer, refuse it."""
    budget = plan.settings.budget
    if budget is None:
        return
    from trainer.launch.plan import hours_of, rows_of
    from trainer.sweep.estimate import History

    rows = rows_of(plan, History())
    hours, unknown = hours_of(rows), sum(row.state != "completed" and row.cost.gpu_hours is None for row in rows)
    if unknown:
        told = f"{unknown} of {len(rows)} jobs cannot be estimated, as no run like them is finished: python -m trainer plan --probe=20 tries one"
        print(f"warning: hydra.launcher.budget={budget:g}: {told}", file=sys.stderr)
    if hours is None or hours <= budget:
        return
    told = f"about {hours:.1f} GPU hours, and the budget is {budget:g}"
    if sys.stdin.isatty() and input(f"{told}; start all the same? [y/N] ").strip().lower() in ("y", "yes"):
        return
    raise ConfigError(Problem("hydra.launcher.budget", budget, told, f"hydra.launcher.budget={math.ceil(hours)}"))


def write_down(plan: Plan, argv: Sequence[str]) -> Manifest:
    """Every job's config.yaml, then the manifest: a launcher killed before the last line has left nothing that would be run."""
    name = plan.run.name
    path = new_directory(Path(plan.run.runs_dir) / name / "sweeps")
    created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    manifest = Manifest(
        path, path.name, name, created, list(argv), plan.launcher, plan.base, settings=plain(plan.settings), search=plan.search,
        cwd=os.getcwd(),
    )  # fmt: skip
    if manifest.settings["code"] == "snapshot":
        from trainer.sweep.snapshot import take

        take(path / CODE)
    append(manifest, plan.jobs)
    return manifest


def append(manifest: Manifest, jobs: Sequence[Planned]) -> list[Job]:
    """Add jobs to a manifest, their config.yaml first."""
    added = []
    for planned in jobs:
        run = in_sweep(planned.run, manifest.sweep)
        directory = RunDirectory(run_directory(run))
        place = relative_directory(directory.path, manifest.root)
        job = Job(len(manifest.jobs), planned.overrides, planned.group, run.seed, place, resources=planned.resources)
        if directory.is_finished():
            job.state = "completed"
        else:
            directory.write_config(run, durable=False)
            directory.status("queued", reason=None, job_id=None, sweep=os.path.relpath(manifest.path.absolute(), directory.path.absolute()))
        manifest.jobs.append(job)
        added.append(job)
    manifest.save()
    return added


def in_sweep(run: RunConfig, sweep: str) -> RunConfig:
    """The jobs of a sweep stand together in W&B, unless told otherwise."""
    if run.logger.wandb.group is None:
        wandb = dataclasses.replace(run.logger.wandb, group=sweep)
        return dataclasses.replace(run, logger=dataclasses.replace(run.logger, wandb=wandb))
    return run


def plain(settings: LauncherConfig) -> dict[str, Any]:
    content = dataclasses.asdict(settings)
    del content["_target_"]
    return {key: value.name if isinstance(value, Enum) else value for key, value in content.items()}


def _refuse_what_runs(plan: Plan) -> None:
    """The same sweep twice at the same time: the second would wait for the first, job by job."""
    for index, planned in enumerate(plan.jobs):
        if planned.run.resume is Resume.never:
            continue
        directory = RunDirectory(run_directory(planned.run))
        holder = directory.live_writer()
        other = other_sweep(directory) if holder is None else None
        if holder is None and other is None:
            continue
        whose = f"is being written by {holder}" if holder else f"is queued by {other}"
        raise ConfigError(
            Problem(
                "sweep", f"job {index} ({planned})", f"{directory.path} {whose}",
                f"python -m trainer {'cancel' if other else 'status'} {other or directory.path}, or resume=never for runs of their own",
            )
        )  # fmt: skip


def other_sweep(directory: RunDirectory) -> Path | None:
    """The sweep that has queued this run and is alive; None where there is none."""
    from trainer.lock import live_holder
    from trainer.sweep import cluster

    status = directory.read_status()
    if status.get("state") not in ("queued", "preempted") or not status.get("sweep"):
        return None
    path = Path(os.path.normpath(directory.path / str(status["sweep"])))
    try:
        manifest = Manifest.load(path)
    except ConfigError:
        return None
    if live_holder(path) is not None:
        return path
    job = next((job for job in manifest.jobs if manifest.directory(job).path.resolve() == directory.path.resolve()), None)
    if job is None or job.job_id is None or manifest.launcher != "slurm":
        return None
    return path if cluster.ask([job.job_id]).get(job.job_id) in ("queued", "running") else None
