"""One update: clipping as torch clips, bad steps that leave no trace, in every kind of optimizer."""

import copy

import pytest
import torch
from torch import nn

from trainer.config.optimizer import AdamW as AdamWConfig
from trainer.update import BufferGuard, Update, _check_and_scale, clip_adaptively, clip_each, clip_values


class Flat:
    """A schedule that changes nothing."""

    def factor(self, step: int) -> float:
        return 1.0

    def momentum(self, step: int) -> float | None:
        return None


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3))


def backward(net: nn.Module, poison: float | None = None) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    if poison is not None:
        x[0, 0] = poison
    net(x).square().sum().backward()


OPTIMIZERS = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
}


def test_the_private_kernel_scales_and_flags():
    grads, flag = [torch.tensor([2.0, 4.0]), torch.tensor([6.0])], torch.zeros(())
    _check_and_scale(grads, flag, torch.tensor(0.5))
    assert [g.tolist() for g in grads] == [[1.0, 2.0], [3.0]] and flag.item() == 0
    for poison in (float("nan"), float("inf"), -float("inf")):
        flag = torch.zeros(())
        _check_and_scale([torch.tensor([1.0]), torch.tensor([poison])], flag, torch.tensor(1.0))
        assert flag.item() == 1


@pytest.mark.parametrize("clip", [0.1, 1e6])
def test_clipping_is_torchs(clip):
    ours, theirs = network(), network()
    for net in (ours, theirs):
        backward(net)
    update = Update([torch.optim.SGD(ours.parameters(), lr=1.0)], Flat(), None, clip)
    norm, bad = update.finish_gradients(None)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
    torch.testing.assert_close(norm, expected)
    assert bad.item() == 0
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_sum_over_weights_becomes_a_mean(clip):
    ours, theirs = network(), network()
    for net in (ours, theirs):
        backward(net)
    for p in ours.parameters():
        assert p.grad is not None
        p.grad *= 7
    norm, _ = Update([torch.optim.SGD(ours.parameters(), lr=1.0)], Flat(), None, clip).finish_gradients(torch.tensor(7.0))
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip or float("inf"))
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_bad_step_leaves_no_trace(kind, clip, poison):
    """Weights, moments, step counts and running statistics are those before it, and the next step is as if it never was."""
    net, spared = network(), network()
    run = {}
    for name, module in (("hit", net), ("spared", spared)):
        guard = BufferGuard(module)
        update = Update([OPTIMIZERS[kind](module.parameters())], Flat(), None, clip)
        for step_poison in [None, poison, None] if name == "hit" else [None, None]:
            guard.save()
            backward(module, step_poison)
            _, bad = update.finish_gradients(None)
            assert bool(bad) == (step_poison is not None)
            update.step(bad)
            guard.restore(bad)
        run[name] = (module.state_dict(), update.optimizers[0].state_dict()["state"])
    for key, value in run["spared"][0].items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(run["hit"][0][key], value), key
    for index, moments in run["spared"][1].items():
        for key, value in moments.items():
            assert torch.equal(torch.as_tensor(run["hit"][1][index][key]), torch.as_tensor(value)), key


def test_buffers_in_one_block_still_save_load_and_train():
    net, plain = network(), network()
    BufferGuard(net)
    for module in (net, plain):
        backward(module)
    for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    fresh = network()
    fresh.load_state_dict(copy.deepcopy(net.state_dict()))
    net.load_state_dict(plain.state_dict())


def test_rates_and_momentum_follow_the_schedule():
    class Cycle(Flat):
        def factor(self, step: int) -> float:
            return 0.5**step

        def momentum(self, step: int) -> float:
            return 0.9 - 0.1 * step

    net = network()
    adam = torch.optim.AdamW([{"params": net[0].parameters(), "lr": 1.0}, {"params": net[3].parameters(), "lr": 0.1}])
    sgd = torch.optim.SGD(net[1].parameters(), lr=2.0, momentum=0.9)
    update = Update([adam, sgd], Cycle(), None, None)
    update.set_rates(2)
    assert [g["lr"] for g in update.groups] == pytest.approx([0.25, 0.025, 0.5])
    assert adam.param_groups[0]["betas"] == pytest.approx((0.7, 0.999)) and sgd.param_groups[0]["momentum"] == pytest.approx(0.7)


@pytest.mark.parametrize("threshold", [0.05, 1e6])
def test_each_parameters_own_norm_is_bounded(threshold):
    ours, theirs = network(), network()
    for net in (ours, theirs):
        backward(net)
    update = Update([torch.optim.SGD(ours.parameters(), lr=1.0)], Flat(), None, None, clip=clip_each(threshold))
    _, bad = update.finish_gradients(None)
    assert bad.item() == 0
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        nn.utils.clip_grad_norm_([b], threshold)
        torch.testing.assert_close(a.grad, b.grad)


def test_values_and_units_are_bounded_as_timm_bounds_them():
    from timm.utils.clip_grad import dispatch_clip_grad

    for mode, clip in (("value", clip_values(0.1)), ("agc", clip_adaptively(0.01))):
        ours, theirs = network(), network()
        for net in (ours, theirs):
            backward(net)
        before = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
        Update([torch.optim.SGD(ours.parameters(), lr=1.0)], Flat(), None, None, clip=clip).finish_gradients(None)
        dispatch_clip_grad(theirs.parameters(), 0.1 if mode == "value" else 0.01, mode=mode)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert any(not torch.equal(p.grad, g) for p, g in zip(ours.parameters(), before, strict=True) if p.grad is not None)


def test_adaptive_clipping_spares_the_classifier():
    net = network()
    backward(net)
    before = [p.grad.clone() for p in net[3].parameters() if p.grad is not None]
    clip_adaptively(1e-6, list(net[3].parameters()))(list(net.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(net[3].parameters(), before, strict=True) if p.grad is not None)
    assert float(net[0].weight.grad.norm()) < 1e-4  # type: ignore[union-attr]


def test_weight_decay_follows_half_a_cosine_where_there_is_some():
    net = network()
    adam = torch.optim.AdamW([{"params": net[0].parameters(), "weight_decay": 0.04}, {"params": net[3].parameters(), "weight_decay": 0.0}])
    cfg = AdamWConfig(lr=1.0, weight_decay=0.04, weight_decay_end=0.4)
    update = Update([adam], Flat(), None, None, decay=lambda step: cfg.decay_factor(step / 100))
    seen = []
    for step in (0, 50, 100):
        update.set_rates(step)
        seen.append([g["weight_decay"] for g in update.groups])
    assert [row[0] for row in seen] == pytest.approx([0.04, 0.22, 0.4]) and all(row[1] == 0 for row in seen)
