"""A run in stages: where each begins and ends, and what passes from one to the next. A run without stages has one.

Between two stages everything is made anew (network, optimizer, loaders), and weights, averages and counts are carried over.
So a stage is resumed as a run is: made, and filled from the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from trainer import optim
from trainer.build import Data, build_average, build_task, order_of
from trainer.config import RunConfig, stage_runs
from trainer.distributed import World
from trainer.ema import Ema
from trainer.engine import Periods
from trainer.errors import ConfigError, Problem
from trainer.resample import resampled
from trainer.schedule import Later, Schedule
from trainer.state import TrainState
from trainer.task import Task


@dataclass(frozen=True)
class Stage:
    """One stretch of a run: optimizer steps [start, stop) of `total`."""

    number: int  # from 1
    count: int  # stages of the run
    whole: RunConfig
    run: RunConfig  # of this stage, as if it were a run of its own
    data: Data  # with this stage's order
    start: int
    stop: int
    first_epoch: int

    @property
    def labels(self) -> dict[str, float]:
        """What tells this stage's numbers from another's; empty where there is no other."""
        if self.count == 1:
            return {}
        return {"stage": self.number, "image_size": self.run.dataset.image_size, "batch_size": self.run.loop.batch_size}

    def __str__(self) -> str:
        loop, epochs = self.run.loop, self.run.loop.num_epochs
        words = [f"{epochs} epoch{'s' if epochs > 1 else ''}", f"{self.run.dataset.image_size} px", f"batches of {loop.batch_size}"]
        if loop.freeze_to is not None:
            words.append(f"frozen up to {loop.freeze_to}")
        return f"stage {self.number}/{self.count}: {', '.join(words)}"

    def periods(self) -> Periods:
        """When things are due, with periods in epochs turned into optimizer steps."""
        loop, epoch = self.run.loop, self.data.steps_per_epoch
        return Periods(
            total=self.data.total_steps,
            epoch=epoch,
            log=loop.log_every,
            validate=loop.validate_every_steps or (loop.validate_every or 0) * epoch,
            checkpoint=(loop.checkpoint_every or 0) * epoch,
            checkpoint_steps=loop.checkpoint_every_steps or 0,
            start=self.start,
            stop=self.stop,
            epochs_before=self.first_epoch,
        )

    def schedule(self) -> Schedule | Later:
        """The learning rate over the steps of the whole run."""
        run, steps = self.run, self.stop - self.start
        if self.count > 1 and self.whole.loop.stage_schedule == "whole":
            return run.scheduler.build(self.data.total_steps, self.data.total_steps / self.whole.loop.num_epochs)
        schedule = run.scheduler.build(steps, self.data.steps_per_epoch)
        return schedule if self.start == 0 else Later(schedule, self.start)

    def with_micro_batches(self, count: int) -> Stage:
        """The same stage, its batches cut up otherwise."""
        return dataclasses.replace(self, run=dataclasses.replace(self.run, loop=dataclasses.replace(self.run.loop, accumulate=count)))

    def portrait(self) -> RunConfig:
        """The config that rebuilds this stage's network from a lone checkpoint."""
        size = self.run.dataset.image_size
        return dataclasses.replace(self.whole, dataset=dataclasses.replace(self.whole.dataset, image_size=size))


def stages_of(run: RunConfig, data: Data) -> list[Stage]:
    """The stages of a run, over data that are open. Raises ConfigError where one has less than a batch."""
    runs, orders, step, epoch = stage_runs(run), [], 0, 0
    for part in runs:
        orders.append(dataclasses.replace(order_of(part, data.train), first_step=step, first_epoch=epoch))
        step, epoch = step + (part.loop.steps or part.loop.num_epochs * orders[-1].steps_per_epoch), epoch + part.loop.num_epochs
    ends = [*(order.first_step for order in orders[1:]), step]
    if run.loop.swa_start is not None and run.loop.swa_start * step < orders[-1].first_step:
        fix = f"loop.swa_start={orders[-1].first_step / step:.3g}"
        raise ConfigError(Problem("loop.swa_start", run.loop.swa_start, "lies before the last stage, of whose weights the average is", fix))
    return [
        Stage(
            i + 1, len(runs), run, part, dataclasses.replace(data, order=order, total_steps=step), order.first_step, end, order.first_epoch
        )
        for i, (part, order, end) in enumerate(zip(runs, orders, ends, strict=True))
    ]


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that a checkpoint of `step` belongs to. At a boundary that is the one before it: its state is still of that shape."""
    return next(stage for stage in stages if step <= stage.stop)


def begin(stage: Stage, world: World) -> TrainState:
    """A stage with fresh weights, drawn from the run's seed."""
    return fresh_state(stage, build_task(stage.run, stage.data, world.device, world.size))


