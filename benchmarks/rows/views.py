"""What it brings to send views of one size through the network together."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Worker, race
from benchmarks.table import Effort, Line, at_least, row

GROUPED, APART = "views of one size together", "a forward for each view"


@row("dino_views", "forward and backward of DINO, 2 views of 224 and 8 of 96 pixels of each of two images")
def dino_views(effort: Effort) -> Iterator[Line]:
    for model in ("vit_tiny", "vit_s"):
        options = {"model": model}
        contenders = [
            Worker(GROUPED, "benchmarks.peers.views:grouped", options),
            Worker(APART, "benchmarks.peers.views:one_by_one", options),
        ]
        times = race(contenders, effort.rounds(full=15, quick=7))
        yield at_least(times, APART, GROUPED, 1.15, what=f"{model}: apart over together", unit="ms")
