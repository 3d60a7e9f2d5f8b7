"""Randomness that belongs to a sample: the same numbers in Python, numpy and torch, and good ones."""

from __future__ import annotations

import random as python_random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests import thresholds
from tests.trainer.data.sources import global_generators
from trainer.random import SampleRandom, fold, mix, normal, permutation, sample_keys, uniform

numbers = st.integers(0, 2**62)


def test_mix_is_splitmix64():
    """The first outputs of the reference implementation (prng.di.unimi.it/splitmix64.c) for seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [mix(1234567 + i * 0x9E3779B97F4A7C15) for i in range(1, 6)] == expected


def test_numbers_never_change():
    """Data order and augmentation of every run made so far hang on these."""
    assert len({fold(0), fold(0, 0), fold(0, 0, 0), fold(0, 1), fold(1, 0)}) == 5
    assert fold(1, 2, 3) == 6837799079370971490
    assert permutation(7, 10).tolist() == [9, 1, 5, 6, 0, 7, 4, 8, 3, 2]
    assert uniform(torch.tensor([42]), 5, 2).tolist() == [[0.851997971534729, 0.9367690682411194]]


@given(numbers, st.integers(-1, 1000), st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 9)), min_size=1, max_size=5))
def test_sample_keys_are_the_fold_of_each_row(seed, epoch, rows):
    index, occurrence = np.array(rows, dtype=np.int64).T
    keys = sample_keys(seed, epoch, index, occurrence)
    assert keys.tolist() == [fold(seed, epoch, *row) for row in rows]
    assert (keys >= 0).all()


@given(st.lists(numbers, min_size=1, max_size=6), st.integers(0, 300))
def test_a_sample_s_numbers_do_not_depend_on_its_batch(keys, stream):
    together = uniform(torch.tensor(keys), stream, 4)
    for key, row in zip(keys, together, strict=True):
        assert uniform(torch.tensor([key]), stream, 4)[0].equal(row)
        one_by_one = SampleRandom(key, stream)
        assert [one_by_one.uniform() for _ in range(4)] == row.tolist()


def test_uniform_numbers_are_uniform_and_independent_across_streams():
    keys = torch.from_numpy(sample_keys(0, 0, np.arange(20_000), np.zeros(20_000, np.int64)))
    a, b = uniform(keys, 1, 2).double().numpy(), uniform(keys, 2, 1).double().numpy()
    for column in (a[:, 0], a[:, 1], b[:, 0]):
        assert stats.kstest(column, "uniform").pvalue > thresholds.CHANCE
        assert column.min() >= 0 and column.max() < 1
    for pair in ((a[:, 0], a[:, 1]), (a[:, 0], b[:, 0])):
        assert abs(np.corrcoef(*pair)[0, 1]) < 4 / 20_000**0.5  # four standard deviations


def test_normal_numbers_are_normal():
    drawn = normal(torch.arange(5000), 3, 4).double().numpy().ravel()
    assert stats.kstest(drawn, "norm").pvalue > thresholds.CHANCE


def test_integers_and_choices_cover_all_values_evenly():
    draws = [SampleRandom(key).integer(7) for key in range(7000)]
    assert stats.chisquare(np.bincount(draws, minlength=7)).pvalue > thresholds.CHANCE
    assert {SampleRandom(key).choice("abc") for key in range(50)} == set("abc")


@given(numbers, st.integers(0, 300))
def test_permutation_is_one(seed, size):
    assert sorted(permutation(seed, size).tolist()) == list(range(size))


def test_permutations_are_uniform():
    counts = np.bincount([int("".join(map(str, permutation(seed, 3))), 3) for seed in range(6000)], minlength=27)
    assert stats.chisquare(counts[counts > 0]).pvalue > thresholds.CHANCE
    assert (counts > 0).sum() == 6


@pytest.mark.parametrize("restores", [True, False])
def test_global_generators_are_the_sample_s_inside_and_as_before_outside(restores):
    def draw():
        return python_random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    before = global_generators()
    with SampleRandom(5, restores=restores).global_generators():
        first = draw()
    assert (global_generators() == before) == restores
    draw()
    with SampleRandom(5).global_generators():
        assert draw() == first
    with SampleRandom(6).global_generators():
        assert draw() != first
