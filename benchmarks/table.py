"""Rows, their targets, and how both are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.measure import Race, Ratio


@dataclass(frozen=True)
class Line:
    """One comparison and what was promised for it. `passed` is None where nothing was promised: shown, not judged."""

    what: str
    against: str
    ours: str = ""  # with its unit
    theirs: str = ""
    ratio: Ratio | None = None
    target: str = ""
    passed: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    quick: bool
    factor: int = 1  # more rounds, where a first measurement missed its target

    def rounds(self, full: int, quick: int) -> int:
        return (quick if self.quick else full) * self.factor


Measurement = Callable[[Effort], Iterator[Line]]

ROWS: dict[str, tuple[str, Measurement]] = {}
"""By name: what the row says, and the function that measures it."""


def row(name: str, title: str) -> Callable[[Measurement], Measurement]:
    """Register a function that measures one row of the table. Its name is what `python -m benchmarks NAME` takes."""

    def register(measure: Measurement) -> Measurement:
        ROWS[name] = (title, measure)
        return measure

    return register


def show(value: float, unit: str) -> str:
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def at_most(race: Race, ours: str, theirs: str, limit: float | None, *, what: str = "", unit: str = "us", note: str = "") -> Line:
    """`ours` / `theirs` <= `limit`. A contender that could not start fails the line; None: shown, not judged."""
    return _judge(race, ours, theirs, limit, "<=", what, unit, note)


def at_least(race: Race, ours: str, theirs: str, limit: float | None, *, what: str = "", unit: str = "us", note: str = "") -> Line:
    return _judge(race, ours, theirs, limit, ">=", what, unit, note)


def _judge(race: Race, ours: str, theirs: str, limit: float | None, sign: str, what: str, unit: str, note: str) -> Line:
    what = what or ours
    target = "" if limit is None else f"{sign} {limit:g}"
    for name, role in ((ours, "ours"), (theirs, "peer")):
        if name in race.absent:
            return Line(what, theirs, target=target, passed=None if limit is None else False, note=f"{role} absent: {race.absent[name]}")
    ratio = race.ratio(ours, theirs)
    passed = None if limit is None else (ratio.median <= limit if sign == "<=" else ratio.median >= limit)
    return Line(what, theirs, show(race.median(ours), unit), show(race.median(theirs), unit), ratio, target, passed, note)


def limit(race: Race, name: str, most: float | None, *, unit: str = "", note: str = "") -> Line:
    """A figure of one contender alone, at most `most`."""
    target = "" if most is None else f"<= {most:g}"
    if name in race.absent:
        return Line(name, "", target=target, passed=None if most is None else False, note=f"absent: {race.absent[name]}")
    value = race.median(name)
    return Line(name, "", show(value, unit).strip(), target=target, passed=None if most is None else value <= most, note=note)
