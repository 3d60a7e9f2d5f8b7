"""What the tasks that learn without labels, or from a teacher, save by how they are computed."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Worker, race
from benchmarks.table import Effort, Line, at_least, at_most, row

PEERS = "benchmarks.peers.pretraining"
OURS, DINO, ALL, GRADIENTS, HAND = (
    "task=mim",
    "task=dino",
    "every patch encoded",
    "gradients through the teacher",
    "written by hand, same services",
)


@row("mae", "a step of MAE with ViT-Ti/16 at 224 pixels, three quarters of each image hidden")
def mae(effort: Effort) -> Iterator[Line]:
    contenders = [Worker(name, f"{PEERS}:mae", {"how": how}) for name, how in ((OURS, "ours"), (ALL, "all"), (HAND, "hand"))]
    times = race(contenders, effort.rounds(full=9, quick=4)).scaled(1e-3)
    yield at_least(times, ALL, OURS, 1.8, what="every patch encoded, times ours", unit="ms")
    yield at_most(times, OURS, HAND, 1.02, unit="ms")


@row("dino", "a step of DINO with ViT-Ti/8, 2 views of 64 and 8 of 32 pixels of each of four images")
def dino(effort: Effort) -> Iterator[Line]:
    contenders = [Worker(name, f"{PEERS}:dino", {"how": how}) for name, how in ((DINO, "ours"), (HAND, "hand"))]
    yield at_most(race(contenders, effort.rounds(full=9, quick=4)).scaled(1e-3), DINO, HAND, 1.02, unit="ms")


@row("kd", "a step of distillation, ViT-Ti from ViT-S, at 64 pixels")
def kd(effort: Effort) -> Iterator[Line]:
    name, rounds = "task=kd", effort.rounds(full=9, quick=4)
    contenders = [Worker(who, f"{PEERS}:kd", {"how": how}) for who, how in ((name, "ours"), (GRADIENTS, "gradients"), (HAND, "hand"))]
    times = race(contenders, rounds).scaled(1e-3)
    yield at_least(times, GRADIENTS, name, 1.2, what=f"{GRADIENTS}, times ours", unit="ms")
    yield at_most(times, name, HAND, 1.02, unit="ms")
    grown = [Worker(who, f"{PEERS}:kd", {"how": how, "measure": "memory"}) for who, how in ((name, "ours"), (GRADIENTS, "gradients"))]
    yield at_most(race(grown, rounds=1), name, GRADIENTS, 0.8, what="memory beyond weights", unit="MB")
