"""What feeds the engine: the loaders of training, validation and reference images, as a run's config wants them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from trainer.build import Data
from trainer.config import RunConfig
from trainer.data.loader import Loader, train_loader, validation_loader, worker_count
from trainer.data.source import Source, Subset
from trainer.distributed import World
from trainer.task import Batch, ComparesWithTraining, Task


def loaders(
    run: RunConfig, data: Data, task: Task, world: World, step: int
) -> tuple[Iterable[Batch], Iterable[Batch] | None, Iterable[Batch] | None]:
    """Training micro-batches from optimizer step `step` on; the validation set, if there is one; and the training set as
    validation sees it, where the task's evaluator compares with it."""
    augmentation = task.augmentation(train=True) or run.augmentation.build(run.dataset, train=not run.debug.overfit)
    batches = train_loader(
        data.train, augmentation, data.order, world, accumulate=run.loop.accumulate, start_step=step,
        num_classes=len(data.train.classes) or None, **_reading(run, world, data.train),
    )  # fmt: skip
    if data.val is None or len(data.val) == 0:
        return batches, None, None
    validation = as_validated(run, task, data.val, world, run.loop.max_validation_batches)
    wanted = isinstance(task.evaluator(), ComparesWithTraining)
    return batches, validation, reference(run, task, data.train, world) if wanted else None


def as_validated(run: RunConfig, task: Task, source: Source, world: World, max_batches: int | None = None) -> Loader:
    """Every sample of `source` once over all ranks, as validation sees it."""
    return validation_loader(
        source, task.augmentation(train=False) or run.augmentation.build(run.dataset, train=False), world, seed=run.seed,
        batch_size=share_of(run, world), max_batches=max_batches, num_classes=len(source.classes) or None, **_reading(run, world),
    )  # fmt: skip


def reference(run: RunConfig, task: Task, known: Source, world: World) -> Loader | None:
    """What an evaluator compares with; None where the data are read front to back, so that nobody can ask for some of it."""
    if hasattr(known, "divide"):
        return None
    most = run.loop.max_reference_images
    return as_validated(run, task, known if most is None or most >= len(known) else Subset(known, spread(len(known), most)), world)


def share_of(run: RunConfig, world: World) -> int:
    """Images of a rank's batch."""
    return max(1, run.loop.batch_size // (world.size * run.loop.accumulate))


def _reading(run: RunConfig, world: World, divided: Source | None = None) -> dict[str, Any]:
    """How any loader of this run reads. `divided`: a source whose readers each need a part of their own, if it is such a one."""
    cfg = run.dataset
    workers = worker_count(cfg.num_workers, world.local_size, world.device)
    most_readers = getattr(divided, "most_readers", None)
    if most_readers is not None and cfg.num_workers == "auto":  # a number that a user wrote was checked before the run
        workers = min(workers, most_readers(world.size))
    return {
        "workers": workers, "prefetch": cfg.prefetch, "timeout": cfg.worker_timeout, "max_bad_samples": cfg.max_bad_samples,
        "keep": cfg.keep_mb * 1_000_000,
    }  # fmt: skip


def spread(size: int, count: int) -> np.ndarray:
    """`count` places, evenly over 0 … size - 1, [count] int64: folders are sorted by class, so the first would be of few."""
    return np.arange(count, dtype=np.int64) * size // count


def close(sets: Iterable[Iterable[Batch] | None]) -> None:
    """End the loaders' workers."""
    for loader in sets:
        if isinstance(loader, Loader):
            loader.close()


def describe(data: Data, step: int) -> str:
    """The samples of a step, for a message."""
    indices = data.order.step_samples(step).index[:8].tolist()
    return f"That batch begins with {', '.join(data.train.name(i) for i in indices)}"
