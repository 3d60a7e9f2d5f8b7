"""Schedules against torch.optim.lr_scheduler and timm.scheduler as independent implementations, and their shapes."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch.optim import lr_scheduler

from trainer.config.scheduler import Constant, Cosine, MultiStep, OneCycle, Polynomial, ReciprocalSqrt, SchedulerConfig, Step
from trainer.errors import ConfigError
from trainer.schedule import Schedule

STEPS_PER_EPOCH = 7


def one_cycle(**changes: Any) -> OneCycle:
    """With torch's defaults."""
    values: dict[str, Any] = {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4, "anneal_strategy": "cos"}
    return OneCycle(**(values | {"cycle_momentum": True, "base_momentum": 0.85, "max_momentum": 0.95} | changes))


def factors(cfg: SchedulerConfig, total: int) -> list[float]:
    schedule = Schedule.of(cfg, total, STEPS_PER_EPOCH)
    return [schedule.factor(step) for step in range(total)]


def sgd(lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def torch_rates(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], total: int, lr: float = 1.0) -> list[float]:
    """What torch would use at each optimizer step, as a share of the peak."""
    optimizer = sgd(lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def timm_rates(make: Callable[[torch.optim.Optimizer], object], total: int) -> list[float]:
    optimizer = sgd()
    scheduler = make(optimizer)
    rates = []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step + 1)  # type: ignore[attr-defined]
    return rates


def after_warmup(warmup: int, make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], start: float = 0.01):
    """torch's own way to put a warm-up before a schedule."""

    def build(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        ramp = lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=warmup)
        return lr_scheduler.SequentialLR(optimizer, [ramp, make(optimizer)], milestones=[warmup])

    return build


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR calls its parts in the way torch deprecates
class TestAgainstTorch:
    @pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (0, 0.2), (5, 0.0), (9, 0.3)])
    def test_cosine(self, warmup: int, final: float) -> None:
        total = 50
        make = lambda o: lr_scheduler.CosineAnnealingLR(o, total - warmup, eta_min=final)  # noqa: E731
        expected = torch_rates(after_warmup(warmup, make) if warmup else make, total)
        assert factors(Cosine(final_fraction=final, warmup_steps=warmup), total) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("warmup", [0, 6])
    @pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
    def test_polynomial(self, power: float, warmup: int) -> None:
        total = 40
        make = lambda o: lr_scheduler.PolynomialLR(o, total - warmup, power)  # noqa: E731
        expected = torch_rates(after_warmup(warmup, make) if warmup else make, total)
        assert factors(Polynomial(power=power, final_fraction=0.0, warmup_steps=warmup), total) == pytest.approx(expected, abs=1e-12)

    def test_linear_to_a_fraction(self) -> None:
        expected = torch_rates(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=30), 30)
        assert factors(Polynomial(power=1.0, final_fraction=0.1), 30) == pytest.approx(expected, abs=1e-12)

    def test_step_counts_from_the_start_of_the_run(self) -> None:
        # torchvision's detection recipe: a warm-up inside the first epoch that does not move the falls.
        def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
            ramp = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=4)
            return lr_scheduler.ChainedScheduler([ramp, lr_scheduler.StepLR(optimizer, 2 * STEPS_PER_EPOCH, 0.5)])

        assert factors(Step(gamma=0.5, decay_every=2.0, warmup_steps=4), 60) == pytest.approx(torch_rates(make, 60), abs=1e-12)

    def test_multistep(self) -> None:
        expected = torch_rates(lambda o: lr_scheduler.MultiStepLR(o, [14, 28], 0.1), 40)
        assert factors(MultiStep(gamma=0.1, milestones=[2, 4]), 40) == pytest.approx(expected, abs=1e-12)
        assert factors(MultiStep(gamma=0.1, milestones_steps=[14, 28]), 40) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("total", [1, 2, 3, 5, 37, 100])
    @pytest.mark.parametrize("strategy", ["cos", "linear"])
    @pytest.mark.parametrize("pct_start", [0.1, 0.3, 0.45])
    def test_one_cycle_with_its_momentum(self, total: int, strategy: str, pct_start: float) -> None:
        optimizer = sgd()
        shape: dict[str, Any] = {"pct_start": pct_start, "anneal_strategy": strategy}
        theirs = lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=total, **shape)
        ours = Schedule.of(one_cycle(**shape), total, STEPS_PER_EPOCH)
        for step in range(total):
            group = optimizer.param_groups[0]
            assert 0.4 * ours.factor(step) == pytest.approx(group["lr"], abs=1e-12)
            assert ours.momentum(step) == pytest.approx(group["momentum"], abs=1e-12)
            optimizer.step()
            theirs.step()

    def test_one_cycle_where_torch_divides_by_zero(self) -> None:
        schedule = Schedule.of(one_cycle(pct_start=0.25), 4, STEPS_PER_EPOCH)
        assert schedule.factor(0) == 1.0


