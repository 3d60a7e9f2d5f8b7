"""What a training step costs beyond its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Worker, race
from benchmarks.table import Effort, Line, at_most, limit, row

OURS, HAND, BARE = "trainyard's engine", "hand-written loop, same services", "bare loop, no services"
FRAMEWORKS = {
    "accelerate": "benchmarks.peers.frameworks:hf_accelerate",
    "Lightning": "benchmarks.peers.frameworks:pytorch_lightning",
    "Composer": "benchmarks.peers.frameworks:mosaicml_composer",
}


@row("engine_mlp", "one step of a small MLP, with clipping, EMA, metrics, schedule and a log every 50 steps")
def engine_mlp(effort: Effort) -> Iterator[Line]:
    yield from _engine("mlp", effort.rounds(full=40, quick=16))


@row("engine_vit", "one step of a ViT with 152 parameter tensors, with the same services")
def engine_vit(effort: Effort) -> Iterator[Line]:
    yield from _engine("vit", effort.rounds(full=20, quick=8))


def _engine(net: str, rounds: int) -> Iterator[Line]:
    """Two races. What is judged to a few per cent runs against one peer only, so that the two lie close in time."""
    options = {"net": net}
    ours, hand = Worker(OURS, "benchmarks.peers.ours:engine", options), Worker(HAND, "benchmarks.peers.loops:services", options)
    yield at_most(race([ours, hand], rounds), OURS, HAND, 1.0)
    others = [Worker(name, function, options) for name, function in FRAMEWORKS.items()]
    times = race([ours, *others, Worker(BARE, "benchmarks.peers.loops:bare", options)], max(3, rounds // 3))
    for name in FRAMEWORKS:
        yield at_most(times, OURS, name, 1.0)
    yield at_most(times, OURS, BARE, None, note="(shown, not judged)")


@row("syncs", "times that the host waits for the device in a step that logs nothing")
def syncs(effort: Effort) -> Iterator[Line]:
    counts = race(
        [
            Worker("a step of ours", "benchmarks.peers.counting:ours"),
            Worker("a loop with loss.item()", "benchmarks.peers.counting:item_every_step"),
        ],
        rounds=1,
    )
    yield limit(counts, "a step of ours", 0, note="counted on the CPU; on a GPU set_sync_debug_mode says the same, row gpu")
    yield limit(counts, "a loop with loss.item()", None, note="(the counter at work)")
