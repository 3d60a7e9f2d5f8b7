"""Averaging the weights of a ViT: ours, timm's, and the one call that any of them comes down to."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

UPDATES = 15  # in one block
DECAY = 0.999


def ours(model: str) -> Callable[[], float]:
    from trainer.ema import Ema

    return _block(model, lambda net: Ema(net, DECAY).update)


def bare_lerp(model: str) -> Callable[[], float]:
    """The limit: one foreach call over lists that are made once."""

    def prepare(net: nn.Module) -> Callable[[], object]:
        live = [t.detach() for t in net.parameters()]
        averaged = [t.clone() for t in live]
        return lambda: torch._foreach_lerp_(averaged, live, 1 - DECAY)

    return _block(model, prepare)


def timm_v3(model: str) -> Callable[[], float]:
    from timm.utils import ModelEmaV3

    def prepare(net: nn.Module) -> Callable[[], object]:
        ema = ModelEmaV3(net, decay=DECAY, foreach=True)
        return lambda: ema.update(net)

    return _block(model, prepare)


def _block(model: str, prepare: Callable[[nn.Module], Callable[[], object]]) -> Callable[[], float]:
    """Weights and averages are allocated anew for every block: which pages of memory they get decides how fast a process
    streams through them, by a third either way, so one that kept its pages would be measured by its luck."""
    import timm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = timm.create_model(model)

    def block() -> float:
        own = copy.deepcopy(net)
        update = prepare(own)
        update()  # the first one may allocate
        times = []
        for _ in range(UPDATES):
            started = time.perf_counter()
            update()
            times.append(time.perf_counter() - started)
        return statistics.median(times) * 1e6  # every update does the same, so whatever is longer was disturbed

    return block
