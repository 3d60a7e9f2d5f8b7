"""Random search: `+sweep.random=20` runs twenty jobs whose values are drawn, each with every seed, instead of every combination.

All jobs are known, checked and written down before the first one starts, like those of any sweep, so every launcher runs them
and `resume` goes on with them. Imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

from trainer.errors import ConfigError, Problem
from trainer.launch.axes import key_of
from trainer.launch.space import NOT_SEARCHED, Axis, axes_of

COUNT, SEED = "sweep.random", "sweep.random_seed"
_TRIES = 50  # draws for each job, where few combinations are left that are new


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
    axes = axes_of(lines, parser)
    problems = [Problem(key_of(line), line.partition("=")[2], f"cannot go with {COUNT}") for line in lines if key_of(line) in NOT_SEARCHED]
    if not axes:
        problems.append(Problem(COUNT, counts[-1], "has nothing to draw", "'optimizer.lr=tag(log,interval(1e-4,1e-1))'"))
    if problems:
        raise ConfigError(*problems)
    return [line for line in lines if line not in axes], _rows(axes, counts[-1], seeds[-1] if seeds else 0)


def _rows(axes: Mapping[str, Axis], count: int, seed: int) -> list[list[str]]:
    draws = {line: random.Random(f"{seed} {key_of(line)}") for line in axes}
    rows: list[list[str]] = []
    for _ in range(count * _TRIES):
        row = [axis.draw(draws[line]) for line, axis in axes.items()]
        if row not in rows:
            rows.append(row)
        if len(rows) == count:
            return rows
    raise ConfigError(Problem(COUNT, count, f"asks for more than the {len(rows)} different jobs that there are", f"+{COUNT}={len(rows)}"))


def _numbers(lines: Sequence[str], key: str, *, least: int) -> list[int]:
    found = []
    for line in lines:
        if key_of(line) == key:
            text = line.partition("=")[2]
            if not text.isdigit() or int(text) < least:
                raise ConfigError(Problem(key, text, f"must be a whole number, >= {least}", f"+{key}={max(least, 20)}"))
            found.append(int(text))
    return found
