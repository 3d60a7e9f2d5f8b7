"""Reading some samples into a block of memory: what a loader does, in its own process or in a worker. It knows no order."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.source import BadSample, Source
from trainer.errors import DataError
from trainer.random import SampleRandom, fold

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from trainer.data.augment import Augmentation, Made
    from trainer.data.order import Draw
    from trainer.data.source import Sample
    from trainer.task import Batch

logger = logging.getLogger(__name__)

RAGGED = frozenset({"boxes", "labels", "crowd", "area", "truth"})
"""Fields with as many rows as a sample has objects: lists of tensors in a batch. All others have one shape and are stacked."""

OTHERS = 0x07E5  # what a key is folded for, to draw the samples that join another
ATTEMPTS = 64  # at replacing one bad sample; only where nearly all are bad does it take more
ALIGNMENT = 64  # bytes: a cache line


@dataclass(frozen=True)
class Field:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class Layout:
    """Where each field of each sample of a batch lies in a block of memory. Learned from one sample."""

    def __init__(self, sample: dict[str, Any], rows: int, ragged: Collection[str] = RAGGED) -> None:
        self.rows = rows
        self.fields = {"key": Field((), torch.int64), "index": Field((), torch.int64)}
        for name, value in sample.items():
            if name not in ragged and (field := _field(value)) is not None:
                self.fields[name] = field
        self.offsets: dict[str, int] = {}
        self.bytes = 0
        for name, field in self.fields.items():
            self.offsets[name] = self.bytes
            self.bytes += -(-field.bytes * rows // ALIGNMENT) * ALIGNMENT

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """The fields, [rows, ...] each, in a block of `bytes` uint8."""
        views = {}
        for name, field in self.fields.items():
            part = block[self.offsets[name] : self.offsets[name] + field.bytes * self.rows]
            views[name] = part.view(field.dtype).view(self.rows, *field.shape)
        return views

    def block(self) -> Tensor:
        return torch.empty(self.bytes, dtype=torch.uint8)


def _field(value: Any) -> Field | None:
    """What a value looks like in memory; None where it is no number or array."""
    if isinstance(value, Tensor):
        return Field(tuple(value.shape), value.dtype)
    if isinstance(value, np.ndarray):
        return Field(value.shape, torch.from_numpy(np.empty(0, value.dtype)).dtype)
    if isinstance(value, bool | np.bool_):
        return Field((), torch.bool)
    if isinstance(value, int | np.integer):
        return Field((), torch.int64)
    if isinstance(value, float | np.floating):
        return Field((), torch.float32)
    return None


@dataclass
class Filled:
    """What became of some rows of a block."""

    first: int
    count: int  # rows first ... first + count - 1 are good; fewer than asked for where bad samples are left out
    extra: dict[str, list[Any]]  # fields outside the block, one entry a row
    bad: list[tuple[str, str]]  # (name, why) of each sample that could not be read


class Reading:
    """How samples of one split are read: from where, made into what, and what happens when one is bad.

    Args:
        rows: the places in the source that a replacement is drawn from; None = all.
        replace: put another sample in the place of a bad one; otherwise it is left out.
        keep: bytes of samples that each process keeps: of those for which the augmentation drew nothing, which come out the same
            each time.
    """

    def __init__(self, source: Source, augmentation: Augmentation, *, rows: np.ndarray | None = None, replace: bool, keep: int = 0) -> None:
        self.source, self.augmentation, self.rows, self.replace = source, augmentation, rows, replace
        self.in_main_process = True
        self.names: frozenset[str] = frozenset()  # of a sample's fields; learned from the first
        self.ragged = RAGGED | frozenset(getattr(augmentation, "ragged", ()))
        self.others = getattr(augmentation, "others", None)
        # An augmentation that cuts before it decodes wants images with their pixels still unread.
        self.lazy = bool(getattr(augmentation, "lazy", False)) and hasattr(source, "lazy")
        self.room = keep  # bytes
        self.kept: dict[int, dict[str, Any]] = {}

    def layout(self, sample: dict[str, Any], rows: int) -> Layout:
        """How batches look whose samples are all like this one."""
        self.names = frozenset(sample)
        return Layout(sample, rows, self.ragged)

    def fill(self, views: dict[str, Tensor], first: int, stop: int, epoch: int, current: np.ndarray | None = None) -> Filled:
        """Read the samples that rows `first` to `stop` of "index" and "key" ask for into those rows.

        Args:
            epoch: that they are drawn in.
            current: told the index being read, for the obituary of a worker.
        """
        asked = list(zip(views["index"][first:stop].tolist(), views["key"][first:stop].tolist(), strict=True))
        filled = Filled(first, 0, {}, [])
        for place, (wanted, key) in enumerate(asked, first):
            if current is not None:
                current[0] = wanted
            found = self.read(wanted, key, epoch, filled.bad)
            if found is None:
                continue
            row = first + filled.count
            index, sample = found
            if (row, index) != (place, wanted):  # after one that was left out, or in the place of one
                views["index"][row], views["key"][row] = index, key
            if sample.keys() != self.names:
                raise ValueError(
                    f"sample {index} ({self.source.name(index)}) has the fields {sorted(sample)}, the first one had {sorted(self.names)}: "
                    "a source gives every sample the same"
                )
            for name, value in sample.items():
                if name in views:
                    self._put(views[name], row, value, name, index)
                else:
                    filled.extra.setdefault(name, []).append(value.numpy() if isinstance(value, Tensor) else value)
            filled.count += 1
        return filled

    def read(self, index: int, key: int, epoch: int, bad: list[tuple[str, str]]) -> tuple[int, dict[str, Any]] | None:
        """A sample, and where it really came from. None where it is bad and is not to be replaced."""
        for attempt in range(ATTEMPTS):
            try:
                return index, self._one(index, key, epoch, bad)
            except BadSample as problem:
                bad.append((problem.name or self.source.name(index), problem.why))
            except Exception as error:  # no fault of the data: say where, and let it through
                error.add_note(f"while reading sample {index}: {self.source.name(index)}")
                raise
            if not self.replace:
                return None
            index = self._pick(fold(key, attempt))
        raise _hopeless(bad)

    def _pick(self, number: int) -> int:
        """One of the samples in use, by a random number."""
        return number % len(self.source) if self.rows is None else int(self.rows[number % len(self.rows)])

    def _one(self, index: int, key: int, epoch: int, bad: list[tuple[str, str]]) -> dict[str, Any]:
        if index in self.kept:
            return self.kept[index]
        random = SampleRandom(key, restores=self.in_main_process)
        augmentation: Any = self.augmentation
        if self.others is None or not self.others(random, epoch):
            sample = augmentation.sample(self._raw(index), random)
            if self.room > 0 and not random.drawn:
                self._keep(index, sample)
            return sample

        def other(number: int, use: Callable[[Sample], Made]) -> Made:
            for attempt in range(ATTEMPTS):
                pick = self._pick(fold(key, OTHERS, number, attempt))
                try:
                    return use(self._raw(pick))
                except BadSample as problem:  # its own fault, not that of the sample it was to join
                    bad.append((problem.name or self.source.name(pick), problem.why))
            raise _hopeless(bad)

        return augmentation.together(self._raw(index), other, random)

    def _keep(self, index: int, sample: dict[str, Any]) -> None:
        size = sum(value.nbytes for value in sample.values() if isinstance(value, Tensor | np.ndarray))
        if size <= self.room:
            self.kept[index] = sample
            self.room -= size

    def _raw(self, index: int) -> Sample:
        if not self.lazy:
            return self.source[index]
        source: Any = self.source
        before, source.lazy = source.lazy, True
        try:
            return source[index]
        finally:
            source.lazy = before

    def _put(self, view: Tensor, row: int, value: Any, name: str, index: int) -> None:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, Tensor) and value.shape != view.shape[1:]:
            raise ValueError(
                f"{name} of sample {index} ({self.source.name(index)}) has shape {tuple(value.shape)}, the first one's was {tuple(view.shape[1:])}: "
                "an augmentation gives every sample one shape, or names the field in its `ragged`"
            )
        view[row] = value


def _hopeless(bad: list[tuple[str, str]]) -> DataError:
    listed = "\n".join(f"  {name}: {why}" for name, why in bad[-10:])
    return DataError(f"{ATTEMPTS} samples in a row could not be read; the last ones:\n{listed}")


class BadSamples:
    """Counts the bad samples that this rank has met by name, says each once, and gives up when there are too many."""

    def __init__(self, limit: int, split: str) -> None:
        self.limit, self.split = limit, split
        self.found: dict[str, str] = {}

    def note(self, bad: list[tuple[str, str]]) -> None:
        for name, why in bad:
            if name in self.found:
                continue
            self.found[name] = why
            logger.warning("bad %s sample %d: %s: %s", self.split, len(self.found), name, why)
            self._judge(self.found)

    def judge_together(self, of_ranks: Iterable[Mapping[str, str]]) -> None:
        """Give up where what all ranks have found is too much, though no rank has found so much alone. The same on every rank."""
        self._judge({name: why for found in of_ranks for name, why in found.items()})

    def _judge(self, found: Mapping[str, str]) -> None:
        if len(found) > self.limit:
            listed = "\n".join(f"  {name}: {why}" for name, why in found.items())
            number = f"{len(found)} bad {self.split} sample{'s' if self.limit else ''}"
            raise DataError(
                f"{number}, more than dataset.max_bad_samples={self.limit} allows:\n{listed}\n"
                "    try: mend or remove them (python -m trainer describe-data lists all that are bad), or a higher dataset.max_bad_samples"
            )


def assemble(views: dict[str, Tensor], parts: list[Filled], draw: Draw) -> Batch | None:
    """The batch in a block, filled by parts in the order of their rows. None where nothing of what was drawn could be read."""
    count = sum(part.count for part in parts)
    if count == 0:
        return None
    batch: Batch = {}
    if count == len(draw.index):
        batch.update((name, view[:count]) for name, view in views.items())
    else:
        rows = torch.cat([torch.arange(part.first, part.first + part.count) for part in parts])
        batch.update((name, view[rows]) for name, view in views.items())
    for part in parts:
        for name, values in part.extra.items():
            batch.setdefault(name, []).extend(torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values)
    batch["count"] = min(count, draw.count)  # 0 where one sample stands in for an empty micro-batch
    return batch
