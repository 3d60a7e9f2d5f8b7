"""Part discovery against itself in the published form."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Worker, race
from benchmarks.table import Effort, Line, at_least, at_most, limit, row

PEER = "benchmarks.peers.parts:"


@row("parts_step", "a step of part discovery whose second stage sees neither turned images nor hidden tokens, 40 % foreground")
def parts_step(effort: Effort) -> Iterator[Line]:
    ours, published = "what is needed", "both stages on all of everything"
    times = race(
        [Worker(ours, f"{PEER}step", {"published": False}), Worker(published, f"{PEER}step", {"published": True})],
        effort.rounds(full=20, quick=6),
    )
    yield at_most(times.scaled(1e3), ours, published, 0.8, unit="ms")
    apart = race([Worker("difference of their losses", f"{PEER}difference")], 1)
    yield limit(apart, "difference of their losses", 1e-5)


@row("parts_pruning", "evaluation without the tokens that are hidden anyway, 40 % foreground")
def parts_pruning(effort: Effort) -> Iterator[Line]:
    for whole, what, target in ((False, "the second stage", 1.8), (True, "both stages", 1.2)):
        all_tokens, pruned = f"{what}, all tokens", f"{what}, pruned"
        times = race(
            [Worker(name, f"{PEER}evaluation", {"prune": prune, "whole": whole}) for name, prune in ((all_tokens, False), (pruned, True))],
            effort.rounds(full=20, quick=6),
        )
        yield at_least(times.scaled(1e3), all_tokens, pruned, target, unit="ms", note="(how many times as long)")


@row("parts_pictures", "what pictures of part maps cost of an epoch")
def parts_pictures(effort: Effort) -> Iterator[Line]:
    cost = race([Worker("waiting for a picture", f"{PEER}pictures")], effort.rounds(full=10, quick=4))
    yield limit(cost, "waiting for a picture", 0.02, note="of an epoch")
