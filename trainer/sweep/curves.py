"""How every run's scores developed, thinned out to what a screen can show. Reads the sheets that runs write; knows no statistics."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.log.record import read_rows
from trainer.sweep.found import Run, number

BUDGET = 250_000  # numbers in a page: about 2 MB
FEWEST, MOST = 24, 400  # points of one curve
NAMES = ("train/loss",)  # besides every val/*


@dataclass
class Curves:
    """One run's: `values[name]` stands against `steps`; None where a row has no such value."""

    steps: list[int]
    epochs: list[float]
    values: dict[str, list[float | None]]


def read_curves(runs: Sequence[Run]) -> list[Curves]:
    """The curves of each run, also of those that failed or still go."""
    found = [_curves(list(_rows(run))) for run in runs]
    names = max((len(curves.values) for curves in found), default=1) + 1
    points = min(MOST, max(FEWEST, BUDGET // max(1, len(runs) * names)))
    return [_thin(curves, points) for curves in found]


def _rows(run: Run) -> Iterator[Mapping[str, Any]]:
    """One row a validation: of epochs.csv, else of the result, else of the record."""
    try:
        with open(run.directory.path / "epochs.csv", newline="") as file:
            yield from _of_sheet(file)
        return
    except (OSError, UnicodeDecodeError, csv.Error):
        pass
    if run.result and isinstance(run.result.get("history"), list):
        yield from (row for row in run.result["history"] if isinstance(row, dict))
        return
    path: Path = run.directory.metrics_path
    if path.is_file():
        yield from (row for row in read_rows(path) if any(key.startswith("val/") for key in row))


def _of_sheet(file: Any) -> Iterator[Mapping[str, Any]]:
    rows = csv.reader(file)
    head = next(rows, [])
    wanted = [(i, name) for i, name in enumerate(head) if name in ("step", "epoch") or _is_wanted(name)]
    for row in rows:
        if len(row) == len(head):  # the last line may be half written
            yield {name: _float(row[i]) for i, name in wanted}


def _is_wanted(name: str) -> bool:
    return name in NAMES or (name.startswith("val/") and "seconds" not in name)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _curves(rows: Sequence[Mapping[str, Any]]) -> Curves:
    rows = [row for row in rows if number(row.get("step")) is not None]
    names = dict.fromkeys(name for row in rows for name in row if _is_wanted(name))
    values = {name: [number(row.get(name)) for row in rows] for name in names}
    return Curves([int(row["step"]) for row in rows], [number(row.get("epoch")) or 0.0 for row in rows], values)


def _thin(curves: Curves, most: int) -> Curves:
    """Every n-th point, and the last."""
    count = len(curves.steps)
    stride = -(-count // most)
    if stride <= 1:
        return curves
    kept = sorted({*range(stride - 1, count, stride), count - 1})
    pick = lambda values: [values[i] for i in kept]  # noqa: E731
    return Curves(pick(curves.steps), pick(curves.epochs), {name: pick(values) for name, values in curves.values.items()})
