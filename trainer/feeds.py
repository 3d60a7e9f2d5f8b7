"""What feeds the engine: the loaders of training, validation and reference images, as a run's config wants them."""

from __future__ import annotations

from collections.abc import Iterable

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
    cfg, classes = run.dataset, len(data.train.classes) or None
    workers = worker_count(cfg.num_workers, world.local_size, world.device)
    shared = {
        "workers": workers, "prefetch": cfg.prefetch, "timeout": cfg.worker_timeout, "max_bad_samples": cfg.max_bad_samples, "num_classes": classes,
    }  # fmt: skip
    augmentation = task.augmentation(train=True) or run.augmentation.build(cfg, train=not run.debug.overfit)
    batches = train_loader(data.train, augmentation, data.order, world, accumulate=run.loop.accumulate, start_step=step, **shared)
    if data.val is None or len(data.val) == 0:
        return batches, None, None
    size = max(1, run.loop.batch_size // (world.size * run.loop.accumulate))

    def once(source: Source, max_batches: int | None) -> Iterable[Batch]:
        as_is = task.augmentation(train=False) or run.augmentation.build(cfg, train=False)
        return validation_loader(source, as_is, world, seed=run.seed, batch_size=size, max_batches=max_batches, **shared)

    validation = once(data.val, run.loop.max_validation_batches)
    known = data.train
    streamed = hasattr(known, "divide")  # read front to back, so that nobody can ask for some of it
    if streamed or not isinstance(task.evaluator(), ComparesWithTraining):
        return batches, validation, None
    if run.loop.max_reference_images is not None and run.loop.max_reference_images < len(known):
        known = Subset(known, spread(len(known), run.loop.max_reference_images))
    return batches, validation, once(known, None)


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
