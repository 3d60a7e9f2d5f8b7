"""Staying with a sweep on SLURM until its last job has ended: a line for everything that changes, and the exit code in the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from trainer.sweep import cluster
from trainer.sweep.drive import summary
from trainer.sweep.manifest import Job, Manifest, State, states
from trainer.sweep.outcome import describe
from trainer.sweep.pool import requested
from trainer.sweep.slurm import submit
from trainer.sweep.source import Source

_ASKING = 1.0  # seconds between two looks at the run directories
_ASKING_SLURM = 15.0  # seconds between two questions to SLURM, which many ask


def watch(manifest: Manifest) -> int:
    """0 if every job is completed, else 1."""
    known: list[State | None] = [None] * len(manifest.jobs)
    asked, at_slurm = float("-inf"), {}
    while True:
        if time.monotonic() - asked > _ASKING_SLURM:
            manifest = Manifest.load(manifest.path)  # a canary may have held some of them
            asked, at_slurm = time.monotonic(), cluster.words([job.job_id for job in manifest.jobs])
        found = states(manifest, at_slurm)
        for job, before, now in zip(manifest.jobs, known, found, strict=True):
            if before is None or before.state != now.state:
                print(f"[{job.index}] {job} {describe(manifest.directory(job), now)}", flush=True)
        known = list(found)
        if all(_is_over(state, at_slurm.get(job.job_id or "")) for job, state in zip(manifest.jobs, found, strict=True)):
            print(summary(manifest))
            return int(any(s.state != "completed" for s in found))
        time.sleep(_ASKING)


def _is_over(state: State, word: str | None) -> bool:
    """Whether a job does not go on by itself; `word` is SLURM's for it."""
    return state.is_final or (word is not None and cluster.in_our_words(word) not in ("queued", "running"))


def follow(manifest: Manifest, jobs: Sequence[Job], source: Source) -> int:
    """Queue these jobs, and whatever `source` asks for as they end, until there is nothing more to ask for; 0."""
    known: dict[int, State] = {}
    closed = False
    if jobs:
        submit(manifest, jobs)
    asked, at_slurm = float("-inf"), {}
    while True:
        if time.monotonic() - asked > _ASKING_SLURM:
            asked, at_slurm = time.monotonic(), cluster.words([job.job_id for job in manifest.jobs if not _has_ended(known, job)])
        for job, now in zip(manifest.jobs, states(manifest, at_slurm), strict=True):
            if job.index not in known or known[job.index].state != now.state:
                print(f"[{job.index}] {job} {describe(manifest.directory(job), now)}", flush=True)
            known[job.index] = now
        wanted = requested(manifest.path)
        if wanted is not None:
            closed = closed or None in wanted
            cluster.cancel([job.job_id for job in manifest.jobs if job.index in wanted and job.job_id])
            asked = float("-inf")
        for job in source.unwanted(at_slurm):
            cluster.run("scancel", "--signal=USR1", str(job.job_id))
        more = [] if closed else list(source.more(at_slurm))
        if more:
            submit(manifest, [job for job in more if job.state != "completed"])
        elif all(_is_over(known[job.index], at_slurm.get(job.job_id or "")) for job in manifest.jobs):
            return 0
        time.sleep(0.0 if more else _ASKING)


def _has_ended(known: Mapping[int, State], job: Job) -> bool:
    return job.index in known and known[job.index].state in ("completed", "pruned", "cancelled", "held")
