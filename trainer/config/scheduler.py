"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to resume, easy to draw.

Every choice is a curve between a linear warm-up and a linear cool-down. The arithmetic is in trainer/schedule.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.config.fields import setting
from trainer.config.schemas import schema
from trainer.errors import Problem

if TYPE_CHECKING:
    from trainer.schedule import Curve, Schedule, Span


@dataclass
class SchedulerConfig:
    """What every schedule has: a linear warm-up before its own curve and a linear cool-down to zero after it."""

    warmup_epochs: float = setting(0.0, "epochs of linear warm-up", ge=0)
    warmup_steps: int | None = setting(None, "optimizer steps of warm-up, instead of epochs", ge=0)
    warmup_start: float = setting(0.01, "learning rate at the first warm-up step, as a fraction of the peak", ge=0, le=1)
    cooldown_epochs: float = setting(0.0, "epochs of linear decay to zero at the end", ge=0)
    cooldown_steps: int | None = setting(None, "optimizer steps of cool-down, instead of epochs", ge=0)

    @abstractmethod
    def curve(self, span: Span) -> Curve:
        """The factor on the peak learning rate, as a function of the optimizer steps since the end of the warm-up."""

    def momentum_curve(self, span: Span) -> Curve | None:
        """The momentum (Adam: beta1) as a function of the same, where the schedule moves it."""
        return None

    def build(self, total_steps: int, steps_per_epoch: float) -> Schedule:
        from trainer.schedule import Schedule

        return Schedule.of(self, total_steps, steps_per_epoch)

    def problems(self) -> Iterator[Problem]:
        for part in ("warmup", "cooldown"):
            yield from _set_twice(self, f"{part}_epochs", f"{part}_steps", off="0")

    def length_problems(self, total_steps: int, steps_per_epoch: float) -> Iterator[Problem]:
        """What cannot work in a run of this length."""
        from trainer.schedule import Span, ramp_steps

        warmup, cooldown = ramp_steps(self, steps_per_epoch)
        part, steps = ("warmup", warmup) if warmup >= cooldown else ("cooldown", cooldown)
        if warmup + cooldown > total_steps:
            both = f"warm-up and cool-down take {warmup} + {cooldown}" if warmup and cooldown else f"takes {steps}"
            # A tenth of the run is a usual warm-up.
            epochs, tenth = round(total_steps / steps_per_epoch / 10, 2), max(1, total_steps // 10)
            key = self._length_key(part)
            fix = f"scheduler.{key}={tenth if key.endswith('steps') else epochs:g}, or a longer run"
            yield Problem(f"scheduler.{key}", getattr(self, key), f"{both} of the run's {total_steps} optimizer steps", fix)
            return
        span = Span(warmup, total_steps - warmup - cooldown, total_steps, steps_per_epoch)
        if cooldown and self.curve(span)(span.steps) == 0:
            key = self._length_key("cooldown")
            reason = "the curve before it ends at zero, so a cool-down would train nothing"
            fix = f"scheduler.{key}=0" + (", or scheduler.final_fraction=0.1" if hasattr(self, "final_fraction") else "")
            yield Problem(f"scheduler.{key}", getattr(self, key), reason, fix)

    def _length_key(self, part: str) -> str:
        """The field that `part`, warmup or cooldown, was given in."""
        return f"{part}_steps" if getattr(self, f"{part}_steps") is not None else f"{part}_epochs"


def _set_twice(cfg: SchedulerConfig, epochs: str, steps: str, off: str) -> Iterator[Problem]:
    """A length is in epochs or in steps. Setting both is an error, never a silent choice."""
    if getattr(cfg, epochs) and getattr(cfg, steps) is not None:
        yield Problem(
            f"scheduler.{steps}", getattr(cfg, steps), f"scheduler.{epochs}={getattr(cfg, epochs)} is set too", f"scheduler.{epochs}={off}"
        )


@schema("scheduler", "constant")
@dataclass
class Constant(SchedulerConfig):
    """The peak learning rate throughout. With a cool-down: warm-up, stable, decay (arXiv:2404.06395, sec. 4)."""

    def curve(self, span: Span) -> Curve:
        return lambda t: 1.0


@schema("scheduler", "cosine")
@dataclass
class Cosine(SchedulerConfig):
    """Half a cosine, without restarts (arXiv:1608.03983, eq. 5)."""

    final_fraction: float = setting(help="learning rate at the end of the curve, as a fraction of the peak", ge=0, le=1)

    def curve(self, span: Span) -> Curve:
        from trainer.schedule import cosine

        return cosine(span, self.final_fraction)


@schema("scheduler", "polynomial")
@dataclass
class Polynomial(SchedulerConfig):
    """(1 - t) ** power; with power 1, `scheduler=linear`."""

    power: float = setting(help="exponent of the share of the curve that is left", gt=0)
    final_fraction: float = setting(help="learning rate at the end of the curve, as a fraction of the peak", ge=0, le=1)

    def curve(self, span: Span) -> Curve:
        from trainer.schedule import polynomial

        return polynomial(span, self.power, self.final_fraction)


@schema("scheduler", "rsqrt")
@dataclass
class ReciprocalSqrt(SchedulerConfig):
    """1 / sqrt(1 + t / timescale): no end is built in, so a run can go on; usually with a cool-down (arXiv:2106.04560, sec. 3.5)."""

    timescale_steps: int = setting(help="optimizer steps after which the rate has fallen to 1 / sqrt(2)", ge=1)

    def curve(self, span: Span) -> Curve:
        from trainer.schedule import reciprocal_sqrt

        return reciprocal_sqrt(self.timescale_steps)


@schema("scheduler", "step")
@dataclass
class Step(SchedulerConfig):
    """The learning rate falls by a factor at regular intervals, counted from the start of the run."""

    gamma: float = setting(help="factor at each fall", gt=0, le=1)
    decay_every: float | None = setting(None, "epochs between falls; null = a third of the run", gt=0)
    decay_every_steps: int | None = setting(None, "optimizer steps between falls, instead of epochs", ge=1)

    def curve(self, span: Span) -> Curve:
        from trainer.schedule import staircase

        period = self.decay_every_steps or (self.decay_every or span.total_steps / span.steps_per_epoch / 3) * span.steps_per_epoch
        falls = [period * i for i in range(1, int(span.total_steps / period) + 1)]
        return staircase(span, falls, self.gamma)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from _set_twice(self, "decay_every", "decay_every_steps", off="null")


@schema("scheduler", "multistep")
@dataclass
class MultiStep(SchedulerConfig):
    """The learning rate falls by a factor at given moments, counted from the start of the run."""

    gamma: float = setting(help="factor at each fall", gt=0, le=1)
    milestones: list[float] | None = setting(None, "epochs after which it falls; null = after 60 and 85 per cent of the run", gt=0)
    milestones_steps: list[int] | None = setting(None, "optimizer steps after which it falls, instead of epochs", gt=0)

    def curve(self, span: Span) -> Curve:
        from trainer.schedule import staircase

        if self.milestones_steps is not None:
            falls = [float(step) for step in self.milestones_steps]
        elif self.milestones is not None:
            falls = [epoch * span.steps_per_epoch for epoch in self.milestones]
        else:  # torchvision's detection recipe: 16 and 22 of 26 epochs
            falls = [0.6 * span.total_steps, 0.85 * span.total_steps]
        return staircase(span, falls, self.gamma)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from _set_twice(self, "milestones", "milestones_steps", off="null")
        for name in ("milestones", "milestones_steps"):
            given = getattr(self, name) or []
            if sorted(set(given)) != given:
                yield Problem(
                    f"scheduler.{name}", given, "must rise", f"scheduler.{name}=[{','.join(f'{m:g}' for m in sorted(set(given)))}]"
                )


@schema("scheduler", "onecycle")
@dataclass
class OneCycle(SchedulerConfig):
    """Up to the peak and down again within one run, the momentum moving the other way (arXiv:1708.07120); torch's OneCycleLR."""

    pct_start: float = setting(help="share of the cycle spent rising", ge=0, le=1)
    div_factor: float = setting(help="the cycle starts at peak / div_factor", ge=1)
    final_div_factor: float = setting(help="and ends at peak / div_factor / final_div_factor", ge=1)
    anneal_strategy: str = setting(help="shape of the way up and down", choices=["cos", "linear"])
    cycle_momentum: bool = setting(help="move the momentum (Adam: beta1) from max down to base and back")
    base_momentum: float = setting(help="momentum at the peak of the learning rate", ge=0, lt=1)
    max_momentum: float = setting(help="momentum at both ends", ge=0, lt=1)

    def curve(self, span: Span) -> Curve:
        from trainer.schedule import one_cycle

        start = 1 / self.div_factor
        return one_cycle(span, self.pct_start, self.anneal_strategy, start, 1.0, start / self.final_div_factor)

    def momentum_curve(self, span: Span) -> Curve | None:
        from trainer.schedule import one_cycle

        if not self.cycle_momentum:
            return None
        return one_cycle(span, self.pct_start, self.anneal_strategy, self.max_momentum, self.base_momentum, self.max_momentum)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.base_momentum > self.max_momentum:
            yield Problem(
                "scheduler.base_momentum",
                self.base_momentum,
                f"must not exceed scheduler.max_momentum ({self.max_momentum})",
                f"scheduler.base_momentum={self.max_momentum}",
            )
