"""Which learning rate? A sweep of exponentially rising rates over real optimizer updates, before the run (arXiv:1506.01186, sec. 3.3).

It trains as the run would: its precision, its micro-batches, its ranks, its own optimizer. Then everything is put back, so a run
after a sweep is, bit for bit, the run without one.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trainer.config import RunConfig
from trainer.distributed import World
from trainer.engine import Engine, Periods
from trainer.errors import ConfigError, Problem
from trainer.feeds import close, loaders
from trainer.lr_curve import WORDS, Sweep
from trainer.stages import Stage, fresh_state
from trainer.state import TrainState

FEWEST = 10  # steps a curve needs to be read


@dataclass
class Rising:
    """Rates from `start` to `end` in `steps` steps, as factors on the peak. The optimizer keeps its momentum."""

    start: float
    end: float
    steps: int
    peak: float

    def rate(self, step: int) -> float:
        return self.start * (self.end / self.start) ** (step / max(1, self.steps - 1))

    def factor(self, step: int) -> float:
        return self.rate(step) / self.peak

    def momentum(self, step: int) -> float | None:
        return None


@dataclass
class Listener:
    """What the engine reports to during a sweep (`engine.Reporter`). Losses come all-reduced, so all ranks stop at one step."""

    schedule: Rising
    heartbeat: Callable[[], None]
    sweep: Sweep = field(default_factory=Sweep)
    diverged: bool = False

    def logged(self, scalars: dict[str, float]) -> None:
        self.diverged = self.sweep.add(self.schedule.rate(len(self.sweep.rates)), scalars["train/loss"])

    def validated(self, scores: dict[str, float]) -> None: ...

    def pictures(self, pictures: Mapping[str, Tensor]) -> None: ...

    def save(self) -> None: ...

    def tick(self) -> None:
        self.heartbeat()


def sweep(
    stage: Stage, state: TrainState, world: World, poll: Callable[[int], int], heartbeat: Callable[[], None] = lambda: None
) -> tuple[Sweep, TrainState, int]:
    """Sweep the learning rate from `state`, which has not been trained yet. Collective.

    Returns the curve, the state to begin with, equal to the one that came, and the reason to stop, if there is one.
    """
    run, loop = stage.run, stage.run.loop
    peak = run.optimizer.scaled_lr(loop.batch_size)
    schedule = Rising(loop.lr_finder_start, loop.lr_finder_end, loop.lr_finder_steps, peak)
    listener = Listener(schedule, heartbeat)
    periods = Periods(total=loop.lr_finder_steps, epoch=stage.data.steps_per_epoch, log=1, validate=0, checkpoint=0)
    task = state.task
    with kept(task):
        engine = Engine(
            state, world, schedule, periods, dataclasses.replace(loop, max_bad_steps=loop.lr_finder_steps + 1), run.precision, seed=run.seed,
            reporter=listener, poll=lambda step: poll(step) or int(listener.diverged),
            step_size=None if loop.drop_last else stage.data.order.step_size,
        )  # fmt: skip
        sets = loaders(run, stage.data, task, world, 0)
        reason = engine.fit(sets[0], None)
        close(sets)
        del engine
        gc.collect()  # DDP hangs on to its hooks by a circle
    fresh = fresh_state(stage, task)
    fresh.accumulate = state.accumulate
    return listener.sweep, fresh, 0 if listener.diverged else reason


@contextmanager
def kept(task: nn.Module) -> Iterator[None]:
    """Whatever happens inside, afterwards every parameter, buffer and random generator is what it was."""
    tensors = [*task.parameters(), *task.buffers()]
    copies = [tensor.detach().clone() for tensor in tensors]
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002  (somebody's augmentation may draw from it)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, copy in zip(tensors, copies, strict=True):
                    tensor.copy_(copy)
                    tensor.grad = None
            random.setstate(python)
            np.random.set_state(numbers)  # noqa: NPY002


def before_run(
    stage: Stage, state: TrainState, world: World, poll: Callable[[int], int], heartbeat: Callable[[], None], directory: Path
) -> tuple[TrainState, int]:
    """Sweep, show and write down what came of it. Returns the state to begin with, and the reason to stop, if there is one."""
    found, state, reason = sweep(stage, state, world, poll, heartbeat)
    if reason:
        return state, reason
    rates = conclude(found, stage.run)
    if world.is_main:
        write(found, rates, directory)
        print(words(found, rates), flush=True)
    if (use := stage.run.loop.lr_finder_use) is not None:
        state.scale_rates(rates[use] / stage.run.optimizer.scaled_lr(stage.run.loop.batch_size))
    return state, 0


def conclude(found: Sweep, run: RunConfig) -> dict[str, float]:
    """The suggestions. Raises ConfigError where the sweep was over before it began, or where a rate is to be used and there is none."""
    loop = run.loop
    finite = len(found.smooth())
    if finite < FEWEST:
        reason = f"the loss is off after {finite} steps, at a rate of {found.rates[-1]:.2g}: too few to draw a curve"
        raise ConfigError(
            Problem("loop.lr_finder_start", loop.lr_finder_start, reason, f"loop.lr_finder_start={loop.lr_finder_start / 1e4:.0e}")
        )
    rates = found.suggestions()
    if loop.lr_finder_use is not None and not rates:
        reason = f"the loss fell nowhere between {found.rates[0]:.2g} and {found.rates[-1]:.2g}, so there is no rate to use"
        raise ConfigError(Problem("loop.lr_finder_use", loop.lr_finder_use, reason, "loop.lr_finder_use=null, and another range"))
    return rates


def words(found: Sweep, rates: Mapping[str, float]) -> str:
    """The outcome for a person."""
    span = f"learning rates from {found.rates[0]:.2g} to {found.rates[-1]:.2g} in {len(found.rates)} steps"
    if not rates:
        return f"{span}: the loss did not fall, so nothing is suggested"
    return "\n".join([f"{span}; suggested:", *(f"    {name:9} {rate:.3g}  ({WORDS[name]})" for name, rate in rates.items())])


def write(found: Sweep, rates: Mapping[str, float], directory: Path) -> list[Path]:
    """lr_finder.csv, lr_finder.json and lr_finder.png."""
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"lr_finder.{kind}" for kind in ("csv", "json", "png")]
    with files[0].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["learning_rate", "loss", "smoothed"])
        curve = found.smooth()
        writer.writerows(
            (r, loss, curve[i] if i < len(curve) else "") for i, (r, loss) in enumerate(zip(found.rates, found.losses, strict=True))
        )
    files[1].write_text(json.dumps({"steps": len(found.rates), "suggestions": dict(rates)}, indent=1) + "\n")
    draw(found, rates, files[2])
    return files


def draw(found: Sweep, rates: Mapping[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from trainer.log.draw import OTHERS, STYLE, TRAIN, panels

    curve = found.smooth()
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, across=1)
        axis.plot(found.rates[: len(curve)], found.losses[: len(curve)], color=TRAIN, alpha=0.3, linewidth=1)
        axis.plot(found.rates[: len(curve)], curve, color=TRAIN, label="loss, smoothed")
        for color, (name, rate) in zip(OTHERS, rates.items()):
            axis.axvline(rate, color=color, linewidth=1.2, linestyle="--", label=f"{name} {rate:.2g}")
        axis.set_xscale("log")
        low, span = min(curve), max(1.5 * (curve[0] - min(curve)), 0.01 * abs(curve[0]), 1e-6)
        axis.set_ylim(low - 0.1 * span, low + span)  # what lies above is divergence
        axis.set_xlabel("learning rate")
        axis.set_title("loss over one sweep of the learning rate")
        axis.legend()
        figure.savefig(path, format="png")
