"""From samples on disk to batches on the device, in the order that `Order` lays down. It knows no task.

A batch is a function of (seed, step, rank) alone: reading with workers or without, resuming, and bad samples on the way
change nothing in it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from trainer.data.device import OnCpu, OnCuda, Placed, Taken, pin
from trainer.data.order import Draw, Order
from trainer.data.reading import BadSamples, Layout, Reading, assemble
from trainer.data.workers import Pool, part_size
from trainer.random import sample_keys

if TYPE_CHECKING:
    from trainer.data.augment import Augmentation
    from trainer.data.source import Source
    from trainer.task import Batch

VALIDATION = -1  # the epoch that the keys of validation samples belong to
TIMEOUT = 300.0  # seconds; network file systems do pause for minutes
MOST_WORKERS = 16  # per rank, chosen by "auto"; more rarely help and each costs memory


class Ranks(Protocol):
    """What the loader needs to know of the world."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


def train_loader(
    source: Source,
    augmentation: Augmentation,
    order: Order,
    world: Ranks,
    *,
    accumulate: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    device: torch.device | None = None,
    start_step: int = 0,
    max_bad_samples: int = 100,
    num_classes: int | None = None,
    timeout: float = TIMEOUT,
    keep: int = 0,
) -> Loader:
    """This rank's micro-batches from optimizer step `start_step` on, without end."""
    divide = getattr(source, "divide", None)
    if divide is not None:  # a stream of shards is told who will read it
        divide(world.rank, world.size, workers)
    reading = Reading(source, augmentation, rows=order.rows, replace=True, keep=keep)
    rows = ceil(ceil(order.batch_size / world.size) / accumulate) + 1  # a cut may fall one to the right

    def draws() -> Iterator[Draw]:
        for step in count(start_step):
            yield from order.share(step, world.rank, world.size, accumulate)

    augmentation.num_classes = num_classes
    bad = BadSamples(max_bad_samples, "training")
    return Loader(draws, reading, augmentation, bad, device or world.device, rows=rows, workers=workers, prefetch=prefetch, timeout=timeout)


def validation_loader(
    source: Source,
    augmentation: Augmentation,
    world: Ranks,
    *,
    batch_size: int,
    workers: int = 0,
    prefetch: int = 2,
    device: torch.device | None = None,
    max_bad_samples: int = 100,
    num_classes: int | None = None,
    seed: int = 0,
    max_batches: int | None = None,
    timeout: float = TIMEOUT,
    keep: int = 0,
) -> Loader:
    """Every sample exactly once over all ranks, in batches of `batch_size` per rank; bad ones are left out."""
    size = len(source)

    def draws() -> Iterator[Draw]:
        for first in list(range(world.rank, size, batch_size * world.size))[:max_batches]:
            index = np.arange(first, min(first + batch_size * world.size, size), world.size, dtype=np.int64)
            zeros = np.zeros_like(index)
            yield Draw(0, index, zeros, sample_keys(seed, VALIDATION, index, zeros), len(index))

    augmentation.num_classes = num_classes
    reading = Reading(source, augmentation, replace=False, keep=keep)
    bad = BadSamples(max_bad_samples, "validation")
    loader = Loader(
        draws,
        reading,
        augmentation,
        bad,
        device or world.device,
        rows=min(batch_size, size),
        workers=workers,
        prefetch=prefetch,
        timeout=timeout,
    )
    loader.rounds = len(range(0, size, batch_size * world.size)[:max_batches])
    return loader


