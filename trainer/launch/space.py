"""What a search may try: the values of each swept setting, as Hydra's override grammar says them.

Random search (`trainer.launch.draw`) and Optuna (`trainer.launch.search`) read a command line alike. Imports no torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from trainer.errors import ConfigError, Problem
from trainer.launch.axes import key_of

NOT_SEARCHED = ("sweep.zip", "sweep.file")
_DIGITS = 4  # of a number that is drawn: nobody needs more, and people read them


@dataclass(frozen=True)
class Values:
    """One of several values: `a,b`, `choice(…)`, `range(…)`, `glob(…)`."""

    key: str  # as on the command line
    texts: tuple[str, ...]
    ordered: bool = False  # as `range(…)` is: what is good lies beside what is good
    log: bool = False  # was asked for, and says nothing here

    def draw(self, generator: random.Random) -> str:
        """A line `key=value`."""
        return self.line(generator.choice(self.texts))

    def line(self, text: object) -> str:
        return f"{self.key}={text}"

    def probes(self) -> list[str]:
        """Lines that show whether this setting can be searched at all."""
        return [self.line(text) for text in (self.texts if not self.ordered else dict.fromkeys((self.texts[0], self.texts[-1])))]


@dataclass(frozen=True)
class Interval:
    """Any number from `low` to `high`, both included; a whole one where both are."""

    key: str
    low: float
    high: float
    log: bool = False

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def draw(self, generator: random.Random) -> str:
        """A line `key=value`."""
        if self.log:
            return self.line(math.exp(generator.uniform(math.log(self.low), math.log(self.high))))
        return self.line(generator.randint(int(self.low), int(self.high)) if self.is_whole else generator.uniform(self.low, self.high))

    def line(self, at: float) -> str:
        value = round(at) if self.is_whole else float(f"{at:.{_DIGITS}g}")
        return f"{self.key}={min(self.high, max(self.low, value))}"

    def probes(self) -> list[str]:
        return [self.line(self.low), self.line(self.high)]


Axis = Values | Interval


def axis_of(line: str, parser: OverridesParser) -> Axis | None:
    """What this line sweeps; None where it sweeps nothing, or seeds: everything that is tried is tried with each of these.

    Raises:
        ConfigError: an interval without anything in it.
    """
    try:
        (override,) = parser.parse_overrides([line])
    except HydraException:
        return None  # told where it is composed
    if not override.is_sweep_override() or override.is_hydra_override() or override.key_or_group == "seed" or key_of(line) in NOT_SEARCHED:
        return None
    value = override.value()
    if isinstance(value, IntervalSweep):
        return _interval(override, value)
    texts = tuple(override.sweep_string_iterator())
    if not texts:
        return None
    ordered = isinstance(value, RangeSweep) and not value.shuffle
    return Values(override.get_key_element(), tuple(dict.fromkeys(texts)), ordered, "log" in getattr(value, "tags", ()))


def axes_of(lines: Sequence[str], parser: OverridesParser) -> dict[str, Axis]:
    """The axes among these lines, by line."""
    return {line: axis for line in lines if (axis := axis_of(line, parser)) is not None}


def _interval(override: Override, sweep: IntervalSweep) -> Interval:
    key, low, high, log = override.get_key_element(), sweep.start, sweep.end, "log" in sweep.tags
    assert low is not None
    assert high is not None
    if not low < high or (log and low <= 0):
        reason = "the lower end comes first" if not low < high else "on a logarithmic scale both ends are positive"
        raise ConfigError(Problem(key, override.get_value_string(), reason, f"{key}=interval({min(low, high):g},{max(low, high):g})"))
    return Interval(key, low, high, log)
