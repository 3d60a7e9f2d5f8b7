"""The learning rate (and momentum) of every optimizer step, in closed form. Knows step counts only; imports no torch.

`factor(step)` is what step `step`, counted from 0, multiplies the peak learning rate with. There is no state, so a
resumed run and a drawing get the same numbers as the run itself.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config.scheduler import SchedulerConfig

Curve = Callable[[float], float]
"""A factor as a function of the optimizer steps since the end of the warm-up."""


@dataclass(frozen=True)
class Span:
    """Where a curve lies in its run, in optimizer steps: [start, start + steps) of [0, total_steps)."""

    start: int
    steps: int
    total_steps: int
    steps_per_epoch: float


class Schedule:
    """Warm-up, curve, cool-down."""

    def __init__(self, curve: Curve, momentum: Curve | None, span: Span, warmup_start: float) -> None:
        self.span = span
        self.total_steps = span.total_steps
        self.warmup_steps = span.start
        self.cooldown_steps = span.total_steps - span.start - span.steps
        self._curve = curve
        self._momentum = momentum
        self._cooldown_start = span.start + span.steps
        # Both ramps are straight lines that meet the curve: the warm-up at its first step, the cool-down where the curve
        # would have gone next. Zero lies one step behind the run's last, as no step should be spent on a rate of zero.
        self._low = warmup_start
        self._rise = (curve(0) - warmup_start) / span.start if span.start else 0.0
        self._fall = curve(span.steps) / self.cooldown_steps if self.cooldown_steps else 0.0

    @classmethod
    def of(cls, cfg: SchedulerConfig, total_steps: int, steps_per_epoch: float) -> Schedule:
        """The schedule of a run of `total_steps`. Raises ConfigError where warm-up and cool-down do not fit into it."""
        problems = list(cfg.length_problems(total_steps, steps_per_epoch))
        if problems:
            raise ConfigError(*problems)
        warmup, cooldown = ramp_steps(cfg, steps_per_epoch)
        span = Span(warmup, total_steps - warmup - cooldown, total_steps, steps_per_epoch)
        return cls(cfg.curve(span), cfg.momentum_curve(span), span, cfg.warmup_start)

    def factor(self, step: int) -> float:
        """What optimizer step `step`, from 0, multiplies the peak learning rate with."""
        if step < self.warmup_steps:
            return self._low + self._rise * step
        if step < self._cooldown_start or not self.cooldown_steps:
            return self._curve(min(step - self.warmup_steps, self.span.steps))
        return max(0.0, self._fall * (self.total_steps - step))

    def momentum(self, step: int) -> float | None:
        """The momentum (Adam: beta1) of that step; None where the schedule leaves it alone."""
        if self._momentum is None:
            return None
        return self._momentum(max(step - self.warmup_steps, 0))


class Later:
    """A schedule that begins at a later step of the run: that of a stage."""

    def __init__(self, schedule: Schedule, start: int) -> None:
        self.schedule, self.start = schedule, start

    def factor(self, step: int) -> float:
        return self.schedule.factor(step - self.start)

    def momentum(self, step: int) -> float | None:
        return self.schedule.momentum(max(0, step - self.start))


def ramp_steps(cfg: SchedulerConfig, steps_per_epoch: float) -> tuple[int, int]:
    """Optimizer steps of warm-up and of cool-down."""
    warmup = cfg.warmup_steps if cfg.warmup_steps is not None else round(cfg.warmup_epochs * steps_per_epoch)
    cooldown = cfg.cooldown_steps if cfg.cooldown_steps is not None else round(cfg.cooldown_epochs * steps_per_epoch)
    return warmup, cooldown


def cosine(span: Span, final: float) -> Curve:
    scale, half = math.pi / max(1, span.steps), (1 - final) / 2
    return lambda t: final + half * (1 + math.cos(scale * t))


def polynomial(span: Span, power: float, final: float) -> Curve:
    steps = max(1, span.steps)
    return lambda t: final + (1 - final) * (1 - t / steps) ** power


def reciprocal_sqrt(timescale: float) -> Curve:
    return lambda t: 1 / math.sqrt(1 + t / timescale)


def staircase(span: Span, falls: Sequence[float], gamma: float) -> Curve:
    """Times `gamma` from each of `falls` on; these are steps of the run, so the warm-up does not move them."""
    # 0.7 epochs of 10 steps are 7.000000000000001 steps: without the tolerance the fall would come a step late.
    edges = [fall - 1e-6 - span.start for fall in falls]
    levels = [gamma**i for i in range(len(falls) + 1)]
    return lambda t: levels[bisect_right(edges, t)]


def one_cycle(span: Span, pct_start: float, strategy: str, start: float, peak: float, end: float) -> Curve:
    """start -> peak -> end. Both turning points fall on the steps where torch's OneCycleLR puts them."""
    top, last = pct_start * span.steps - 1, span.steps - 1
    anneal = _cosine_anneal if strategy == "cos" else _linear_anneal

    def value(t: float) -> float:
        t = min(t, last)
        if t <= top:
            return anneal(start, peak, t / top) if top > 0 else peak
        return anneal(peak, end, (t - top) / (last - top))

    return value


def _cosine_anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def _linear_anneal(start: float, end: float, share: float) -> float:
    return start + (end - start) * share
