"""Staying with a sweep on SLURM until its last job has ended: a line for everything that changes, and the exit code in the end."""

from __future__ import annotations

import time

from trainer.sweep import cluster
from trainer.sweep.drive import summary
from trainer.sweep.manifest import Manifest, State, states
from trainer.sweep.outcome import describe

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
