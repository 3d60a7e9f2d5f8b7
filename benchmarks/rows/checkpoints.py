"""How long training stands still for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Worker, race
from benchmarks.table import Effort, Line, at_most, row

OURS, SAVE, COPY = "checkpoint.Writer.save", "torch.save", "copying the same bytes"


@row("checkpoint", "training stands still for a checkpoint of ViT-B + AdamW (1.04 GB)")
def checkpoint(effort: Effort) -> Iterator[Line]:
    contenders = [
        Worker(OURS, "benchmarks.peers.saving:ours"),
        Worker(SAVE, "benchmarks.peers.saving:torch_save"),
        Worker(COPY, "benchmarks.peers.saving:copy"),
    ]
    times = race(contenders, effort.rounds(full=9, quick=5))
    yield at_most(times, OURS, SAVE, 1 / 8, what="stall", unit="ms")
    yield at_most(times, OURS, COPY, 1.3, what="stall", unit="ms")
