"""Which sample comes when. A pure function of the seed and the step: it knows no files, no workers and keeps no position.

The samples of a run form one endless sequence. It goes through the dataset again and again, each time in another order;
an epoch is a stretch of it, an optimizer step takes the next `batch_size` samples, and ranks and micro-batches only cut
these up. So a position is one integer, resuming costs the same anywhere, and neither the number of ranks nor of workers
changes what is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from trainer.random import fold, permutation, sample_keys

_SHUFFLE, _FRACTION, _CLASSES, _WITHIN, _BATCHES = range(5)  # what a seed is folded for


@dataclass(frozen=True)
class Draw:
    """Some samples, in order. All arrays are [n]."""

    epoch: int
    index: np.ndarray  # int64, place in the source
    occurrence: np.ndarray  # int64, how many times the pass over the data had this sample before
    key: np.ndarray  # int64 >= 0, the sample's own random key
    count: int  # how many are real: n, or 0 where one sample stands in for an empty micro-batch

    def take(self, places: slice) -> Draw:
        index = self.index[places]
        return Draw(self.epoch, index, self.occurrence[places], self.key[places], len(index))


@dataclass(frozen=True)
class Order:
    """The order of a training set.

    Args:
        size: samples in the source.
        seed: the run's.
        batch_size: samples per optimizer step, over all ranks and micro-batches.
        drop_last: leave out an epoch's last short batch.
        samples_per_epoch: length of a virtual epoch; None = one pass. The sequence goes on where it was, so short virtual
            epochs together still show every sample equally often.
        repeats: each sample this many times in a row, each time with a key of its own. A pass is that much longer.
        labels: int64 [size]; where given, every class makes up the same share of a pass, samples of small classes coming
            more than once.
        groups: int64 [size]; where given, a batch holds samples of one group, but for the last ones of a pass, which take what
            is left of each. A pass then begins with a batch, so this goes with whole passes only.
        fraction: use this part of the samples, the same ones in every epoch, among those of any larger part.
        first_step, first_epoch: where in its run this order begins. Epochs go on counting, so another batch size from some
            epoch on changes neither which samples come when nor how each is augmented.
    """

    size: int
    seed: int
    batch_size: int
    drop_last: bool = True
    samples_per_epoch: int | None = None
    repeats: int = 1
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None
    fraction: float = 1.0
    first_step: int = 0
    first_epoch: int = 0
    _passes: dict[int, tuple[np.ndarray, np.ndarray | None]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def rows(self) -> np.ndarray | None:
        """The samples in use, ascending; None = all."""
        if self.fraction >= 1:
            return None
        kept = max(1, round(self.size * self.fraction))
        return _packed(np.sort(permutation(fold(self.seed, _FRACTION), self.size)[:kept]), self.size)

    @property
    def pass_length(self) -> int:
        """Samples until every one in use has come (`repeats` times)."""
        return (self.size if self.rows is None else len(self.rows)) * self.repeats

    @property
    def epoch_length(self) -> int:
        """Samples an epoch trains on."""
        length = self.samples_per_epoch or self.pass_length
        return length // self.batch_size * self.batch_size if self.drop_last else length

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.epoch_length // self.batch_size)

    def step_size(self, step: int) -> int:
        """Samples of optimizer step `step`: `batch_size`, but for an epoch's last where it is kept."""
        within = (step - self.first_step) % self.steps_per_epoch
        return min(self.batch_size, self.epoch_length - within * self.batch_size)

    def step_samples(self, step: int) -> Draw:
        """The whole global batch of optimizer step `step`, counted from 0."""
        epoch, within = divmod(step - self.first_step, self.steps_per_epoch)
        epoch += self.first_epoch
        start = epoch * (self.samples_per_epoch or self.pass_length) + within * self.batch_size
        places = np.arange(start, start + self.step_size(step), dtype=np.int64)
        passes, places = np.divmod(places, self.pass_length)
        index = np.empty(len(places), dtype=np.int64)
        occurrence = places % self.repeats
        for number in range(int(passes[0]), int(passes[-1]) + 1):
            here = passes == number
            index[here], again = self._look_up(number, places[here] // self.repeats)
            if again is not None:
                occurrence[here] += again * self.repeats
        return Draw(epoch, index, occurrence, sample_keys(self.seed, passes, index, occurrence), len(index))

    def share(self, step: int, rank: int, world: int, accumulate: int) -> list[Draw]:
        """This rank's micro-batches of a step: every `world`-th sample, cut into `accumulate` consecutive parts."""
        whole = self.step_samples(step)
        mine = whole.take(slice(rank, None, world))
        cuts = np.linspace(0, mine.count, accumulate + 1).round().astype(int)
        parts = [mine.take(slice(a, b)) for a, b in pairwise(cuts)]
        # A short last batch may leave a rank without a sample; it still has to run, as the others wait for it.
        return [p if p.count else Draw(whole.epoch, whole.index[:1], whole.occurrence[:1], whole.key[:1], 0) for p in parts]

    def _look_up(self, number: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Source index at `places` of a pass, and how often the pass had it before (None = never)."""
        if number not in self._passes:
            while len(self._passes) >= 2:  # a batch can lie across two passes
                self._passes.pop(next(iter(self._passes)))
            self._passes[number] = self._one_pass(number)
        order, again = self._passes[number]
        return order[places].astype(np.int64), None if again is None else again[places].astype(np.int64)

    def _one_pass(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        seed = fold(self.seed, _SHUFFLE, number)
        if self.labels is not None:
            return self._balanced_pass(seed)
        count = self.pass_length // self.repeats
        order = permutation(seed, count)
        order = order if self.rows is None else self.rows[order]
        return _packed(order if self.groups is None else self._by_groups(order, seed), self.size), None

    def _by_groups(self, order: np.ndarray, seed: int) -> np.ndarray:
        """The same samples in batches of one group each, the batches in random order; what makes up no batch comes last."""
        assert self.groups is not None
        group = self.groups[order]
        sizes = np.bincount(group)
        whole = sizes // self.batch_size  # batches of each group
        members = np.argsort(group, kind="stable")  # places of the first group's samples, then of the second's …
        rank = np.empty(len(order), dtype=np.int64)  # of each sample within its group
        rank[members] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        number, within = np.divmod(rank, self.batch_size)
        batched = number < whole[group]
        turn = permutation(fold(seed, _BATCHES), int(whole.sum()))
        result = np.empty_like(order)
        place = turn[((np.cumsum(whole) - whole)[group] + number)[batched]] * self.batch_size + within[batched]
        result[place] = order[batched]
        result[len(turn) * self.batch_size :] = order[members[~batched[members]]]
        return result

    def _balanced_pass(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(self.size) if self.rows is None else self.rows
        assert self.labels is not None
        present, labels = np.unique(self.labels[rows], return_inverse=True)
        # Which class comes when: all equally often, to within one.
        turn = permutation(fold(seed, _CLASSES), len(rows)) % len(present)
        order = np.empty(len(rows), dtype=np.int64)
        again = np.empty(len(rows), dtype=np.int64)
        by_class = np.argsort(labels, kind="stable")
        stops = np.cumsum(np.bincount(labels, minlength=len(present)))
        turns, turn_stops = np.argsort(turn, kind="stable"), np.cumsum(np.bincount(turn, minlength=len(present)))
        for c in range(len(present)):
            members = by_class[stops[c - 1] if c else 0 : stops[c]]
            when = turns[turn_stops[c - 1] if c else 0 : turn_stops[c]]
            # As many rounds through the class as it takes, each in an order of its own.
            entries = permutation(fold(seed, _WITHIN, c), -(-len(when) // len(members)) * len(members))
            entries = entries[np.argsort(entries // len(members), kind="stable")][: len(when)]
            order[when] = rows[members[entries % len(members)]]
            again[when] = entries // len(members)
        return _packed(order, self.size), again


def shape_groups(ratios: np.ndarray, per_octave: int) -> np.ndarray:
    """Which of several ranges of width over height each image is in, int64 [N].

    The bounds are those of torchvision's references (references/detection/group_by_aspect_ratio.py): `per_octave` of them from
    1/2 to 1 and from 1 to 2, in equal factors; 0 = wide or upright.
    """
    bounds = 2.0 ** np.linspace(-1, 1, 2 * per_octave + 1) if per_octave else np.ones(1)
    return np.searchsorted(bounds, ratios, side="right").astype(np.int64)


def _packed(rows: np.ndarray, size: int) -> np.ndarray:
    """Half the memory where numbers are small enough."""
    return rows.astype(np.int32) if size < 2**31 else rows
