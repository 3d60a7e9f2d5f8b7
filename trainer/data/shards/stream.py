"""Shards read from front to back by webdataset's own pipeline, for places that have no random access.

A run on a stream is not exactly resumable: which sample comes next depends on who reads, and after a stop reading begins
anew. Every rank still takes the same number of steps, because a stream never ends: a reader whose shards are used up shuffles
them again. Validation reads every sample exactly once.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import random
import weakref
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from trainer.data.images import decode, open_image
from trainer.data.shards.index import IMAGES
from trainer.data.shards.source import extras, read_mask
from trainer.data.shards.store import open_stream
from trainer.data.source import BadSample, Sample
from trainer.errors import ConfigError, DataError, Problem

logger = logging.getLogger(__name__)

Found = dict[str, Any] | BadSample  # a sample's files as bytes, by their endings


class StreamSource:
    """A map-style face on a stream: in training, the index asked for says only that one more sample is wanted.

    Args:
        length: samples of an epoch.
        lengths: samples of each shard, where an info file says so; a shard that ends early is then noticed.
        buffer: samples a reader shuffles among.
    """

    channels = 3

    def __init__(
        self,
        places: Sequence[str],
        classes: Sequence[str],
        split: str,
        *,
        length: int,
        lengths: Sequence[int] | None,
        buffer: int,
        seed: int,
    ) -> None:
        self.places, self.classes, self.train = tuple(places), tuple(classes), split == "train"
        self.length, self.lengths, self.buffer, self.seed = length, lengths, buffer, seed
        self.fingerprint = f"stream of {len(places)} shards, {length} samples, {places[0]}"
        self.first, self.own, self.readers = 0, 1, 1  # this rank's first reader, how many it has, and all ranks together
        self._forget()

    def _forget(self) -> None:
        self._started = multiprocessing.Value("i", 0)  # readers of this rank so far; shared by workers that are forked from here
        self._process, self._position = -1, 0
        self._stream: Generator[Found] = _nothing()
        self._close = weakref.finalize(self, self._stream.close)

    def _read(self, stream: Generator[Found]) -> None:
        """Begin to read; what was read so far is closed now, and this one at the latest with the source."""
        self._close()
        self._stream, self._position = stream, 0
        self._close = weakref.finalize(self, stream.close)  # the stream must not refer to the source, or neither would ever end

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def most_readers(self, ranks: int) -> int:
        """Workers that each of `ranks` ranks can have, as no two may read one shard."""
        return len(self.places) // ranks

    def divide(self, rank: int, ranks: int, workers: int) -> None:
        """Tell the source who will read it, before anyone does.

        Raises:
            ConfigError: there are fewer shards than readers, so some would have nothing to read.
        """
        each = max(workers, 1)
        if self.train and len(self.places) < ranks * each:
            raise ConfigError(
                Problem(
                    "dataset.num_workers",
                    workers,
                    f"{ranks} ranks x {each} readers are more than the {len(self.places)} training shards, and in streaming no two may read one",
                    f"dataset.num_workers={self.most_readers(ranks)}, or smaller shards",
                )
            )
        if self.train and rank == 0:
            logger.warning("dataset.streaming=true: this run is not exactly resumable; after a stop, reading begins with other samples")
        self.first, self.own, self.readers = rank * each, each, ranks * each
        self._started.value = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self._process != os.getpid():  # a worker that was forked: it has a reader of its own
            self._process = os.getpid()
            with self._started.get_lock():
                number = self._started.value % self.own
                self._started.value += 1
            if self.train:
                self._read(_endless(self.places, self.lengths, self.first + number, self.readers, self.buffer, self.seed))
            else:
                self._position = 0
        found = next(self._stream) if self.train else self._validation(index)
        if isinstance(found, BadSample):
            raise found
        return self._sample(found, self.name(index))

    def _validation(self, index: int) -> Found:
        """The sample of that number, counted over all shards in order. Readers ask in ascending order, so each reads through once."""
        if index < self._position or self._position == 0:
            self._read(_samples(self.places, self.lengths, range(len(self.places))))
        for found in self._stream:
            self._position += 1
            if self._position == index + 1:
                return found
        count, self._position = self._position, 0
        raise DataError(f"the shards end after {count} samples, but {self.length} are announced: dataset.val_size={count}")

    def _sample(self, found: dict[str, Any], name: str) -> Sample:
        name = f"{found.get('__url__', '')}:{found.get('__key__', name)}"
        field = next((f for f in IMAGES if f in found and f != "npy"), None)
        if field is None:
            raise BadSample(name, f"has no image; its files end in {', '.join(k for k in found if not k.startswith('__'))}")
        image = decode(open_image(found[field], name), name)
        try:
            described = json.loads(found["json"]) if "json" in found else {}
            label = int(found["cls"]) if "cls" in found else described.get("label")
        except ValueError as error:
            raise BadSample(name, f"cannot be read: {error}") from None
        sample: Sample = {"image": image, **extras(described)}
        if label is not None:
            if not 0 <= label < len(self.classes):
                raise BadSample(name, f"is of class {label}, but the class file names {len(self.classes)}")
            sample["label"] = label
        if "mask.png" in found:
            sample["mask"] = read_mask(found["mask.png"], name, image.size)
        return sample

    def name(self, index: int) -> str:
        return f"{self.places[0]} … (stream)"

    def labels(self) -> None:
        return None  # not known before they are read


def _nothing() -> Generator[Found]:
    yield from ()


def _endless(places: Sequence[str], lengths: Sequence[int] | None, reader: int, readers: int, buffer: int, seed: int) -> Generator[Found]:
    """One reader's share of the shards, over and over, in another order each time."""
    from webdataset.filters import shuffle

    for epoch in itertools.count():
        shards = np.random.default_rng((seed, epoch)).permutation(len(places))[reader::readers]
        shuffled = shuffle(buffer, initial=min(buffer, 1000), rng=random.Random(hash((seed, epoch, reader))))
        count = 0
        for found in shuffled(_samples(places, lengths, shards.tolist())):
            count += 1
            yield found
        if not count:
            raise DataError(f"no sample in {', '.join([places[int(i)] for i in shards[:5]]) or 'no shard'}")


def _samples(places: Sequence[str], lengths: Sequence[int] | None, shards: Sequence[int]) -> Generator[Found]:
    """Samples as bytes by field, by webdataset's expander and grouping. A shard that breaks is one bad sample."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for shard in shards:
        place, count = places[shard], 0
        try:
            with open_stream(place) as stream:
                for sample in group_by_keys(tar_file_expander([{"url": place, "stream": stream}])):
                    count += 1
                    yield sample
        except Exception as error:  # what the network, the tar file and webdataset raise
            yield BadSample(place, f"ends after {count} samples: {error}")
            continue
        if lengths is not None and count != lengths[shard]:
            yield BadSample(place, f"holds {count} samples, its info file says {lengths[shard]}: it was cut short")
