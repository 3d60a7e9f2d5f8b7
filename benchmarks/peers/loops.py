"""Loops written by hand: the least a training step can be, and what one writes who wants the usual services as well."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.peers.workload import CLIP, EMA_WEIGHT, HORIZON, LOG_EVERY, PEAK_RATE, Stamped, workload


def bare(net: str) -> Callable[[], float]:
    """Forward, backward, optimizer; nothing else."""
    work = workload(net)
    model, batches = work.model, Stamped(work.batches, work.steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, fused=True)

    def block() -> float:
        model.train()
        for x, y in batches:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return batches.microseconds()

    return block


def services(net: str, device: str = "cpu") -> Callable[[], float]:
    """Clipping, averaged weights, loss and accuracy kept on the device, a cosine schedule, a log line every 50 steps."""
    work = workload(net, device)
    model, batches = work.model, Stamped(work.batches, work.steps)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, fused=True)
    live = [p.detach() for p in parameters]
    averaged = [p.clone() for p in live]
    loss_sum, hits_sum = torch.zeros((), device=device), torch.zeros((), device=device)
    lines: list[tuple[int, float, float]] = []
    step = 0

    def block() -> float:
        nonlocal step
        model.train()
        for x, y in batches:
            rate = PEAK_RATE * 0.5 * (1 + math.cos(math.pi * step / HORIZON))
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averaged, live, EMA_WEIGHT)
                loss_sum.add_(loss)
                hits_sum.add_((logits.argmax(1) == y).float().mean())
            step += 1
            if step % LOG_EVERY == 0:
                lines.append((step, loss_sum.item() / LOG_EVERY, hits_sum.item() / LOG_EVERY))
                loss_sum.zero_()
                hits_sum.zero_()
        return batches.microseconds()

    return block
