"""Means over seeds, their intervals, and comparisons on the same seeds. Knows numbers only; standard library alone.

scipy has all of it, and takes a second to import: tests hold these against it, to twelve digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95  # of every interval
RESAMPLES = 9_999  # of a bootstrap; its interval then moves by less than a hundredth of its width from seed to seed
_PRECISION = 1e-16
_TINY = 1e-300  # in place of a zero denominator of the continued fraction


@dataclass(frozen=True)
class Summary:
    """A handful of numbers, one a seed. What they are too few for is None."""

    n: int
    mean: float | None
    std: float | None  # with n - 1: of the population that the seeds are a sample of
    low: float | None  # the interval of the mean
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """One arm less another, on the seeds that both have."""

    n: int  # pairs
    difference: float | None  # mean of the differences
    low: float | None
    high: float | None
    t: float | None
    p: float | None  # two-sided
    effect: float | None  # Cohen's d of the differences: their mean in units of their standard deviation


def summary(values: Sequence[float], *, bootstrap: bool = False) -> Summary:
    """Mean, standard deviation and interval of the mean: Student's t, or BCa bootstrap."""
    n = len(values)
    if n == 0:
        return Summary(0, None, None, None, None)
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, None, None, None)
    std = deviation(values, mean)
    if bootstrap:
        low, high = bootstrap_interval(values)
    else:
        half = t_quantile(n - 1) * std / math.sqrt(n)
        low, high = mean - half, mean + half
    return Summary(n, mean, std, low, high)


def compare(arm: Mapping[int, float], reference: Mapping[int, float]) -> Comparison:
    """The paired t test of `arm` - `reference`, both by seed: what the seed does to both alike falls out of the difference."""
    differences = [arm[seed] - reference[seed] for seed in arm if seed in reference]
    n = len(differences)
    if n < 2:
        return Comparison(n, differences[0] if n else None, None, None, None, None, None)
    mean = math.fsum(differences) / n
    std = deviation(differences, mean)
    if std <= 1e-15 * abs(mean) or std == 0.0:  # equal differences, to the last bit: nothing to test them by
        return Comparison(n, mean, mean, mean, None, None, None)
    error = std / math.sqrt(n)
    half, t = t_quantile(n - 1) * error, mean / error
    return Comparison(n, mean, mean - half, mean + half, t, t_test(t, n - 1), mean / std)


def deviation(values: Sequence[float], mean: float) -> float:
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The same p-values for as many tests as there are (Holm 1979): of 20 arms that are all alike, one beats p = 0.05 by chance."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def ranks(values: Sequence[float], *, higher_is_better: bool) -> list[float]:
    """The place of each value, 1 for the best; equal ones share the mean of their places."""
    signed = [-value if higher_is_better else value for value in values]
    order = sorted(range(len(signed)), key=signed.__getitem__)
    places = [0.0] * len(signed)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and signed[order[end]] == signed[order[start]]:
            end += 1
        for i in order[start:end]:
            places[i] = (start + 1 + end) / 2
        start = end
    return places


# Student's t


def t_test(t: float, freedom: int) -> float:
    """The probability of |T| >= |t|: I_x(freedom/2, 1/2) at x = freedom / (freedom + t^2) (Abramowitz & Stegun 26.5.27, 26.7.1)."""
    if math.isinf(t):
        return 0.0
    square = t * t
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + square), square / (freedom + square))


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t that |T| stays below with probability `level`."""
    if (freedom, level) not in _quantiles:
        _quantiles[freedom, level] = _t_quantile(freedom, 1.0 - level)
    return _quantiles[freedom, level]


_quantiles: dict[tuple[int, float], float] = {}


def _t_quantile(freedom: int, tail: float) -> float:
    """Newton's method on log p over log t, along which a tail is close to a straight line; from the normal quantile upwards."""
    t = NormalDist().inv_cdf(1.0 - tail / 2)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    for _ in range(100):
        p = t_test(t, freedom)
        density = 2 * scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
        step = math.log(p / tail) * p / (density * t)
        t *= math.exp(step)
        if abs(step) < 1e-15:
            break
    return t


def incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function I_x(a, b), with `rest` = 1 - x given so that neither end loses digits.

    The continued fraction 26.5.8 of Abramowitz & Stegun, in the half of [0, 1] where it converges fast.
    """
    if x <= 0.0 or rest <= 0.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(b, a, rest, x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)) / a
    return front / _fraction(a, b, x)


def _fraction(a: float, b: float, x: float) -> float:
    """1 + d1 x / (1 + d2 x / (1 + …)), by Lentz's method as Thompson & Barnett (1986) modified it."""
    value, c, d = 1.0, 1.0, 0.0
    for m in range(10_000):
        odd = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))
        even = (m + 1) * (b - m - 1) / ((a + 2 * m + 1) * (a + 2 * m + 2))
        for term in (odd * x, even * x):
            d = 1.0 / (1.0 + term * d or _TINY)
            c = 1.0 + term / c or _TINY
            value *= c * d
        if abs(c * d - 1.0) < _PRECISION:
            break
    return value


# Bootstrap


def bootstrap_interval(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The BCa interval of the mean (Efron 1987): bias-corrected and accelerated percentiles of resampled means.

    Of three seeds there are ten different resamples: it is for many seeds, and narrower than Student's for few.
    """
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    n, estimate = len(data), float(data.mean())
    if (data == data[0]).all():
        return estimate, estimate
    means = data[np.random.default_rng(seed).integers(0, n, (resamples, n))].mean(1)
    normal = NormalDist()
    below = (float((means < estimate).mean()) + float((means <= estimate).mean())) / 2
    bias = normal.inv_cdf(min(max(below, 1 / resamples), 1 - 1 / resamples))
    left_out = (data.sum() - data) / (n - 1)  # means without one value each
    away = left_out.mean() - left_out
    acceleration = float((away**3).sum() / (6 * (away**2).sum() ** 1.5))
    ends = []
    for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
        z = bias + normal.inv_cdf(tail)
        ends.append(float(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z)))))
    return ends[0], ends[1]
