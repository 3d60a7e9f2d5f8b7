"""A step that allocates and frees some hundred megabytes of activations, with the heap as it comes and as `trainer.backends` has it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from trainer.small_resnet import ResNet9

STEPS = 4  # in one block


def step(keep: bool) -> Callable[[], float]:
    from trainer.backends import keep_freed_memory

    if keep and not keep_freed_memory():
        raise RuntimeError("the C library does not take the advice")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = ResNet9(num_classes=10, in_channels=3, stem=24, widths=[48, 96, 192], blocks=[1, 0, 1]).to(memory_format=torch.channels_last)
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(128) % 10

    def once() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        net.zero_grad()

    once()

    def block() -> float:
        started = time.process_time()
        for _ in range(STEPS):
            once()
        return (time.process_time() - started) / STEPS * 1e6

    return block
