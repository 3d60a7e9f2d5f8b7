"""Our pool with jobs that do nothing, so that only launching them is measured.

`python -m benchmarks.peers.sweeping sweep N` is a sweep of N such jobs, from composing to the last one's end;
`python -m benchmarks.peers.sweeping FD` is the process that forks them.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trainer.rundir import RunDirectory
from trainer.sweep import server

_RESULT = '{"metric": "val/top1", "mode": "max", "best": {"val/top1": 0.5}}'


def be(directory: RunDirectory) -> int:
    """A job: it notes when it began and when it ended."""
    began = time.time()
    directory.result_path.write_text(_RESULT)
    directory.status("completed")
    (directory.path / "times").write_text(f"{began} {time.time()}")
    return 0


def sweep(count: int, slots: int, runs: str) -> list[tuple[float, float]]:
    """When each job began and ended, in the order of their beginnings."""
    import tasks  # noqa: F401
    from trainer.launch.jobs import plan
    from trainer.launch.multirun import write_down
    from trainer.sweep.manifest import driving
    from trainer.sweep.pool import Pool
    from trainer.sweep.slots import Slot

    planned = plan([f"seed=range(0,{count})", f"runs_dir={runs}"])
    assert planned is not None
    manifest = write_down(planned, [])
    pool = Pool(manifest, [Slot()] * slots, say=lambda text: None, server=("-m", "benchmarks.peers.sweeping"), code=Path.cwd())
    with driving(manifest.path):
        code = pool.run(manifest.jobs)
    assert code == 0
    texts = [(manifest.directory(job).path / "times").read_text().split() for job in manifest.jobs]
    return sorted((float(began), float(ended)) for began, ended in texts)


def latency(count: int) -> Callable[[], float]:
    """Milliseconds from the end of one job to the beginning of the next, in one slot."""

    def measure() -> float:
        with tempfile.TemporaryDirectory() as runs:
            times = sweep(count, 1, runs)
            return 1e3 * statistics.median(after - before for (_, before), (after, _) in itertools.pairwise(times))

    return measure


if __name__ == "__main__":
    if sys.argv[1] == "sweep":
        with tempfile.TemporaryDirectory() as folder:
            sweep(int(sys.argv[2]), 2, folder)
    else:
        sys.exit(server.main(sys.argv[1:], (), be))
