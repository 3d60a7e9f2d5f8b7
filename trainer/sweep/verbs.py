"""`python -m trainer resume | retry | cancel`: what can be done about a sweep, or a run, after it was started. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from trainer.errors import ConfigError, Problem
from trainer.files import write_atomically
from trainer.lock import live_holder
from trainer.rundir import RunDirectory
from trainer.sweep import cluster
from trainer.sweep.causes import Remedy, remedy, with_accumulate
from trainer.sweep.drive import drive, summary
from trainer.sweep.manifest import FILE, LEFT, Job, Manifest, State, driving, states
from trainer.sweep.pool import CANCEL


def resume(argv: Sequence[str]) -> int:
    """`resume DIR [JOB ...]`: start what is left of a sweep, or these jobs of it whatever they are; or go on with one run."""
    args = _options("resume", argv)
    if not _is_sweep(args.directory):
        return _resume_run(args.directory)
    manifest = Manifest.load(args.directory)
    if manifest.launcher == "slurm":
        from trainer.sweep.slurm import adopt, let_go

        with driving(manifest.path):
            adopt(manifest)
            let_go(manifest)
    found = states(manifest, _at_slurm(manifest))
    left = [job for job, state in zip(manifest.jobs, found, strict=True) if _is_left(manifest, job, state, args.jobs)]
    return _start(manifest, left, wait=True if args.wait else None)


def retry(argv: Sequence[str]) -> int:
    """`retry DIR [JOB ...]`: start again what failed, as its cause allows; the rest is held, with the reason."""
    args = _options("retry", argv)
    if not _is_sweep(args.directory):
        return _resume_run(args.directory)
    manifest = Manifest.load(args.directory)
    again: list[Job] = []
    with driving(manifest.path):
        if manifest.launcher == "slurm":
            from trainer.sweep.slurm import adopt

            adopt(manifest)
        words = _at_slurm(manifest) or {}
        for job, state in zip(manifest.jobs, states(manifest, words), strict=True):
            if state.state != "failed" or (args.jobs and job.index not in args.jobs):
                continue
            what = _remedy(manifest, job, state, words.get(job.job_id or ""))
            _apply(what, job, manifest.directory(job))
            print(f"[{job.index}] {job}: {what.cause.value}; {'held' if what.held else 'again ' + what.told}".rstrip())
            if not what.held:
                again.append(job)
        manifest.save()
    return _start(manifest, again, wait=True if args.wait else None)


def cancel(argv: Sequence[str]) -> int:
    """`cancel DIR [JOB ...]`: stop queued and running jobs of a sweep, or one run."""
    args = _options("cancel", argv)
    if not _is_sweep(args.directory):
        return _cancel_run(RunDirectory(args.directory))
    manifest = Manifest.load(args.directory)
    found = states(manifest, _at_slurm(manifest))
    wanted = [j for j, s in zip(manifest.jobs, found, strict=True) if not s.is_final and (not args.jobs or j.index in args.jobs)]
    if not wanted and not (manifest.trials_left and live_holder(manifest.path) is not None):
        print(f"nothing to cancel: {summary(manifest)}")
        return 0
    if live_holder(manifest.path) is not None and (manifest.search or manifest.launcher != "slurm"):
        # The launcher writes the manifest: it is asked. Where all is to stop, a search starts nothing new either.
        write_atomically(manifest.path / CANCEL, json.dumps([job.index for job in wanted] + [None] * (not args.jobs)))
        print(f"asked the launcher to stop {len(wanted)} jobs; those that run save a checkpoint first")
        return 0
    if manifest.launcher == "slurm":
        cluster.cancel([job.job_id for job in wanted if job.job_id])
    with driving(manifest.path):
        for job in wanted:
            job.state, job.reason = "cancelled", "cancelled"
            if manifest.directory(job).live_writer() is None:  # one that runs will say so itself
                manifest.directory(job).status("cancelled", reason="cancelled")
        manifest.save()
    print(summary(manifest))
    return 0


def arguments(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m trainer {verb}")
    parser.add_argument("directory", help="runs/<name>/sweeps/<id>, or a run's directory")
    parser.add_argument("jobs", nargs="*", type=int, help="jobs by number; none = all that are concerned")
    parser.add_argument("--wait", action="store_true", help="stay until they have ended")
    return parser


def _options(verb: str, argv: Sequence[str]) -> argparse.Namespace:
    args = arguments(verb).parse_intermixed_args(list(argv))
    if not Path(args.directory).exists():
        raise ConfigError(Problem(verb, args.directory, "no such directory", f"python -m trainer {verb} runs/<name>/sweeps/<id>"))
    if _is_sweep(args.directory):
        count = len(Manifest.load(args.directory).jobs)
        if wrong := [job for job in args.jobs if not 0 <= job < count]:
            raise ConfigError(Problem(verb, wrong[0], f"there is no such job: they are numbered 0 to {count - 1}"))
    return args


def _is_sweep(directory: str) -> bool:
    path = Path(directory)
    return path.name == FILE or (path / FILE).exists() or path.parent.name == "sweeps"


def _at_slurm(manifest: Manifest) -> dict[str, str] | None:
    return cluster.words([job.job_id for job in manifest.jobs]) if manifest.launcher == "slurm" else None


def _is_left(manifest: Manifest, job: Job, state: State, named: Sequence[int]) -> bool:
    # On this host nothing drives a job whose launcher is gone: it is saving, and the pool waits for it. SLURM's go on by themselves.
    running = state.state == "running" and manifest.launcher != "slurm"
    if named:
        return job.index in named and (running or state.state not in ("completed", "running"))
    held_by_canary = state.state == "held" and job.attempts == 0
    return running or state.state in LEFT or held_by_canary


def _start(manifest: Manifest, jobs: Sequence[Job], *, wait: bool | None) -> int:
    if manifest.launcher == "slurm":  # what SLURM still has will run without our help
        alive = cluster.ask([job.job_id for job in jobs])
        jobs = [job for job in jobs if alive.get(job.job_id or "") not in ("queued", "running")]
    if not jobs and not manifest.trials_left:
        print(f"nothing to start: {summary(manifest)}")
        return (
            0
            if all(s.state in ("completed", "pruned", "queued", "running", "preempted") for s in states(manifest, _at_slurm(manifest)))
            else 1
        )
    missing = [job for job in jobs if not manifest.directory(job).config_path.exists()]
    if missing:
        where = manifest.directory(missing[0]).config_path
        raise ConfigError(Problem("sweep", f"job {missing[0].index}", f"{where} is gone", " ".join(["python", *manifest.argv])))
    with driving(manifest.path):
        for job in jobs:
            job.state, job.reason, job.job_id = "queued", None, None
            if manifest.directory(job).live_writer() is None:
                manifest.directory(job).status("queued", reason=None, job_id=None)
        manifest.save()
    return drive(manifest, jobs, wait=wait)


def _remedy(manifest: Manifest, job: Job, state: State, word: str | None) -> Remedy:
    """What to do about a failed job. SLURM knows better than a rank that is left over what became of the others."""
    known = word in ("OUT_OF_MEMORY", "NODE_FAIL")
    settings = manifest.settings | job.resources
    return remedy(
        f"SLURM says {word}: {state.reason}" if known else state.reason, manifest.directory(job), ranks=_ranks(manifest, job),
        nodes=settings.get("nodes") or 1, timeout_min=settings.get("timeout_min"),
        failed_node=cluster.failed_node(job.job_id) if word == "NODE_FAIL" and job.job_id else None,
    )  # fmt: skip


def _apply(what: Remedy, job: Job, directory: RunDirectory) -> None:
    if what.held:
        job.state, job.reason = "held", what.held
        return
    if what.accumulate is not None:
        directory.write_config(with_accumulate(directory.read_config(), what.accumulate))
    if what.exclude is not None:
        job.resources["exclude"] = ",".join(filter(None, [job.resources.get("exclude"), what.exclude]))
    if what.timeout_min is not None:
        job.resources["timeout_min"] = what.timeout_min


def _ranks(manifest: Manifest, job: Job) -> int:
    settings = manifest.settings | job.resources
    if manifest.launcher != "slurm":
        return settings.get("gpus_per_job") or 1
    return (settings.get("nodes") or 1) * (settings.get("tasks_per_node") or settings.get("gpus_per_node") or 1)


def _resume_run(directory: str) -> int:
    from trainer.launch.dispatch import go_on  # a single run trains right here

    return go_on(RunDirectory(directory))


def _cancel_run(directory: RunDirectory) -> int:
    holder = directory.live_writer()
    job_id = directory.read_status().get("job_id")
    if holder is None and not job_id:
        raise ConfigError(Problem("cancel", directory.path, "no process writes there, so there is nothing to stop"))
    if job_id:
        cluster.cancel([job_id])
    elif holder is not None:
        if holder.host != os.uname().nodename:
            raise ConfigError(Problem("cancel", directory.path, f"is run by {holder}", f"ssh {holder.host} kill {holder.pid}"))
        with suppress(ProcessLookupError):
            os.kill(holder.pid, signal.SIGTERM)
    print(f"{directory}: told to stop with a checkpoint")
    return 0
