"""The engine's rows on a GPU, where a step that waits for the device shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.measure import Worker, race
from benchmarks.table import Effort, Line, at_most, limit, row

OURS, HAND, WAITS = "trainyard's engine", "hand-written loop, same services", "a step of ours"


@row("gpu", "the same on a GPU: a step of a ViT with 152 parameter tensors, and what waits in it")
def gpu(effort: Effort) -> Iterator[Line]:
    asked = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], capture_output=True, text=True)
    if asked.stdout.strip() != "True":
        yield Line(OURS, HAND, note="not measured: torch finds no GPU on this machine")
        return
    options = {"net": "vit", "device": "cuda"}
    times = race(
        [Worker(OURS, "benchmarks.peers.ours:engine", options), Worker(HAND, "benchmarks.peers.loops:services", options)],
        effort.rounds(20, 8),
    )
    yield at_most(times, OURS, HAND, 1.0)
    yield limit(
        race([Worker(WAITS, "benchmarks.peers.counting:ours_on_gpu")], rounds=1), WAITS, 0, note="counted by torch.cuda.set_sync_debug_mode"
    )
