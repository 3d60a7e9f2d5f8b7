"""Averaged weights: their values, their names under wrappers, the swap, and going on after a stop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.ema import Ema, Swa, clean


class Net(nn.Module):
    """Weights that train, weights that do not, batch statistics, a counter, and a constant that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)  # the name DDP uses for its own
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.norm(self.module(x)))


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def trained(module: nn.Module, ema: Ema, steps: int, start: int = 0) -> list[dict[str, Tensor]]:
    """Steps of SGD on data that follow from the step, averaging after each; the weights after every step."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    history = []
    module.train()
    for step in range(start, start + steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
        ema.update()
        history.append(copy.deepcopy(module.state_dict()))
    return history


def test_is_the_recursion_on_everything_that_trains() -> None:
    net = make()
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    ema = Ema(net, decay=0.9)
    for weights in trained(net, ema, 5):
        for name in ema.names:
            expected[name] += 0.1 * (weights[name] - expected[name])
    assert {n.split(".")[0] for n in ema.names} == {"module", "norm"}
    assert "norm.running_mean" in ema.names
    assert "norm.num_batches_tracked" not in ema.names
    for name, average in ema.state_dict().items():
        torch.testing.assert_close(average, expected[name])


def test_is_timms_average() -> None:
    net: Any = timm.create_model("test_resnet", num_classes=3)
    ours, theirs = Ema(net, decay=0.99), ModelEmaV3(net, decay=0.99)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        net(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        ours.update()
        theirs.update(net)
    reference = dict(theirs.module.state_dict())
    for name, average in ours.state_dict().items():
        torch.testing.assert_close(average, reference[name])
    # timm averages counters too; ours are the module's own.
    assert {n for n in reference if n not in ours.names} == {n for n in reference if n.endswith("num_batches_tracked")}


def test_forgets_its_start_sooner_when_told_the_step() -> None:
    net = make()
    ema = Ema(net, decay=0.999)
    before = ema.state_dict()["module.weight"].clone()
    with torch.no_grad():
        net.module.weight.add_(1.0)
    ema.update(step=0)  # decay (1 + 0) / (10 + 0)
    torch.testing.assert_close(ema.state_dict()["module.weight"], before + 0.9)
    late = Ema(net, decay=0.999)
    with torch.no_grad():
        net.module.weight.add_(1.0)
    late.update(step=1_000_000)
    torch.testing.assert_close(late.state_dict()["module.weight"], net.module.weight.detach() - 0.999)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["ddp", "compile", "compiled part", "ddp of compiled", "compiled ddp"])
@pytest.mark.parametrize("wrap_first", [False, True])
@pytest.mark.usefixtures("one_rank")
def test_wrappers_change_neither_names_nor_values(wrapper: str, wrap_first: bool) -> None:
    plain = make()
    reference = Ema(plain, decay=0.9)
    trained(plain, reference, 3)

    net = make()
    ema = None if wrap_first else Ema(net, decay=0.9)
    wrapped: nn.Module = net
    if wrapper == "compiled part":
        net.module = torch.compile(net.module, backend="eager")  # pyright: ignore[reportAttributeAccessIssue]
    if wrapper in ("compile", "ddp of compiled"):
        wrapped = torch.compile(wrapped, backend="eager")  # pyright: ignore[reportAssignmentType]
    if "ddp" in wrapper:
        wrapped = DistributedDataParallel(wrapped)
    if wrapper == "compiled ddp":
        wrapped = torch.compile(wrapped, backend="eager")  # pyright: ignore[reportAssignmentType]
    ema = ema or Ema(wrapped, decay=0.9)
    trained(wrapped, ema, 3)

    assert ema.state_dict().keys() == reference.state_dict().keys()
    for name, average in ema.state_dict().items():
        assert torch.equal(average, reference.state_dict()[name]), name
    x = torch.randn(5, 4)
    net.eval()
    plain.eval()
    with reference.swapped(plain):
        expected = plain(x)
    with ema.swapped(wrapped):
        assert torch.equal(wrapped(x), expected)
    with ema.swapped(net):
        assert torch.equal(net(x), expected)


def test_swap_gives_the_averages_and_puts_the_weights_back() -> None:
    net = make()
    ema = Ema(net, decay=0.5)
    trained(net, ema, 3)
    own = {name: value.clone() for name, value in net.state_dict().items()}
    held = {name: value.data_ptr() for name, value in net.state_dict().items()}
    with ema.swapped(net):
        inside = {name: value.clone() for name, value in net.state_dict().items()}
        # Nothing was copied: the module looks at the averages themselves.
        assert net.module.weight.data_ptr() == ema.state_dict()["module.weight"].data_ptr()
    for name, value in net.state_dict().items():
        assert torch.equal(value, own[name])
        assert value.data_ptr() == held[name]
        assert torch.equal(inside[name], (own | ema.state_dict())[name])
    assert not torch.equal(inside["module.weight"], own["module.weight"])


def test_weights_come_back_after_an_error() -> None:
    net = make()
    ema = Ema(net, decay=0.5)
    trained(net, ema, 1)
    own = net.module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="mid-validation"), ema.swapped(net):
        raise RuntimeError("mid-validation")
    assert torch.equal(net.module.weight, own)


def test_training_goes_on_after_a_swap_as_if_there_had_been_none() -> None:
    with_swap, without = make(), make()
    a, b = Ema(with_swap, 0.9), Ema(without, 0.9)
    trained(with_swap, a, 2)
    trained(without, b, 2)
    with a.swapped(with_swap), torch.no_grad():
        with_swap(torch.randn(3, 4))  # in training mode: even then the statistics that move are not the module's own
    trained(with_swap, a, 2, start=2)
    trained(without, b, 2, start=2)
    assert torch.equal(with_swap.module.weight, without.module.weight)


def test_swaps_into_another_module_of_the_same_shape() -> None:
    net, other = make(0), make(1)
    ema = Ema(net, 0.9)
    trained(net, ema, 2)
    with ema.swapped(other):
        assert torch.equal(other.module.weight, ema.state_dict()["module.weight"])


def test_a_step_after_resuming_is_the_same_to_the_bit() -> None:
    net = make()
    ema = Ema(net, decay=0.99)
    trained(net, ema, 3)
    saved = copy.deepcopy((net.state_dict(), ema.state_dict()))
    trained(net, ema, 2, start=3)

    again = make(seed=5)
    resumed = Ema(again, decay=0.99)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    trained(again, resumed, 2, start=3)
    for name, average in resumed.state_dict().items():
        assert torch.equal(average, ema.state_dict()[name])


def test_loading_copies() -> None:
    """A checkpoint's tensors may be reused by whoever read them."""
    net = make()
    ema, state = Ema(net, 0.9), copy.deepcopy(Ema(make(1), 0.9).state_dict())
    ema.load_state_dict(state)
    state["module.weight"].zero_()
    assert ema.state_dict()["module.weight"].abs().sum() > 0


