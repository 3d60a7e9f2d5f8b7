"""Random search: `+sweep.random=20` runs twenty jobs whose values are drawn, each with every seed, instead of every combination.

All jobs are known, checked and written down before the first one starts, like those of any sweep, so every launcher runs them
and `resume` goes on with them. Imports no torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from trainer.errors import ConfigError, Problem
from trainer.launch.axes import key_of

COUNT, SEED = "sweep.random", "sweep.random_seed"
_OTHERS = ("sweep.zip", "sweep.file")
_DIGITS = 4  # of a number that is drawn: nobody needs more, and people read them
_TRIES = 50  # draws for each job, where few combinations are left that are new

Axis = Callable[[random.Random], str]  # draws a line `key=value`


def drawn(lines: Sequence[str], parser: OverridesParser) -> tuple[list[str], list[list[str]]]:
    """The lines that are left, and the rows of drawn ones that each of their jobs is combined with; one empty row without `sweep.random`.

    The n-th row is the same however many there are, and an axis draws the same values whatever the others do: a longer search
    begins with the jobs of the shorter one, which are not run again.
    """
    counts = _numbers(lines, COUNT, least=1)
    seeds = _numbers(lines, SEED, least=0)
    if not counts:
        if seeds:
            raise ConfigError(Problem(SEED, seeds[-1], f"is for {COUNT}, which is not there", f"+{COUNT}=20"))
        return list(lines), [[]]
    lines = [line for line in lines if key_of(line) not in (COUNT, SEED)]
    axes = {line: axis for line in lines if (axis := _axis(line, parser)) is not None}
    problems = [Problem(key_of(line), line.partition("=")[2], f"cannot go with {COUNT}") for line in lines if key_of(line) in _OTHERS]
    if not axes:
        problems.append(Problem(COUNT, counts[-1], "has nothing to draw", "'optimizer.lr=tag(log,interval(1e-4,1e-1))'"))
    if problems:
        raise ConfigError(*problems)
    return [line for line in lines if line not in axes], _rows(axes, counts[-1], seeds[-1] if seeds else 0)


def _rows(axes: dict[str, Axis], count: int, seed: int) -> list[list[str]]:
    draws = {line: random.Random(f"{seed} {key_of(line)}") for line in axes}
    rows: list[list[str]] = []
    for _ in range(count * _TRIES):
        row = [axis(draws[line]) for line, axis in axes.items()]
        if row not in rows:
            rows.append(row)
        if len(rows) == count:
            return rows
    raise ConfigError(Problem(COUNT, count, f"asks for more than the {len(rows)} different jobs that there are", f"+{COUNT}={len(rows)}"))


def _axis(line: str, parser: OverridesParser) -> Axis | None:
    """How to draw what this line sweeps; None where it sweeps nothing, or seeds: every draw is made with each of these."""
    try:
        (override,) = parser.parse_overrides([line])
    except HydraException:
        return None  # told where it is composed
    if not override.is_sweep_override() or override.is_hydra_override() or override.key_or_group == "seed" or key_of(line) in _OTHERS:
        return None
    key = override.get_key_element()
    if isinstance(override.value(), IntervalSweep):
        return _interval(key, override)
    values = list(override.sweep_string_iterator())
    return (lambda draw: f"{key}={draw.choice(values)}") if values else None


def _interval(key: str, override: Override) -> Axis:
    sweep = override.value()
    assert isinstance(sweep, IntervalSweep)
    low, high, log = sweep.start, sweep.end, "log" in sweep.tags
    assert low is not None
    assert high is not None
    if not low < high or (log and low <= 0):
        reason = "the lower end comes first" if not low < high else "on a logarithmic scale both ends are positive"
        raise ConfigError(Problem(key, override.get_value_string(), reason, f"{key}=interval({min(low, high):g},{max(low, high):g})"))

    def axis(draw: random.Random) -> str:
        at = math.exp(draw.uniform(math.log(low), math.log(high))) if log else draw.uniform(low, high)
        if isinstance(low, int) and isinstance(high, int):
            return f"{key}={draw.randint(low, high) if not log else round(at)}"
        return f"{key}={min(high, max(low, float(f'{at:.{_DIGITS}g}')))}"

    return axis


def _numbers(lines: Sequence[str], key: str, *, least: int) -> list[int]:
    found = []
    for line in lines:
        if key_of(line) == key:
            text = line.partition("=")[2]
            if not text.isdigit() or int(text) < least:
                raise ConfigError(Problem(key, text, f"must be a whole number, >= {least}", f"+{key}={max(least, 20)}"))
            found.append(int(text))
    return found