class Loader:
    """Batches on the device, ready for the network, each with `key`, `index` and `count`, the number of real samples in it.

    Each `iter()` begins anew. Workers are started by the first and live until `close()` or the end of the process.
    """

    rounds: int | None = None  # batches of the rank that has most; None = endless

    def __init__(
        self,
        draws: Callable[[], Iterator[Draw]],
        reading: Reading,
        augmentation: Augmentation,
        bad: BadSamples,
        device: torch.device,
        *,
        rows: int,
        workers: int,
        prefetch: int,
        timeout: float,
    ) -> None:
        self.draws, self.reading, self.augmentation, self.bad, self.device = draws, reading, augmentation, bad, device
        self.rows, self.workers, self.timeout = rows, workers, timeout
        parts = ceil(rows / part_size(rows, workers)) if workers else 1  # that the pool cuts a batch into
        self.ahead = max(2, ceil(workers * prefetch / parts))  # batches, so that each worker has `prefetch` parts to do
        self.layout: Layout | None = None
        self.pool: Pool | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.layout is None:
            self.layout = self._learn_layout()
            if self.layout is None:  # not one good sample
                return
        draws = self.draws()
        if self.workers and self.pool is None:
            blocks = self.ahead + (2 if self.device.type == "cuda" else 1)  # one in use, one still being copied from
            self.pool = Pool(self.reading, self.layout, self.workers, blocks, self.timeout)
            if self.device.type == "cuda":
                pin(self.pool)
        feed = Inline(self.reading, self.layout, draws, self.device) if self.pool is None else Pooled(self.pool, draws, self.ahead)
        try:
            yield from self._batches(feed)
        except GeneratorExit:
            raise
        except BaseException:  # what is in flight is not accounted for any more
            self.close()
            raise
        finally:
            feed.abandon()

    def _batches(self, feed: Inline | Pooled) -> Iterator[Batch]:
        place = OnCuda(self.augmentation, self.device) if self.device.type == "cuda" else OnCpu(self.augmentation)
        placed: deque[Placed] = deque()
        while True:
            # One batch is copied ahead of its turn, but never waited for while another is there to be worked on.
            while not placed or (place.looks_ahead and len(placed) < 2 and feed.is_ready()):
                place.reclaim(wait=feed.is_starved())
                taken = feed.take()
                if taken is None:
                    break
                self.bad.note([entry for part in taken.parts for entry in part.bad])
                batch = assemble(taken.views, taken.parts, taken.draw)
                if batch is None:
                    taken.release()
                else:
                    placed.append(place.take_in(batch, taken))
                feed.top_up()
            if not placed:
                return
            yield place.hand_over(placed.popleft())

    def _learn_layout(self) -> Layout | None:
        for draw in self.draws():
            for index, key in zip(draw.index.tolist(), draw.key.tolist(), strict=True):
                bad: list[tuple[str, str]] = []
                found = self.reading.read(index, key, draw.epoch, bad)
                self.bad.note(bad)
                if found is not None:
                    return self.reading.layout(found[1], self.rows)
        return None

    def close(self) -> None:
        """End the workers. Iterating again starts new ones."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None


class Inline:
    """Reads in this process, when asked."""

    def __init__(self, reading: Reading, layout: Layout, draws: Iterator[Draw], device: torch.device) -> None:
        self.reading, self.layout, self.draws = reading, layout, draws
        self.pinned = device.type == "cuda"

    def is_ready(self) -> bool:
        return False

    def is_starved(self) -> bool:
        return False

    def top_up(self) -> None:
        pass

    def take(self) -> Taken | None:
        draw = next(self.draws, None)
        if draw is None:
            return None
        views = self.layout.views(torch.empty(self.layout.bytes, dtype=torch.uint8, pin_memory=self.pinned))
        rows = len(draw.index)
        views["index"][:rows], views["key"][:rows] = torch.from_numpy(draw.index), torch.from_numpy(draw.key)
        return Taken(draw, views, [self.reading.fill(views, 0, rows, draw.epoch)], lambda: None)

    def abandon(self) -> None:
        pass


class Pooled:
    """Keeps the workers of a pool busy with what comes next."""

    def __init__(self, pool: Pool, draws: Iterator[Draw], ahead: int) -> None:
        self.pool, self.draws, self.ahead = pool, draws, ahead
        self.pending: deque[tuple[int, Draw]] = deque()
        self.top_up()

    def top_up(self) -> None:
        while self.pool.free and len(self.pending) < self.ahead:
            draw = next(self.draws, None)
            if draw is None:
                return
            self.pending.append((self.pool.submit(draw.index, draw.key, draw.epoch), draw))

    def is_ready(self) -> bool:
        return bool(self.pending) and self.pool.is_ready(self.pending[0][0])

    def is_starved(self) -> bool:
        """Whether there is nothing to wait for until a block is released."""
        return not self.pending and not self.pool.free

    def take(self) -> Taken | None:
        self.top_up()
        if not self.pending:
            return None
        number, draw = self.pending.popleft()
        block, parts = self.pool.collect(number)
        return Taken(draw, self.pool.views[block], parts, lambda: self.pool.release(block))

    def abandon(self) -> None:
        """Leave the pool as it was found. What is being read already has to be waited for."""
        while self.pending and not self.pool.is_closed:
            self.pool.forget(self.pending.popleft()[0])


def worker_count(setting: int | str, local_world_size: int, device: torch.device | None = None) -> int:
    """Processes that load data for one rank. "auto" shares this host's cores among its ranks, one left to each rank itself;
    on a CPU, where the network needs the cores too, half of the rest."""
    if setting != "auto":
        return int(setting)
    spare = available_cores() // local_world_size - 1
    if device is not None and device.type == "cpu":
        spare //= 2
    return min(max(spare, 0), MOST_WORKERS)


def available_cores() -> int:
    """Cores that this process may use: of the machine, the scheduler's mask and the container's quota, the least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()  # "200000 100000" or "max 100000"
        cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores
