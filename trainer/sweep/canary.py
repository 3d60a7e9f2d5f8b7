"""Beside the first job of a sweep on SLURM: `python -m trainer.sweep.canary SWEEP_DIR INDEX` lets the others go once it has come far enough.

They are queued, and held, from the beginning; if the first job fails they stay so, with the reason in the manifest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.lock import Busy
from trainer.sweep import cluster
from trainer.sweep.manifest import Manifest, driving
from trainer.sweep.outcome import has_passed

_ASKING = 1.0  # seconds


def main(argv: list[str]) -> int:
    index = int(argv[1])
    while True:
        manifest = Manifest.load(argv[0])
        directory = manifest.directory(manifest.jobs[index])
        if has_passed(directory, manifest.settings["canary_steps"]):
            return _release(argv[0], index)
        if directory.read_status().get("state") in ("failed", "cancelled"):
            return _hold(argv[0], index)
        time.sleep(_ASKING)


def _release(path: str, index: int) -> int:
    with _quietly(path) as manifest:
        others = [job for job in manifest.jobs if job.index != index and job.job_id]
        for job in others:
            job.reason = None
        manifest.save()
    for array in sorted({str(job.job_id).split("_")[0] for job in others}):
        cluster.run("scontrol", "release", array)
    return 0


def _hold(path: str, index: int) -> int:
    with _quietly(path) as manifest:
        others = [job for job in manifest.jobs if job.index != index and job.state == "queued"]
        for job in others:
            job.state, job.reason = "held", "the first job did not get far enough (hydra.launcher.canary)"
            job.attempts = 0  # not tried
        manifest.save()
    cluster.cancel([job.job_id for job in others if job.job_id])
    return 1


@contextmanager
def _quietly(path: str) -> Iterator[Manifest]:
    """The manifest, when its launcher has queued everything, or is gone."""
    while True:
        try:
            with driving(Path(path)):
                yield Manifest.load(path)
                return
        except Busy:
            time.sleep(_ASKING)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
