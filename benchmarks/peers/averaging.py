"""Averaging the weights of a ViT: ours, timm's, and the one call that any of them comes down to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

UPDATES = 15  # in one block
DECAY = 0.999


def ours(model: str) -> Callable[[], float]:
    from trainer.ema import Ema

    return _block(Ema(_model(model), DECAY).update)


def bare_lerp(model: str) -> Callable[[], float]:
    """The limit: one foreach call over lists that are made once."""
    net = _model(model)
    live = [t.detach() for t in net.parameters()]
    averaged = [t.clone() for t in live]
    return _block(lambda: torch._foreach_lerp_(averaged, live, 1 - DECAY))


def timm_v3(model: str) -> Callable[[], float]:
    from timm.utils import ModelEmaV3

    net = _model(model)
    ema = ModelEmaV3(net, decay=DECAY, foreach=True)
    return _block(lambda: ema.update(net))


def _model(name: str) -> nn.Module:
    import timm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return timm.create_model(name)


def _block(update: Callable[[], object]) -> Callable[[], float]:
    update()  # the first one may allocate

    def block() -> float:
        times = []
        for _ in range(UPDATES):
            started = time.perf_counter()
            update()
            times.append(time.perf_counter() - started)
        return statistics.median(times) * 1e6  # every update does the same, so whatever is longer was disturbed

    return block
