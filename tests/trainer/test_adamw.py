"""trainer.adamw against torch.optim.AdamW(fused=True): the same bits, whatever happens between steps."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.adamw import AdamW

OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}


def pair() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (5,), (2, 3, 2), (1,), ())]
    return ours, copy.deepcopy(ours)


def groups(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [{"params": list(params[:3]), "weight_decay": 0.1}, {"params": list(params[3:]), "weight_decay": 0.0, "lr": 0.003}]


def gradients(params: Sequence[Tensor], step: int, missing: Sequence[int] = ()) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = None if i in missing else grad


def make() -> tuple[AdamW, torch.optim.AdamW, list[nn.Parameter], list[nn.Parameter]]:
    a, b = pair()
    return AdamW(groups(a), **OPTIONS), torch.optim.AdamW(groups(b), fused=True, **OPTIONS), a, b


def assert_equal(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Weights and the whole state, bit for bit."""
    for ga, gb in zip(a.param_groups, b.param_groups, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(ga["params"], gb["params"], strict=True))
    sa, sb = a.state_dict(), b.state_dict()
    assert sa["param_groups"] == sb["param_groups"]
    assert sa["state"].keys() == sb["state"].keys()
    for key in sa["state"]:
        for name in ("step", "exp_avg", "exp_avg_sq"):
            x, y = sa["state"][key][name], sb["state"][key][name]
            assert torch.equal(x, y), (key, name)
            assert (x.dtype, x.shape) == (y.dtype, y.shape)


def run(optimizers: Sequence[torch.optim.Optimizer], params: Sequence[Sequence[Tensor]], steps: range, **changes: Any) -> None:
    for step in steps:
        for optimizer, ps in zip(optimizers, params, strict=True):
            gradients(ps, step, **changes)
            for group in optimizer.param_groups:  # a schedule, and a momentum that cycles
                group["lr"] *= 0.9
                group["betas"] = (0.9 - 0.01 * step, group["betas"][1])
            optimizer.step()


def test_equals_torch() -> None:
    a, b, pa, pb = make()
    run((a, b), (pa, pb), range(5))
    assert_equal(a, b)
    assert len({id(a.state[p]["step"]) for p in pa}) == 2  # one count a group, or there would be no point in it


