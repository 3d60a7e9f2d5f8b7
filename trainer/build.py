"""The parts of a run that follow from its config alone: data in their order, lengths, the task. No loop, no files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from trainer import models
from trainer.compiling import compile_in_place, regions
from trainer.config import RunConfig, stage_runs
from trainer.data.order import Order, shape_groups
from trainer.data.source import Source, Subset, aspect_ratios, fingerprints
from trainer.ema import Ema, Swa
from trainer.errors import ConfigError, Problem
from trainer.parts import freeze
from trainer.random import fold
from trainer.task import DataInfo, Task
from trainer.update import has_batch_statistics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Both splits, the order of the training one, and what follows from their sizes."""

    train: Source
    val: Source | None
    order: Order
    total_steps: int
    fingerprints: dict[str, str]  # of the whole splits

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def info(self) -> DataInfo:
        return DataInfo(
            num_train=len(self.train),
            num_val=len(self.val) if self.val is not None else 0,
            classes=tuple(self.train.classes),
            channels=self.train.channels,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )


def build_data(run: RunConfig) -> Data:
    """Open both splits and lay out the order of training.

    Raises:
        ConfigError: the data are missing or smaller than one batch.
        DataError: the index does not hold together.
    """
    train, val = run.dataset.build("train"), run.dataset.build("val")
    prints = fingerprints(train=train, val=val)
    if run.debug.overfit:
        first = _order(run, train).step_samples(0).index
        train = Subset(train, np.unique(first))
        val = train
    order = order_of(stage_runs(run)[0], train)
    return Data(train, val, order, run.loop.steps or run.loop.num_epochs * order.steps_per_epoch, prints)


def order_of(run: RunConfig, source: Source) -> Order:
    """The order of training on `source`. Raises ConfigError where there is less than a batch of it."""
    order = _order(run, source)
    if order.steps_per_epoch == 0:
        raise ConfigError(
            Problem(
                "loop.batch_size",
                run.loop.batch_size,
                f"is more than the {len(source)} training images there are",
                f"loop.batch_size={_power_below(len(source))}",
            )
        )
    return order


def _order(run: RunConfig, source: Source) -> Order:
    labels = source.labels() if run.dataset.class_balanced else None
    groups = None
    if run.dataset.shape_groups is not None:
        ratios = aspect_ratios(source)
        if ratios is None:
            reason = "the shapes of these images are not known before they are read"
            raise ConfigError(Problem("dataset.shape_groups", run.dataset.shape_groups, reason, "dataset.shape_groups=null"))
        groups = shape_groups(ratios, run.dataset.shape_groups)
    return Order(
        size=len(source),
        seed=run.seed,
        batch_size=run.loop.batch_size,
        drop_last=run.loop.drop_last and not run.debug.overfit,
        samples_per_epoch=run.loop.samples_per_epoch,
        repeats=run.dataset.repeats,
        labels=labels,
        groups=groups,
        fraction=run.dataset.train_fraction,
    )


def _power_below(n: int) -> int:
    return 1 << max(0, n.bit_length() - 1)


def build_task(run: RunConfig, data: Data, device: torch.device, world_size: int) -> Task:
    """The task on its device, with weights drawn from the run's seed alone."""
    torch.manual_seed(fold(run.seed, 0x1417))
    task = run.task.build(run, data.info())
    cut = [name for name, n in (("ranks", world_size), ("micro-batches", run.loop.accumulate)) if n > 1]
    if run.loop.sync_batchnorm and world_size > 1:
        if device.type != "cuda":
            raise ConfigError(
                Problem("loop.sync_batchnorm", True, "torch synchronises batch statistics on GPUs only", "loop.sync_batchnorm=false")
            )
        task = cast(Task, torch.nn.SyncBatchNorm.convert_sync_batchnorm(task))
        cut = [c for c in cut if c != "ranks"]
    freeze(task, run.loop)
    models.prepare(task, run.loop)
    if cut and has_batch_statistics(task):
        logger.warning(
            "this network has batch normalisation and the batch is cut up over %s: each part is normalised by its own statistics, so results "
            "differ from those of one process%s", " and ".join(cut), "; loop.sync_batchnorm=true mends it across ranks on GPUs" if "ranks" in cut else "",
        )  # fmt: skip
    task = task.to(device)
    if run.loop.compile:
        # Of a stage before this one nothing is called any more, but torch counts it: after eight compilations of one function it
        # would run the ninth uncompiled, with a word in the log.
        torch.compiler.reset()
        for part in task.compiled_parts():
            for module in (regions(part) if run.loop.compile_regions else ()) or (part,):
                compile_in_place(module, run.loop.compile_mode, fullgraph=run.loop.compile_fullgraph)
    return task


def build_average(run: RunConfig, data: Data, task: Task, epochs: float | None = None) -> Ema | None:
    """The average of the weights that the run keeps, if it keeps one. `epochs`: of the whole run, where its stages differ."""
    loop, epoch = run.loop, data.steps_per_epoch
    if loop.swa_start is not None:
        return Swa(task, round(loop.swa_start * data.total_steps), loop.swa_every or epoch)
    if loop.ema_decay is None:
        return None
    decay = loop.ema_decay
    if loop.ema_rescale:
        # torchvision's references, train.py: the share of the newest weights grows with the images of an update and falls with the epochs.
        decay = 1 - min(1.0, (1 - decay) * loop.batch_size * loop.ema_every / (epochs or data.total_steps / epoch))
    return Ema(task, decay, loop.ema_every)


def best_metric(run: RunConfig, task: Task) -> tuple[str, bool]:
    """The metric that decides `best`, and whether more of it is better."""
    metric = run.loop.best_metric or task.main_metric
    if run.loop.best_mode is not None:
        return metric, run.loop.best_mode == "max"
    if metric == task.main_metric:
        return metric, task.higher_is_better
    lower = ("loss", "error", "nmse", "entropy", "seconds")
    return metric, not any(word in metric for word in lower)
