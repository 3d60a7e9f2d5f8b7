"""What it is worth that freed memory stays with the process."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Worker, race
from benchmarks.table import Effort, Line, at_most, row

KEPT, GIVEN_BACK = "freed memory kept", "the C library's own ways"


@row("heap", "a step of ResNet-9 with 128 images of 32 pixels on a CPU")
def heap(effort: Effort) -> Iterator[Line]:
    contenders = [Worker(name, "benchmarks.peers.heap:step", {"keep": name == KEPT}) for name in (KEPT, GIVEN_BACK)]
    yield at_most(race(contenders, effort.rounds(full=20, quick=8)), KEPT, GIVEN_BACK, 0.95)
