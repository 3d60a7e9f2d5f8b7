"""A run in stages: what each changes, and the run that each is. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trainer.errors import Problem

if TYPE_CHECKING:
    from trainer.config.run import RunConfig

HOMES = {  # a stage's setting -> the run's that it stands in for
    "image_size": "dataset.image_size",
    "batch_size": "loop.batch_size",
    "accumulate": "loop.accumulate",
    "freeze_to": "loop.freeze_to",
    "mixup": "augmentation.mixup",
    "cutmix": "augmentation.cutmix",
    "data_fraction": "dataset.train_fraction",
    "lr_scale": "optimizer.lr",
    "epochs": "loop.epochs",
}


def stage_runs(run: RunConfig) -> list[RunConfig]:
    """Each stage as a run of its own length; the run itself where it has no stages."""
    return [_one(run, i) for i in range(len(run.loop.stages))] or [run]


def _one(run: RunConfig, i: int) -> RunConfig:
    stage, replace = run.loop.stages[i], dataclasses.replace
    optimizer: dict[str, Any] = {"lr": run.optimizer.lr * stage.lr_scale}
    if run.optimizer.backbone_lr is not None:
        optimizer["backbone_lr"] = run.optimizer.backbone_lr * stage.lr_scale
    return replace(
        run,
        dataset=replace(run.dataset, train_fraction=run.dataset.train_fraction * stage.data_fraction, **_set(stage, "image_size")),
        augmentation=replace(run.augmentation, **_set(stage, "mixup", "cutmix")),
        optimizer=replace(run.optimizer, **optimizer),
        loop=replace(run.loop, stages=[], epochs=stage.epochs, steps=None, **_set(stage, "batch_size", "accumulate", "freeze_to")),
    )


def _set(stage: Any, *names: str) -> dict[str, Any]:
    """What the stage says of these settings; what it does not say stays the run's."""
    return {name: getattr(stage, name) for name in names if getattr(stage, name) is not None}


def in_stage(run: RunConfig, i: int, problem: Problem) -> Problem | None:
    """A problem of stage `i` under the key that the user has typed; None where it is the whole run's and told there."""
    stage = run.loop.stages[i]
    defaults = {f.name: f.default for f in dataclasses.fields(stage)}
    for name, home in HOMES.items():
        if problem.key == home and getattr(stage, name) != defaults[name]:
            fix = problem.fix.replace(f"{home}=", f"{name}: ") if problem.fix.startswith(f"{home}=") else problem.fix
            return Problem(f"loop.stages[{i}].{name}", getattr(stage, name), problem.reason, fix)
    return None


def length_problems(run: RunConfig) -> Iterator[Problem]:
    """Stages that do not add up to the run they are said to be of."""
    loop = run.loop
    if not loop.stages:
        return
    total = sum(stage.epochs for stage in loop.stages)
    if loop.steps is not None:
        yield Problem("loop.steps", loop.steps, f"the stages make up {total} epochs: their length is the run's", "loop.steps=null")
    if loop.epochs is not None and loop.epochs != total:
        parts = " + ".join(str(stage.epochs) for stage in loop.stages)
        fix = f"loop.epochs={total}, other stages, or loop.stages=[] for none"
        yield Problem("loop.epochs", loop.epochs, f"the stages make up {parts} = {total} epochs", fix)
    if loop.stage_schedule == "whole" and len({(stage.batch_size, stage.data_fraction) for stage in loop.stages}) > 1:
        scheduler = run.scheduler
        for name in ("warmup_epochs", "cooldown_epochs", "decay_every", "milestones"):
            if value := getattr(scheduler, name, None):
                other = {"warmup_epochs": "warmup_steps", "cooldown_epochs": "cooldown_steps"}.get(name, f"{name}_steps")
                reason = "the stages' epochs differ in length, and loop.stage_schedule=whole is one schedule for all of them"
                yield Problem(f"scheduler.{name}", value, reason, f"scheduler.{other}=...")
    if run.debug.overfit:
        yield Problem("loop.stages", f"{len(loop.stages)} stages", "overfitting one batch has none", "loop.stages=[]")
