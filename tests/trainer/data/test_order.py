"""The order of data: what an epoch holds, and that nothing but seed and step decides it."""

from __future__ import annotations

import bisect
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import thresholds
from trainer.data.order import Order, shape_groups
from trainer.random import fold, sample_keys

cuts = {"world": st.integers(1, 4), "accumulate": st.integers(1, 3)}


def seen(order: Order, steps: range, world: int = 1, accumulate: int = 1) -> list[tuple[int, int, int]]:
    """(index, occurrence, key) in global order, put together again from what the ranks are given."""
    together = []
    for step in steps:
        ranks = [[p for p in order.share(step, rank, world, accumulate) if p.count] for rank in range(world)]
        mine = [
            [row for p in parts for row in zip(p.index.tolist(), p.occurrence.tolist(), p.key.tolist(), strict=True)] for parts in ranks
        ]
        for place in range(max(map(len, mine))):
            together += [rows[place] for rows in mine if place < len(rows)]
    return together


@given(size=st.integers(1, 60), batch=st.integers(1, 12), drop_last=st.booleans(), seed=st.integers(0, 9), epoch=st.integers(0, 3), **cuts)
def test_an_epoch_is_the_dataset(size, batch, drop_last, seed, epoch, world, accumulate):
    order = Order(size, seed, batch, drop_last)
    assume(order.steps_per_epoch > 0)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    rows = seen(order, steps, world, accumulate)
    counts = Counter(index for index, _, _ in rows)
    assert max(counts.values()) == 1
    assert len(counts) == order.epoch_length == (size // batch * batch if drop_last else size)
    assert all(key == fold(seed, epoch, index, occurrence) for index, occurrence, key in rows)
    assert len({key for _, _, key in rows}) == len(rows)


@given(size=st.integers(8, 60), batch=st.integers(1, 8), drop_last=st.booleans(), start=st.integers(0, 30), **cuts)
def test_any_cut_and_any_start_give_the_same_sequence(size, batch, drop_last, start, world, accumulate):
    order = Order(size, 3, batch, drop_last)
    unbroken = seen(order, range(start + 5))
    # Another object, which has seen nothing before `start`: what a resumed run has.
    resumed = seen(Order(size, 3, batch, drop_last), range(start, start + 5), world, accumulate)
    assert resumed == unbroken[-len(resumed) :]


def test_two_ranks_then_one_then_four():
    order = Order(50, 1, 8)
    changed = seen(order, range(3), world=2) + seen(order, range(3, 4), world=1) + seen(order, range(4, 9), world=4)
    assert changed == seen(order, range(9))


@given(size=st.integers(1, 40), batch=st.integers(1, 12), **cuts)
def test_micro_batches_are_even_and_none_is_empty(size, batch, world, accumulate):
    order = Order(size, 0, batch, drop_last=False)
    for step in range(order.steps_per_epoch):
        for rank in range(world):
            parts = order.share(step, rank, world, accumulate)
            assert len(parts) == accumulate
            assert all(len(p.index) == max(p.count, 1) for p in parts)
            assert max(p.count for p in parts) - min(p.count for p in parts) <= 1
    assert order.step_size(order.steps_per_epoch - 1) == (size % batch or batch)


def test_epochs_and_seeds_differ():
    orders = [tuple(Order(100, seed, 100).step_samples(epoch).index) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


@given(size=st.integers(1, 30), repeats=st.integers(1, 4), batch=st.integers(1, 7))
def test_repeats_come_in_a_row_with_keys_of_their_own(size, repeats, batch):
    order = Order(size, 0, batch, drop_last=False, repeats=repeats)
    rows = seen(order, range(order.steps_per_epoch))
    assert Counter(index for index, _, _ in rows) == dict.fromkeys(range(size), repeats)
    for first in range(0, len(rows), repeats):
        group = rows[first : first + repeats]
        assert len({index for index, _, _ in group}) == 1
        assert [occurrence for _, occurrence, _ in group] == list(range(repeats))
    assert len({key for _, _, key in rows}) == len(rows)


@given(size=st.integers(1, 30), samples=st.integers(1, 80), batch=st.integers(1, 7), repeats=st.integers(1, 2))
def test_virtual_epochs_go_on_where_the_last_one_was(size, samples, batch, repeats):
    order = Order(size, 0, batch, drop_last=False, samples_per_epoch=samples, repeats=repeats)
    assert order.epoch_length == samples
    passes = 3 * samples // (size * repeats)
    rows = seen(order, range(3 * order.steps_per_epoch))
    assert len(rows) == 3 * samples
    counts = Counter(index for index, _, _ in rows[: passes * size * repeats])
    assert all(count == passes * repeats for count in counts.values())
    assert len({key for _, _, key in rows}) == len(rows)
    assert order.step_samples(order.steps_per_epoch).epoch == 1


@given(sizes=st.lists(st.integers(1, 25), min_size=1, max_size=5), seed=st.integers(0, 3))
def test_classes_come_equally_often(sizes, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = Order(len(labels), seed, 1, labels=labels)
    rows = seen(order, range(order.steps_per_epoch))
    classes = Counter(int(labels[index]) for index, _, _ in rows)
    assert len(rows) == len(labels)
    assert max(classes.values()) - min(classes[c] for c in range(len(sizes))) <= 1
    for c in range(len(sizes)):  # within a class, nothing comes twice before everything has come once
        counts = Counter(index for index, _, _ in rows if labels[index] == c)
        if counts:
            assert max(counts.values()) - (min(counts.values()) if len(counts) == sizes[c] else 0) <= 1
    assert len({key for _, _, key in rows}) == len(rows)


@given(size=st.integers(1, 50), fraction=st.floats(0.01, 1), labelled=st.booleans())
def test_a_fraction_is_the_same_samples_in_every_epoch(size, fraction, labelled):
    labels = np.arange(size) % 3 if labelled else None
    order = Order(size, 4, 1, fraction=fraction, labels=labels)
    epochs = [{i for i, _, _ in seen(order, range(e * order.steps_per_epoch, (e + 1) * order.steps_per_epoch))} for e in range(2)]
    assert order.epoch_length == max(1, round(size * fraction))
    if labelled:
        assert epochs[0] | epochs[1] <= set(order.rows if order.rows is not None else range(size))
    else:
        assert epochs[0] == epochs[1] and len(epochs[0]) == order.epoch_length


def test_keys_do_not_care_how_they_are_computed():
    draw = Order(20, 9, 5, repeats=2).step_samples(3)
    one_by_one = [int(sample_keys(9, 0, draw.index[i : i + 1], draw.occurrence[i : i + 1])[0]) for i in range(5)]
    assert draw.key.tolist() == one_by_one


@pytest.mark.parametrize("labels", [None, np.arange(1_000_000) % 1000])
def test_a_million_samples_cost_little_and_resuming_late_costs_no_more(labels):
    def first_batch(step: int) -> float:
        started = time.thread_time()  # of its own: what else the machine does is no work of ours
        Order(1_000_000, 0, 250, labels=labels).step_samples(step)
        return time.thread_time() - started

    first_batch(0)
    early, late = map(min, zip(*((first_batch(0), first_batch(3600)) for _ in range(5)), strict=True))
    assert late < thresholds.RESUME_LATE_OVER_EARLY * early
    assert late < thresholds.MILLION_SAMPLES_SECONDS


def test_an_epoch_s_order_takes_four_bytes_a_sample():
    order = Order(100_000, 0, 250)
    order.step_samples(0)
    assert sum(array.nbytes for tables in order._passes.values() for array in tables if array is not None) == 400_000


@given(size=st.integers(1, 60), batch=st.integers(1, 7), kinds=st.integers(1, 4), seed=st.integers(0, 5), epoch=st.integers(0, 3), **cuts)
def test_batches_of_one_group_each_and_every_sample_once(size, batch, kinds, seed, epoch, world, accumulate):
    groups = np.random.default_rng(seed).integers(0, kinds, size)
    order = Order(size, seed, batch, drop_last=False, groups=groups)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = [[index for index, _, _ in seen(order, range(step, step + 1), world, accumulate)] for step in steps]
    assert sorted(index for rows in batches for index in rows) == list(range(size))
    pure = [len(set(groups[rows].tolist())) == 1 and len(rows) == batch for rows in batches]
    possible = sum(np.bincount(groups) // batch)
    assert all(pure[:possible]), "as many batches of one group as there can be, before those of the rest"
    # A run that begins here sees the same, keys included.
    assert seen(Order(size, seed, batch, False, groups=groups), steps) == seen(order, steps)


def test_grouped_batches_are_shuffled():
    groups = np.arange(64) % 2
    order = Order(64, 0, 8, groups=groups)
    turns = [[int(groups[order.step_samples(step).index[0]]) for step in range(8 * e, 8 * e + 8)] for e in range(20)]
    assert len({tuple(turn) for turn in turns}) > 5, "in another order in every pass"
    assert len({tuple(sorted(order.step_samples(step).index)) for step in range(80)}) == 80, "and of other samples"


def test_groups_of_shapes_are_torchvisions():
    """references/detection/group_by_aspect_ratio.py: bisect_right in 2 ** linspace(-1, 1, 2 k + 1)."""
    ratios = np.array([0.3, 0.5, 0.55, 0.7, 0.99, 1.0, 1.2, 1.33, 2.0, 3.0])
    bounds = (2 ** np.linspace(-1, 1, 7)).tolist()
    assert shape_groups(ratios, 3).tolist() == [bisect.bisect_right(bounds, r) for r in ratios]
    assert shape_groups(ratios, 0).tolist() == [int(r >= 1) for r in ratios]
