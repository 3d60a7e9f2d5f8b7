"""What a sweep of the learning rate says: smoothing, and three ways to read a rate off the curve. Pure arithmetic; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH = 3.0  # steps: standard deviation of the window the losses are smoothed with
DIVERGED = 4.0  # times the lowest loss so far: from there on nothing is to be learned
LAG = 0.7  # of the running mean that divergence is judged by
FALL = 0.02  # of the first loss: a curve that falls by less has nothing to say
WORDS = {
    "steepest": "where the loss falls fastest",
    "minimum": "a tenth of where it is lowest",
    "valley": "the middle of its longest descent",
}


@dataclass
class Sweep:
    """Losses at rising learning rates."""

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    running: float = 0.0
    lowest: float = math.inf

    def add(self, rate: float, loss: float) -> bool:
        """Note a step. Returns whether the loss has left for good."""
        self.rates.append(rate)
        self.losses.append(loss)
        if not math.isfinite(loss):
            return True
        self.running = LAG * self.running + (1 - LAG) * loss
        mean = self.running / (1 - LAG ** len(self.losses))
        self.lowest = min(self.lowest, mean)
        return mean > DIVERGED * abs(self.lowest)

    def smooth(self) -> list[float]:
        """The losses under a window that looks both ways: a running mean would come too late, and suggest too much."""
        losses = [loss for loss in self.losses if math.isfinite(loss)]
        reach = range(-round(4 * WIDTH), round(4 * WIDTH) + 1)
        weights = {d: math.exp(-((d / WIDTH) ** 2) / 2) for d in reach}
        result = []
        for i in range(len(losses)):
            near = [(weights[d], losses[i + d]) for d in reach if 0 <= i + d < len(losses)]
            result.append(sum(w * loss for w, loss in near) / sum(w for w, _ in near))
        return result

    def suggestions(self) -> dict[str, float]:
        """Rates by the names in WORDS; none where the loss has not fallen."""
        curve = self.smooth()
        if not curve:
            return {}
        bottom = min(range(len(curve)), key=curve.__getitem__)
        if bottom < 2 or curve[0] - curve[bottom] < FALL * abs(curve[0]):
            return {}
        # The rates grow by equal factors, so a difference between neighbours is a slope over the logarithm.
        slopes = {i: curve[i + 1] - curve[i - 1] for i in range(1, bottom)}
        first, last = longest_descent(curve)
        return {
            "steepest": self.rates[min(slopes, key=slopes.__getitem__)],
            "minimum": self.rates[bottom] / 10,
            "valley": self.rates[(first + last) // 2],
        }


def longest_descent(values: Sequence[float]) -> tuple[int, int]:
    """First and last place of the valley, as ESRI's and fastai's finders have it: it ends where the longest falling subsequence
    ends, and is as long as that; the small ups and downs of the plateau before it, which such a sequence may use, do not count."""
    length = [1] * len(values)
    for i in range(len(values)):
        length[i] = 1 + max((length[j] for j in range(i) if values[j] > values[i]), default=0)
    last = max(range(len(values)), key=length.__getitem__)
    return last - length[last] + 1, last