def test_averages_of_another_module_are_refused() -> None:
    state = dict(Ema(make(), 0.9).state_dict())
    state["elsewhere"] = state.pop("module.weight")
    with pytest.raises(KeyError, match=r"missing \['module.weight'\], unknown \['elsewhere'\]"):
        Ema(make(), 0.9).load_state_dict(state)


def test_shared_weights_are_averaged_once() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    tied = nn.ModuleDict({"a": first, "b": second})
    ema = Ema(tied, 0.0)
    assert ema.names == ["a.weight"]
    with torch.no_grad():
        first.weight.fill_(3.0)
    ema.update()
    with ema.swapped(tied):
        assert second.weight.data_ptr() == ema.averages[0].data_ptr()


def test_memory_layout_is_kept() -> None:
    """An average laid out otherwise than its weights would take the slow path of the foreach kernels."""
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    ema = Ema(net, 0.9)
    assert [a.stride() for a in ema.averages] == [p.stride() for p in net.parameters()]


def test_one_call_for_any_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    lerp = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *a: (calls.append(len(a[0])), lerp(*a))[1])
    net: Any = timm.create_model("test_vit")
    ema = Ema(net, 0.9)
    ema.update()
    assert calls == [len(list(net.parameters()))]


def test_nothing_to_average() -> None:
    Ema(nn.Linear(2, 2).requires_grad_(False), 0.9).update()


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("module._orig_mod.blocks.0.weight", "blocks.0.weight"),
        ("_orig_mod.module.blocks.0.weight", "blocks.0.weight"),
        ("blocks._orig_mod.0.weight", "blocks.0.weight"),
        ("head.weight", "head.weight"),
    ],
)
def test_names_out_of_files(name: str, bare: str) -> None:
    assert clean(name) == bare


def test_an_equal_average_is_the_mean_of_what_came() -> None:
    net = make()
    swa = Swa(net, start=4, every=3)
    history = []
    for step in range(12):
        with torch.no_grad():
            net.module.weight.add_(torch.randn(4, 4, generator=torch.Generator().manual_seed(step)))
        swa.update(step)
        history.append(net.module.weight.detach().clone())
        if step < 4:
            assert torch.equal(swa.state_dict()["module.weight"], history[-1]), "until it begins it is the weights themselves"
    # three, six, nine … steps after the start: the weights after steps 6, 9 of 0 … 11
    torch.testing.assert_close(swa.state_dict()["module.weight"], torch.stack([history[6], history[9]]).mean(0))


def test_an_average_of_every_nth_step() -> None:
    net, reference = make(), make()
    ema, every = Ema(reference, 0.9), Ema(net, 0.9, every=4)
    for step in range(16):
        with torch.no_grad():
            net.module.weight.add_(0.1)
        every.update(step)
        if step % 4 == 3:
            reference.module.weight.data.copy_(net.module.weight)
            ema.update(step // 4)
    torch.testing.assert_close(every.state_dict()["module.weight"], ema.state_dict()["module.weight"])


def test_the_decay_rescaled_as_torchvision_does_it() -> None:
    """references/classification/train.py: alpha = min(1, (1 - decay) * world * batch * steps / epochs)."""
    from types import SimpleNamespace

    from trainer.build import build_average
    from trainer.launch.compose import compose_run

    loop = ["loop.ema_decay=0.99998", "loop.ema_rescale=true", "loop.ema_every=32", "loop.batch_size=1024", "loop.epochs=600"]
    run = compose_run("dataset=synthetic", "dataset.num_train=4096", *loop)
    data: Any = SimpleNamespace(steps_per_epoch=4, total_steps=2400)
    ema = build_average(run, data, make())  # type: ignore[arg-type]
    assert ema is not None
    assert ema.every == 32
    assert 1 - ema.decay == pytest.approx(min(1.0, (1.0 - 0.99998) * 8 * 128 * 32 / 600))
