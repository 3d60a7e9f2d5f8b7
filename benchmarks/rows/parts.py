"""Part discovery against itself in the published form."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Worker, race
from benchmarks.table import Effort, Line, at_least, at_most, limit, row

PEER = "benchmarks.peers.parts:"


@row("parts_step", "a step of part discovery, 40 % foreground, against the published form: both stages on all of everything")
def parts_step(effort: Effort) -> Iterator[Line]:
    published, default, without = "as published", "by default", "no gradient of the second stage in the first, as published"
    forms = {published: "published", default: "default", without: "no gradient"}
    times = race([Worker(name, f"{PEER}step", {"form": form}) for name, form in forms.items()], effort.rounds(full=20, quick=6))
    for name in (default, without):
        yield at_most(times.scaled(1e3), name, published, 0.8, unit="ms")
    for name in (default, without):
        difference = f"difference of the losses, {name}"
        yield limit(race([Worker(difference, f"{PEER}difference", {"form": forms[name]})], 1), difference, 1e-5)


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
    often = {"in one of 20 epochs": 20, "in every epoch, the default": 1}
    cost = race([Worker(name, f"{PEER}pictures", {"epochs": epochs}) for name, epochs in often.items()], effort.rounds(full=10, quick=4))
    for name in often:
        yield limit(cost, name, 0.02, note="of the training")
