"""Everything that cannot work between the parts of a run, found before torch is imported and before anything is queued.

A rule is a function of the run that yields problems. What concerns one part alone is that part's `problems()`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.augmentation_rules import listed_words, mixing, order, task_and_augmentation
from trainer.config import DatasetConfig, Facts, ModelConfig, RunConfig, stage_runs
from trainer.config.fields import MISSING, field_problems
from trainer.config.schemas import schemas
from trainer.config.stages import in_stage, length_problems
from trainer.errors import ConfigError, Problem
from trainer.surroundings import num_ranks, surroundings, visible_gpus

Rule = Callable[[RunConfig, Facts], Iterator[Problem]]

_WANDB_ID = re.compile(r"[^/\\#?%:]{1,128}")  # what W&B accepts as the name of a project or the id of a run


def validate(run: RunConfig) -> None:
    """Raise a ConfigError with every problem of the run, if it has any."""
    problems = list(problems_of(run))
    if problems:
        raise ConfigError(*problems)


def problems_of(run: RunConfig, *, trains: bool = True) -> Iterator[Problem]:
    """Every problem of the run: of its fields, of its parts, and between them. `trains=False`: it only looks at data."""
    bad_fields = list(field_problems(run))
    yield from bad_fields
    if any(p.value == MISSING for p in bad_fields):
        return  # a rule would meet "???" where it expects a number
    facts, bad_data = _facts(run.dataset)
    yield from bad_data
    rules = RULES if facts is None else (*RULES, *RULES_ON_DATA)
    for rule in rules if trains else (rule for rule in rules if rule not in RULES_OF_TRAINING):
        # A value out of its range has been told; that a rule stumbles over it is no news.
        with suppress(*([Exception] if bad_fields else [])):
            yield from rule(run, facts or Facts())


def problems_of_data(dataset: DatasetConfig) -> Iterator[Problem]:
    """What is wrong with the data themselves, whatever is to be done with them."""
    bad_fields = list(field_problems(dataset, "dataset"))
    yield from bad_fields
    if not any(p.value == MISSING for p in bad_fields):
        yield from _facts(dataset)[1]


def _facts(dataset: DatasetConfig) -> tuple[Facts | None, list[Problem]]:
    """What is known of the data, or what is wrong with them."""
    problems = list(dataset.problems())
    try:
        facts = dataset.facts()
        return (None if problems and not facts.num_train else facts), problems  # of no data, no more need be said
    except OSError as error:
        where = error.filename or dataset.path
        return None, problems or [Problem("dataset.path", where, error.strerror or str(error), "dataset.path=/path/to/data")]
    except Exception:
        if not problems:
            raise
        return None, problems  # what is wrong has been said


# Rules that need no look at the data


def parts(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """What every part finds wrong with itself."""
    yield from run.model.problems("model", run.dataset.image_size)
    for part in (run, run.augmentation, run.optimizer, run.scheduler, run.loop):
        yield from part.problems()


def task_and_dataset(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """The samples hold what the task learns from."""
    lacking = run.task.needs - run.dataset.offers
    if lacking:
        fitting = [name for name, kind in schemas("dataset").items() if run.task.needs <= _offers(kind)]
        embedded = [name for name in fitting if not schemas("dataset")[name].on_disk]
        reason = (
            f"its samples have no {listed_words(lacking)}, which the task learns from; {listed_words(fitting) or 'no dataset'} would do"
        )
        yield Problem("dataset", type(run.dataset).__name__, reason, f"dataset={[*embedded, *fitting][0]}" if fitting else "")
    if run.dataset.class_balanced and "label" not in run.dataset.offers:
        yield Problem("dataset.class_balanced", True, "there are no labels to balance", "dataset.class_balanced=false")


def task_and_model(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """The network can do what the task asks of it."""
    lacking = run.task.asks - run.model.offers
    if lacking:
        fitting = [name for name, kind in schemas("model").items() if run.task.asks <= _offers(kind)]
        yield Problem(
            "model",
            type(run.model).__name__,
            f"offers no {listed_words(lacking)}, which the task asks for",
            f"model={fitting[0]}" if fitting else "",
        )


def ranks(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """The batch can be cut up, and the number of ranks is the one that surrounds the process."""
    here, asked = surroundings(), run.distributed.processes
    if here.size > 1 and asked not in (None, 1, here.size):  # 1: none but those that are there
        yield Problem(
            "distributed.processes", asked, f"{here.launcher} has started {here.size} processes already", "distributed.processes=null"
        )
    count, size = num_ranks(run.distributed), run.loop.batch_size
    pieces = count * run.loop.accumulate
    if size % pieces:
        how = " x ".join(
            text for n, text in ((count, f"{count} ranks"), (run.loop.accumulate, f"{run.loop.accumulate} micro-batches")) if n > 1
        )
        near = max(pieces, round(size / pieces) * pieces)
        yield Problem("loop.batch_size", size, f"must be a multiple of {pieces}, to be cut up evenly into {how}", f"loop.batch_size={near}")
    if run.loop.sync_batchnorm and count > 1 and not visible_gpus():
        yield Problem("loop.sync_batchnorm", True, "torch synchronises batch statistics on GPUs only", "loop.sync_batchnorm=false")


def names(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """Texts that others will read: metric names, weights to start from, W&B's ids."""
    metric = run.loop.best_metric
    if metric is not None and not metric.startswith("val/") and metric != "train/loss":
        yield Problem(
            "loop.best_metric",
            metric,
            "must be a validation metric, as val/top1, or train/loss",
            f"loop.best_metric=val/{metric.rpartition('/')[2]}",
        )
    start = run.init_from
    if start is not None and start != "timm:pretrained" and not Path(start).expanduser().exists():
        yield Problem("init_from", start, "no such file or directory", "init_from=<run directory | file | timm:pretrained>")
    wandb = run.logger.wandb
    for name in ("project", "resume_id"):
        value = getattr(wandb, name)
        if value is not None and not _WANDB_ID.fullmatch(value):
            key, clean = f"logger.wandb.{name}", re.sub(r"[^\w-]+", "-", value)[:128] or "null"
            yield Problem(key, value, "W&B takes 1 to 128 characters, none of / \\ # ? % :", f"{key}={clean}")
    for tag in wandb.tags:
        if not 1 <= len(tag) <= 64:
            yield Problem("logger.wandb.tags", tag, "a tag of W&B has 1 to 64 characters")


def stages(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """The stages make up the run, and each of them could be one."""
    yield from length_problems(run)
    for i, stage in enumerate(stage_runs(run) if run.loop.stages else ()):
        size = stage.dataset.image_size
        for problem in (*stage.model.problems("model", size), *mixing(stage, facts), *ranks(stage, facts)):
            told = in_stage(run, i, problem)
            if told is not None:
                yield told


RULES: tuple[Rule, ...] = (parts, task_and_dataset, order, task_and_model, task_and_augmentation, mixing, ranks, names, stages)


# Rules on what the dataset says about itself


def task(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """What the task finds wrong with the rest."""
    yield from run.task.problems(run)


def channels(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """One mean and one deviation for each channel, and a network that takes as many."""
    for name in ("mean", "std"):
        values = getattr(run.dataset, name)
        if len(values) not in (1, facts.channels):
            example = ",".join(f"{v:g}" for v in (values * facts.channels)[: facts.channels] or [0.5] * facts.channels)
            yield Problem(
                f"dataset.{name}", values, f"needs a value for each of the {facts.channels} channels", f"dataset.{name}=[{example}]"
            )
    yield from run.model.channel_problems(facts.channels)


def readers(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """A dataset that is divided among its readers has something for each."""
    problems_with = getattr(run.dataset, "reader_problems", None)
    if problems_with is not None:
        yield from problems_with(num_ranks(run.distributed))


def length(run: RunConfig, facts: Facts) -> Iterator[Problem]:
    """An epoch has at least one batch, and warm-up and cool-down fit into the run, or into each of its stages."""
    if facts.num_train is None:
        return
    if not run.loop.stages:
        yield from _length(run, facts.num_train)
        return
    parts, told, whole = stage_runs(run), set(), run.loop.stage_schedule == "whole"
    for i, stage in enumerate(parts):
        for problem in _length(stage, facts.num_train):
            shown = in_stage(run, i, problem) or dataclasses.replace(problem, reason=f"{problem.reason}, in stage {i + 1}")
            if shown.key not in told and not (whole and shown.key.startswith("scheduler.")):
                told.add(shown.key)
                yield shown
    if whole and not told:
        total = sum(stage.loop.num_epochs * steps_per_epoch(stage, facts.num_train) for stage in parts)
        yield from run.scheduler.length_problems(total, total / run.loop.num_epochs)


def _length(run: RunConfig, num_train: int) -> Iterator[Problem]:
    """Of one run, or of one stage."""
    steps = steps_per_epoch(run, num_train)
    if steps == 0:
        virtual = run.loop.samples_per_epoch
        if virtual is not None:
            yield Problem(
                "loop.samples_per_epoch",
                virtual,
                f"an epoch has less than one batch of {run.loop.batch_size} images",
                f"loop.samples_per_epoch={run.loop.batch_size}",
            )
        else:
            images = _pass_length(run, num_train)
            yield Problem(
                "loop.batch_size",
                run.loop.batch_size,
                f"is more than the {images} training images there are",
                f"loop.batch_size={1 << max(0, images.bit_length() - 1)}",
            )
        return
    total = run.loop.steps or run.loop.num_epochs * steps
    yield from run.scheduler.length_problems(total, steps)


RULES_ON_DATA: tuple[Rule, ...] = (task, channels, readers, length)

RULES_OF_TRAINING: tuple[Rule, ...] = (order, mixing, task_and_augmentation, ranks, stages, readers, length)
"""What is of no matter to a run whose weights are there already."""


def steps_per_epoch(run: RunConfig, num_train: int) -> int:
    """`trainer.data.order.Order.steps_per_epoch`, without numpy."""
    if run.debug.overfit:  # the first batch is all there is
        num_train = min(num_train, run.loop.batch_size)
    samples = run.loop.samples_per_epoch or _pass_length(run, num_train)
    whole, rest = divmod(samples, run.loop.batch_size)
    return whole + (rest > 0 and not (run.loop.drop_last and not run.debug.overfit))


def _pass_length(run: RunConfig, num_train: int) -> int:
    kept = num_train if run.dataset.train_fraction >= 1 else max(1, round(num_train * run.dataset.train_fraction))
    return kept * run.dataset.repeats


def _offers(kind: type[Any]) -> frozenset[str]:
    """What a schema says it offers; nothing where that depends on its settings."""
    assert issubclass(kind, DatasetConfig | ModelConfig)
    return kind.offers if isinstance(kind.offers, frozenset) else frozenset()
