"""Our statistics are scipy's, to twelve digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from trainer.sweep.statistics import bootstrap_interval, compare, holm, ranks, summary, t_quantile, t_test

SAME = 1e-12  # relative
# Scores as they come: fractions of one, losses, and numbers far from it.
SCORES = st.lists(st.floats(-1e3, 1e3).filter(lambda v: abs(v) > 1e-6), min_size=2, max_size=40)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 9, 19, 49, 99, 999])
def test_student(freedom):
    for t in (1e-3, 0.1, 0.5, 1.0, 2.0, 3.182, 5.0, 20.0, 100.0, 1e4, -2.5):
        assert t_test(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=SAME)
    for level in (0.5, 0.9, 0.95, 0.99, 0.999):
        assert t_quantile(freedom, level) == pytest.approx(stats.t.ppf(0.5 + level / 2, freedom), rel=SAME)
    assert t_test(0.0, freedom) == 1.0
    assert t_test(math.inf, freedom) == 0.0


@given(SCORES)
def test_means_and_intervals(values):
    ours = summary(values)
    assert ours.n == len(values)
    assert ours.mean == pytest.approx(np.mean(values), rel=SAME, abs=1e-12)
    assert ours.std == pytest.approx(np.std(values, ddof=1), rel=SAME, abs=1e-12)
    error = stats.sem(values)
    assume(error > 1e-9)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=SAME, abs=1e-11)


@pytest.mark.parametrize("seed", range(20))
def test_paired_comparison(seed):
    draw = np.random.default_rng(seed)
    n = int(draw.integers(2, 30))
    a, b = draw.normal(0.7, 0.02, n), draw.normal(0.71, 0.02, n)
    ours = compare(dict(enumerate(a.tolist())), dict(enumerate(b.tolist())))
    theirs = stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.95)
    assert (ours.t, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue), rel=SAME)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=SAME)
    assert ours.effect == pytest.approx(np.mean(a - b) / np.std(a - b, ddof=1), rel=SAME)


def test_only_seeds_that_both_have_are_compared():
    ours = compare({42: 0.5, 195: 0.6, 7: 0.9}, {42: 0.4, 195: 0.4, 335: 0.1})
    theirs = stats.ttest_rel([0.5, 0.6], [0.4, 0.4])
    assert ours.n == 2
    assert ours.p == pytest.approx(theirs.pvalue, rel=SAME)


def test_what_cannot_be_said_is_none():
    nothing, one = summary([]), summary([0.5])
    assert (nothing.n, nothing.mean) == (0, None)
    assert (one.n, one.mean, one.std, one.low, one.high) == (1, 0.5, None, None, None)
    assert compare({1: 0.5}, {2: 0.5}).difference is None
    assert compare({1: 0.5}, {1: 0.25}) == compare({1: 0.75, 3: 1.0}, {1: 0.5, 2: 0.0})  # one pair: a difference, and no test
    same = compare({1: 0.5, 2: 0.7}, {1: 0.5, 2: 0.7})
    assert (same.difference, same.t, same.p, same.effect) == (0.0, None, None, None)


@pytest.mark.parametrize("n", [3, 5, 12, 40])
def test_bootstrap(n):
    values = np.random.default_rng(n).gamma(2.0, size=n)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9_999, rng=np.random.default_rng(0)).confidence_interval
    assert bootstrap_interval(values.tolist()) == pytest.approx((theirs.low, theirs.high), rel=SAME)
    chosen = summary(values.tolist(), bootstrap=True)
    assert (chosen.low, chosen.high) == bootstrap_interval(values.tolist())


def test_bootstrap_of_equal_values_is_a_point():
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


@given(st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.9]), min_size=1, max_size=12))
def test_ranks(values):
    assert ranks(values, higher_is_better=False) == stats.rankdata(values).tolist()
    assert ranks(values, higher_is_better=True) == stats.rankdata([-v for v in values]).tolist()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_is_between_p_and_bonferroni(p_values):
    adjusted = holm([*p_values, None])
    assert adjusted[-1] is None
    numbers = [p for p in adjusted if p is not None]
    for p, a in zip(p_values, numbers, strict=True):
        assert p <= a <= min(1.0, p * len(p_values)) or math.isclose(a, p)
    for i, j in zip(*np.triu_indices(len(p_values), 1), strict=True):
        assert (p_values[i] < p_values[j]) <= (numbers[i] <= numbers[j])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979, stepwise: 4 x, 3 x, 2 x, 1 x
