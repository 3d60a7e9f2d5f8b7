"""No step of the engine between two log lines makes the host wait for the device; and the counter would see it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import counting
from benchmarks.peers.counting import SyncCounter, between_logs

WAITS = {
    "item": lambda t: t.sum().item(),
    "float()": lambda t: float(t[0]),
    "if": lambda t: bool(t[0] > 0),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "numpy": lambda t: t.numpy(),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "equal": lambda t: torch.equal(t, t),
    "unique": lambda t: t.unique(),
    "print": str,
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=list(WAITS))
def test_the_counter_sees_what_waits(wait):
    tensor = torch.arange(4.0)
    with SyncCounter() as counter:
        wait(tensor)
    assert counter.total >= 1


def test_the_counter_does_not_see_what_does_not_wait():
    weights = torch.ones(3, requires_grad=True)
    with SyncCounter() as counter:
        loss = torch.where(weights > 0, weights, 0.0).mean()
        loss.backward()
        torch._foreach_lerp_([torch.zeros(3)], [weights.detach()], 0.1)
        torch.optim.AdamW([weights], fused=True).step()
    assert counter.counts == {}


def test_steps_that_log_may_wait():
    assert between_logs([0, 0, 0, 7, 7, 7, 14], log_every=3) == 0
    assert between_logs([0, 0, 1, 7, 7, 7, 14], log_every=3) == 1


@pytest.mark.parametrize(
    "overrides",
    [[], ["optimizer=sgd"], ["loop.max_grad_norm=null"], ["loop.drop_last=false"], ["precision=bf16"]],
    ids=lambda overrides: overrides[0] if overrides else "default",
)
def test_the_engine_waits_only_at_log_lines(overrides):
    assert counting.ours(overrides)() == 0


def test_accumulation_waits_no_more():
    assert counting.ours(accumulate=2)() == 0


def test_a_loop_that_asks_for_its_loss_waits_at_every_step():
    assert counting.item_every_step()() == 1