class TestAgainstTimm:
    @pytest.mark.parametrize("final", [0.0, 0.05])
    def test_cosine(self, final: float) -> None:
        def make(o: torch.optim.Optimizer) -> object:
            return CosineLRScheduler(o, 42, lr_min=final, warmup_t=8, warmup_lr_init=0.01, warmup_prefix=True, t_in_epochs=False)

        assert factors(Cosine(final_fraction=final, warmup_steps=8), 50) == pytest.approx(timm_rates(make, 50), abs=1e-12)

    def test_polynomial(self) -> None:
        def make(o: torch.optim.Optimizer) -> object:
            return PolyLRScheduler(o, 42, power=0.9, lr_min=0.1, warmup_t=8, warmup_lr_init=0.01, warmup_prefix=True, t_in_epochs=False)

        cfg = Polynomial(power=0.9, final_fraction=0.1, warmup_steps=8)
        assert factors(cfg, 50) == pytest.approx(timm_rates(make, 50), abs=1e-12)

    def test_step(self) -> None:
        def make(o: torch.optim.Optimizer) -> object:
            return StepLRScheduler(o, 12, 0.7, warmup_t=5, warmup_lr_init=0.01, warmup_prefix=False, t_in_epochs=False)

        assert factors(Step(gamma=0.7, decay_every_steps=12, warmup_steps=5), 50) == pytest.approx(timm_rates(make, 50), abs=1e-12)


def falling_curves() -> st.SearchStrategy[SchedulerConfig]:
    final = st.floats(0.05, 1.0)
    return st.one_of(
        st.just(Constant()),
        st.builds(Cosine, final_fraction=final),
        st.builds(Polynomial, power=st.floats(0.2, 5), final_fraction=final),
        st.builds(ReciprocalSqrt, timescale_steps=st.integers(1, 10_000)),
        st.builds(Step, gamma=st.floats(0.3, 1.0), decay_every=st.one_of(st.none(), st.floats(1, 20))),
        st.builds(MultiStep, gamma=st.floats(0.3, 1.0)),
    )


