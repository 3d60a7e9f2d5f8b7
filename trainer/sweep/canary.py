"""Beside the first job of a sweep on SLURM: `python -m trainer.sweep.canary SWEEP_DIR INDEX [end]` lets the others go once it
has come far enough. They are queued, and held, from the beginning; if the first job fails they are cancelled, and held in the
manifest with the reason. `end` is called when its ranks have ended: then there is nothing to wait for.
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
from trainer.sweep.slurm import release

_ASKING = 1.0  # seconds


def main(argv: list[str]) -> int:
    path, index, ended = argv[0], int(argv[1]), argv[2:] == ["end"]
    manifest = Manifest.load(path)
    directory = manifest.directory(manifest.jobs[index])
    while not has_passed(directory, manifest.settings["canary_steps"]):
        if ended:
            return 0 if directory.read_status().get("state") == "preempted" else _hold(path, index)
        time.sleep(_ASKING)
    return _release(path, index)


def _release(path: str, index: int) -> int:
    with _quietly(path) as manifest:
        release(manifest, [job for job in manifest.jobs if job.index != index and job.job_id])
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
