"""What becomes of a row's numbers: which are averaged over an epoch, and those averages. Knows names and arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SETTINGS = (
    "train/lr",
    "train/momentum",
    "train/skipped_steps",
    "train/stage",
    "train/image_size",
    "train/batch_size",
)  # prefixes of what is set or counted, not to be averaged


@dataclass(frozen=True, slots=True)
class Kinds:
    """What is done with the numbers of a row, by their names."""

    batch: tuple[str, ...]  # what a row of batches.csv has, in its order
    averaged: tuple[str, ...]  # means over the steps since the row before
    latest: tuple[str, ...]  # scores and settings, of which the last value counts
    trains: bool

    @classmethod
    def of(cls, names: Sequence[str]) -> Kinds:
        training = [name for name in names if name.startswith("train/")]
        averaged = tuple(name for name in training if not name.startswith(SETTINGS))
        latest = tuple(name for name in names if name.startswith(("train/", "val/")) and name not in averaged)
        return cls(("epoch", "step", *training, "seconds"), averaged, latest, "train/loss" in training)


class Totals:
    """Sums since the last row of epochs.csv: each logged mean counts for as many steps as it is a mean over."""

    def __init__(self, step: int = 0, since: float = 0.0) -> None:
        self.step = step  # up to which the sums go
        self.since = since  # seconds at which they begin
        self.sums: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.latest: dict[str, float] = {}

    def add(self, step: int, scalars: Mapping[str, float], kinds: Kinds) -> None:
        window = step - self.step
        sums, steps = self.sums, self.steps
        for name in kinds.averaged:
            sums[name] = sums.get(name, 0.0) + scalars[name] * window
            steps[name] = steps.get(name, 0) + window
        for name in kinds.latest:
            self.latest[name] = scalars[name]
        if kinds.trains:
            self.step = step

    def mean(self, name: str) -> float | None:
        """Of what has been added since the last row."""
        return self.sums[name] / self.steps[name] if self.steps.get(name) else None

    def take(self) -> dict[str, float]:
        """Means and totals, and a fresh start."""
        row = {key: total / self.steps[key] for key, total in self.sums.items() if self.steps[key]}
        if "train/loss" in row:
            row["train/loss_total"] = self.sums["train/loss"]
        row.update(self.latest)
        self.sums, self.steps, self.latest = {}, {}, {}
        return row