def fresh_state(stage: Stage, task: Task) -> TrainState:
    """The state of a stage whose task has not been trained in it yet."""
    epochs = stage.whole.loop.num_epochs if stage.labels else None
    return build_state(stage.run, task, build_average(stage.run, stage.data, task, epochs), stage.data.total_steps)


def build_state(run: RunConfig, task: Task, average: Ema | None = None, total_steps: int = 1) -> TrainState:
    groups = optim.parameter_groups(task, run.optimizer, run.loop.batch_size, task.param_rules(), total_steps)
    device = next(task.parameters()).device
    return TrainState(
        task=task,
        optimizers=[run.optimizer.build(groups)],
        scaler=GradScaler(device.type) if run.precision.autocast == "float16" else None,
        ema=average,
    )


# --- from one stage to the next -----------------------------------------------------------------------------------------


def carry(old: TrainState, new: TrainState, before: Stage, after: Stage) -> None:
    """What passes to the next stage: weights and averages, fitted to its image size; counts; the best validation, where the
    two stages validate at one size: figures of different sizes do not compare. The optimizer only under one schedule."""
    key = f"loop.stages[{after.number - 1}].image_size"
    hidden = tuple(f"{name}." for name in new.task.never_trained())
    own, weights = new.task.state_dict(), old.task.state_dict()
    new.task.load_state_dict(
        {
            name: _fitted(new.task, name, weights[name], tensor, key)
            for name, tensor in own.items()
            if not (hidden and name.startswith(hidden))
        },
        strict=not hidden,
    )
    if new.ema is not None:
        new.ema.restart()
        if old.ema is not None:
            averages = old.ema.state_dict()
            with torch.no_grad():
                for name, average in new.ema.state_dict().items():
                    if name in averages:  # what trains only from now on has no average yet
                        average.copy_(_fitted(new.task, name, averages[name], average, key))
    if before.whole.loop.stage_schedule == "whole":
        for mine, theirs in zip(new.optimizers, old.optimizers, strict=True):
            carry_optimizer(mine, theirs, _names(new.task), _names(old.task))
    if new.scaler and old.scaler:
        new.scaler.load_state_dict(old.scaler.state_dict())
    new.scale_rates(old.lr_factor)
    for name in ("step", "samples", "seconds", "skipped", "validated", "history"):
        setattr(new, name, getattr(old, name))
    new.best = old.best if before.run.dataset.image_size == after.run.dataset.image_size else None


def _fitted(module: nn.Module, name: str, theirs: Tensor, own: Tensor, key: str) -> Tensor:
    if theirs.shape == own.shape:
        return theirs
    fitted = resampled(module, name, theirs, own)
    if fitted is None:
        reason = f"{name} is {tuple(theirs.shape)} at the size before and {tuple(own.shape)} at this one, and nothing says how to fit it"
        raise ConfigError(Problem(key, "", reason, "one image size for all stages"))
    return fitted


def carry_optimizer(new: Optimizer, old: Optimizer, new_names: Mapping[int, str], old_names: Mapping[int, str]) -> None:
    """The state of each parameter that both have, in the same shape."""
    state: dict[int, Any] = old.state_dict()["state"]  # by place
    known = {old_names[id(p)]: (p, state[i]) for i, p in enumerate(_parameters(old)) if i in state}
    places = {new_names[id(p)]: (i, p) for i, p in enumerate(_parameters(new))}
    kept = {i: known[name][1] for name, (i, p) in places.items() if name in known and known[name][0].shape == p.shape}
    new.load_state_dict({**new.state_dict(), "state": kept})


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _names(module: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in module.named_parameters()}