@given(cfg=falling_curves(), total=st.integers(1, 300), warmup=st.integers(0, 60), cooldown=st.integers(0, 60), start=st.floats(0, 0.01))
@settings(max_examples=400, deadline=None)
def test_rises_then_never_rises_again(cfg: SchedulerConfig, total: int, warmup: int, cooldown: int, start: float) -> None:
    warmup, cooldown = min(warmup, total // 2), min(cooldown, total // 2)
    cfg.warmup_steps, cfg.cooldown_steps, cfg.warmup_start = warmup, cooldown, start
    rates = factors(cfg, total)
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(a <= b for a, b in itertools.pairwise(rates[: warmup + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[warmup:]))
    if warmup:
        assert rates[0] == start
    if cooldown > 1:  # a straight line whose next point would be zero
        slope = rates[-1]
        assert slope > 0
        assert [rate / slope for rate in rates[-cooldown:]] == pytest.approx(range(cooldown, 0, -1))


@given(total=st.integers(2, 500), pct_start=st.floats(0, 1), warmup=st.integers(0, 50), cooldown=st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_one_cycle_goes_up_once(total: int, pct_start: float, warmup: int, cooldown: int) -> None:
    cfg = one_cycle(pct_start=pct_start, warmup_steps=min(warmup, total // 2), cooldown_steps=min(cooldown, total // 2), warmup_start=0.0)
    rates = factors(cfg, total)
    top = rates.index(max(rates))
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[top:]))


def test_warmup_in_epochs_is_warmup_in_steps() -> None:
    assert factors(Cosine(final_fraction=0.0, warmup_epochs=2), 70) == factors(
        Cosine(final_fraction=0.0, warmup_steps=2 * STEPS_PER_EPOCH), 70
    )
    assert factors(Constant(cooldown_epochs=2), 70) == factors(Constant(cooldown_steps=2 * STEPS_PER_EPOCH), 70)


def test_reciprocal_sqrt_timescale() -> None:
    schedule = Schedule.of(ReciprocalSqrt(timescale_steps=10, warmup_steps=5), 1000, STEPS_PER_EPOCH)
    assert schedule.factor(5) == 1.0
    assert schedule.factor(15) == pytest.approx(1 / math.sqrt(2))
    # A longer run only goes on: nothing before the old end moves.
    longer = Schedule.of(ReciprocalSqrt(timescale_steps=10, warmup_steps=5), 2000, STEPS_PER_EPOCH)
    assert [longer.factor(s) for s in range(1000)] == [schedule.factor(s) for s in range(1000)]


def test_falls_at_fractions_of_an_epoch_come_on_time() -> None:
    # 0.7 * 10 is 7.000000000000001 in floating point.
    assert Schedule.of(Step(gamma=0.5, decay_every=0.7), 20, 10).factor(7) == 0.5


def test_default_falls_fit_any_length() -> None:
    for total in (20, 100, 1000):
        assert factors(MultiStep(gamma=0.1), total)[-1] == pytest.approx(0.01)
        assert factors(Step(gamma=0.1), total)[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("cfg", [Cosine(final_fraction=0.0), Polynomial(power=0.9, final_fraction=0.0), one_cycle(), Step(gamma=0.1)])
def test_steps_past_the_end_stay_at_the_end(cfg: SchedulerConfig) -> None:
    schedule = Schedule.of(cfg, 30, STEPS_PER_EPOCH)
    assert schedule.factor(30) == schedule.factor(40) <= schedule.factor(29)


@pytest.mark.parametrize("cfg", [Constant(), Cosine(final_fraction=0.0), one_cycle(cycle_momentum=False)])
def test_momentum_is_left_alone_unless_the_schedule_moves_it(cfg: SchedulerConfig) -> None:
    assert Schedule.of(cfg, 10, STEPS_PER_EPOCH).momentum(3) is None


@pytest.mark.parametrize(
    ("cfg", "key"),
    [
        (Constant(warmup_epochs=20.0), "scheduler.warmup_epochs"),
        (Constant(warmup_steps=101), "scheduler.warmup_steps"),
        (Constant(cooldown_epochs=8.0, warmup_steps=60), "scheduler.warmup_steps"),
        (Cosine(final_fraction=0.0, cooldown_epochs=1.0), "scheduler.cooldown_epochs"),  # nothing left to cool down from
    ],
)
def test_ramps_that_cannot_work_are_refused(cfg: SchedulerConfig, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        Schedule.of(cfg, 100, STEPS_PER_EPOCH)
    (problem,) = error.value.problems
    assert getattr(problem, "key") == key  # noqa: B009
    assert "try: scheduler." in str(problem)


def test_the_advice_on_a_long_warmup_works() -> None:
    (problem,) = Constant(warmup_epochs=20.0).length_problems(100, STEPS_PER_EPOCH)
    value = float(problem.fix.split("=")[1].split(",")[0])
    assert not list(Constant(warmup_epochs=value).length_problems(100, STEPS_PER_EPOCH))


@pytest.mark.parametrize(
    ("cfg", "key"),
    [
        (Constant(warmup_epochs=1, warmup_steps=3), "scheduler.warmup_steps"),
        (Constant(cooldown_epochs=1, cooldown_steps=3), "scheduler.cooldown_steps"),
        (Step(gamma=0.1, decay_every=2.0, decay_every_steps=5), "scheduler.decay_every_steps"),
        (MultiStep(gamma=0.1, milestones=[3, 2]), "scheduler.milestones"),
        (MultiStep(gamma=0.1, milestones=[3], milestones_steps=[2]), "scheduler.milestones_steps"),
        (one_cycle(base_momentum=0.99), "scheduler.base_momentum"),
    ],
)
def test_contradictions_are_named(cfg: SchedulerConfig, key: str) -> None:
    assert [p.key for p in cfg.problems()] == [key]


def test_needs_no_torch() -> None:
    code = (
        "import sys; from trainer.config.scheduler import Cosine; s = Cosine(final_fraction=0.0).build(10, 5)\n"
        "assert s.factor(0) == 1.0 and s.factor(9) < 0.1; assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_choice_has_a_yaml_and_every_yaml_a_curve(pytestconfig: pytest.Config) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    folder = pytestconfig.rootpath / "conf"
    names = sorted(path.stem for path in (folder / "scheduler").glob("*.yaml"))
    assert {"cosine", "step", "multistep", "onecycle", "polynomial", "linear", "constant"} <= set(names)
    seen: dict[str, list[float]] = {}
    with initialize_config_dir(str(folder), version_base="1.3"):
        for name in names:
            node = compose(overrides=[f"+scheduler={name}"]).scheduler
            cfg = OmegaConf.to_object(node)
            assert isinstance(cfg, SchedulerConfig)
            assert not list(cfg.problems())
            seen[name] = factors(cfg, 100)
    assert len({tuple(rates) for rates in seen.values()}) == len(names), "two choices draw the same curve"


def test_what_distinguishes_a_choice_is_missing_in_its_schema() -> None:
    for cls in (Cosine, Polynomial, OneCycle, Step, MultiStep, ReciprocalSqrt):
        assert "???" in vars(cls()).values(), f"{cls.__name__} repeats what its YAML says"