@pytest.mark.parametrize("missing", [(0,), (4,), (0, 1, 2), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("when", [0, 2])
def test_a_parameter_without_a_gradient_is_skipped_as_torch_skips_it(missing: tuple[int, ...], when: int) -> None:
    a, b, pa, pb = make()
    run((a, b), (pa, pb), range(when))
    run((a, b), (pa, pb), range(when, when + 1), missing=missing)
    assert_equal(a, b)
    run((a, b), (pa, pb), range(when + 1, when + 3))
    assert_equal(a, b)


def slow_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[how many steps of ours have been left to torch]"""
    count, torchs = [0], torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW, closure: Any = None) -> Any:
        count[0] += isinstance(self, AdamW)
        return torchs(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return count


def test_lists_are_made_again_once_parameters_have_begun_or_stopped_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a last layer does that rests for an epoch: torch's own step is taken at the changes alone."""
    slow = slow_steps(monkeypatch)
    a, b, pa, pb = make()
    rest: tuple[tuple[range, tuple[int, ...], int], ...] = (
        (range(4), (1, 4), 1),  # the first step makes the state
        (range(4, 8), (), 2),  # they begin, and have a count of their own
        (range(8, 14), (0,), 4),  # another rests: torch's step, one more, and on
        (range(14, 24), (), 8),
    )
    for steps, missing, expected in rest:
        run((a, b), (pa, pb), steps, missing=missing)
        assert_equal(a, b)
        assert slow[0] == expected
    assert [a.state[p]["step"].item() for p in pa] == [18, 20, 24, 24, 20]
    assert len({id(a.state[p]["step"]) for p in pa}) == 5, "one count for those of a group that share it"


def test_parameters_that_come_and_go_cost_few_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    gathered = AdamW._gathered
    monkeypatch.setattr(AdamW, "_gathered", lambda self: made.append(1) or gathered(self))
    a, b, pa, pb = make()
    for step in range(60):
        run((a, b), (pa, pb), range(step, step + 1), missing=(step % 5,))
    assert_equal(a, b)
    assert len(made) < 12


def test_a_bad_step_leaves_no_trace() -> None:
    a, b, pa, pb = make()
    for step, bad in enumerate((0.0, 1.0, 1.0, 0.0)):
        for optimizer, ps in ((a, pa), (b, pb)):
            gradients(ps, step)
            if bad and ps[0].grad is not None:
                ps[0].grad.fill_(float("nan"))
            optimizer.found_inf = torch.tensor(bad)  # type: ignore[attr-defined]
            optimizer.step()
    assert_equal(a, b)
    assert a.state[pa[0]]["step"] == 2
    assert all(torch.isfinite(p).all() for p in pa)


def test_gradients_are_unscaled_as_torch_unscales_them() -> None:
    a, b, pa, pb = make()
    for optimizer, ps in ((a, pa), (b, pb)):
        gradients(ps, 0)
        optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
        optimizer.step()
    assert_equal(a, b)


@pytest.mark.parametrize("ours_first", [True, False])
def test_either_goes_on_from_the_others_state(ours_first: bool) -> None:
    a, b, pa, pb = make()
    first, second = (a, b) if ours_first else (b, a)
    run((a, b), (pa, pb), range(3))
    file = io.BytesIO()  # through a file: tensors that share memory would come back sharing it
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    run((a, b), (pa, pb), range(3, 6))
    assert_equal(a, b)


def test_going_on_is_as_if_never_stopped() -> None:
    a, _, pa, _ = make()
    run((a,), (pa,), range(3))
    weights, state = copy.deepcopy((list(pa), a.state_dict()))
    run((a,), (pa,), range(3, 6))
    again = AdamW(groups(weights), **OPTIONS)
    again.load_state_dict(state)
    run((again,), (weights,), range(3, 6))
    assert_equal(a, again)
    assert len({id(again.state[p]["step"]) for p in weights}) == 2


def test_state_whose_counts_differ_is_gone_on_with_as_torch_does() -> None:
    a, b, pa, pb = make()
    run((b,), (pb,), range(1), missing=(1,))
    run((b,), (pb,), range(1, 2))
    with torch.no_grad():
        for p, q in zip(pa, pb, strict=True):
            p.copy_(q)
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    run((a, b), (pa, pb), range(2, 4))
    assert_equal(a, b)


def test_a_group_added_later() -> None:
    a, b, pa, pb = make()
    run((a, b), (pa, pb), range(2))
    for optimizer, ps in ((a, pa), (b, pb)):
        ps.append(nn.Parameter(torch.ones(3)))
        optimizer.add_param_group({"params": [ps[-1]], "lr": 0.1})
    run((a, b), (pa, pb), range(2, 4))
    assert_equal(a, b)


def test_parameters_of_several_types() -> None:
    a, b = ([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))] for _ in range(2))
    ours, theirs = (
        AdamW([{"params": a, "weight_decay": 0.1}], **OPTIONS),
        torch.optim.AdamW([{"params": b, "weight_decay": 0.1}], fused=True, **OPTIONS),
    )
    for step in range(3):
        for optimizer, ps in ((ours, a), (theirs, b)):
            for p in ps:
                p.grad = torch.full_like(p, 0.1 * (step + 1))
            optimizer.step()
    assert_equal(ours, theirs)


def test_a_closure() -> None:
    a, b, pa, pb = make()
    run((a, b), (pa, pb), range(2))
    losses = []
    for optimizer, ps in ((a, pa), (b, pb)):

        def closure(optimizer: torch.optim.Optimizer = optimizer, ps: Sequence[Tensor] = ps) -> Tensor:
            optimizer.zero_grad()
            loss = torch.stack([p.square().sum() for p in ps]).sum()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure))
    assert torch.equal(losses[0], losses[1])
    assert_equal(a, b)


def test_copies_are_independent() -> None:
    a, _, pa, _ = make()
    run((a,), (pa,), range(2))
    twin = copy.deepcopy(a)
    before = [p.detach().clone() for p in pa]
    params = [p for group in twin.param_groups for p in group["params"]]
    run((twin,), (params,), range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(pa, before, strict=True))
    run((a,), (pa,), range(2, 4))
    assert_equal(a, twin)
