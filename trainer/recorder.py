"""What a run tells the world while it goes: numbers, the best so far, checkpoints, signs of life.

It stands between the engine, which knows when, and the run directory, which knows where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trainer.checkpoint import Writer
from trainer.config import RunConfig
from trainer.distributed import World
from trainer.engine import Periods
from trainer.log import Display, Journal
from trainer.rundir import RunDirectory
from trainer.state import TrainState


@dataclass
class Recorder:
    """Implements `engine.Reporter`. Every rank has one; on all but the main rank nothing is written."""

    run: RunConfig
    directory: RunDirectory
    state: TrainState
    periods: Periods
    world: World
    journal: Journal
    display: Display
    writer: Writer | None  # the main rank's
    portrait: Mapping[str, Any]  # what a lone checkpoint needs to rebuild the model: config, classes, channels
    metric: str
    higher_is_better: bool
    heartbeat: Callable[[], None] = lambda: None
    labels: Mapping[str, float] = field(default_factory=dict)  # of the stage, where there are several: its number, image and batch size
    best_is_unsaved: bool = False
    prepared: bool = False
    last_saved: int = -1  # step of the last checkpoint asked for
    loss: float | None = None  # mean of training up to the last validation

    @property
    def epoch(self) -> float:
        return round(self.periods.epochs_at(self.state.step), 4)

    def tick(self) -> None:
        self.heartbeat()
        if not self.prepared:  # optimizers have made their state by now: memory for the snapshots can be got
            self.prepared = True
            if self.writer:
                self.writer.prepare(self._checkpoint())
        self.display.advance(self.state.step)

    def logged(self, scalars: dict[str, float]) -> None:
        scalars.update({f"train/{name}": value for name, value in self.labels.items()})
        self.journal.write(self.state.step, self.epoch, self.state.samples, scalars)
        self.display.logged(self.state.step, self.epoch, scalars)
        if self.world.is_main:
            self.directory.status("running", step=self.state.step, total_steps=self.periods.total)

    def validated(self, scores: dict[str, float]) -> None:
        state = self.state
        row = {"step": state.step, "epoch": self.epoch, **self.labels, **scores}
        if (loss := self.journal.totals.mean("train/loss")) is not None:  # the main rank knows
            row["train/loss"] = self.loss = loss
        is_best = self._is_best(row)
        if is_best:
            state.best = row
            self.best_is_unsaved = True
        state.history.append(row)
        self.journal.write(state.step, self.epoch, state.samples, scores)
        self.journal.epoch({**row, "is_best": is_best, "checkpoint": f"checkpoints/{'best' if is_best else 'last'}.pt"})
        self.display.validated(state.step, self.epoch, scores, is_best=is_best)
        due = state.step == self.periods.end or state.step == self.last_saved
        if is_best and not due:
            self.save()  # the engine would save at the next checkpoint, when these weights are gone

    def pictures(self, pictures: Mapping[str, Tensor]) -> None:
        images = {name: picture.permute(1, 2, 0).cpu().numpy() for name, picture in pictures.items()}  # [H, W, 3] uint8
        self.journal.pictures(self.state.step, images)

    def _is_best(self, scores: Mapping[str, float]) -> bool:
        value = scores.get(self.metric)
        if value is None or value != value:
            return False
        if self.state.best is None or self.metric not in self.state.best:
            return True
        old = self.state.best[self.metric]
        return value > old if self.higher_is_better else value < old

    def save(self) -> None:
        """Queue a checkpoint: `last`, and under further names where it is the best or due to be kept."""
        step = self.state.step
        if step == self.last_saved and not self.best_is_unsaved:
            return
        self.last_saved = step
        names = ["last"]
        if self.best_is_unsaved:
            names.append("best")
        epoch_ends = (step - self.periods.start) % self.periods.epoch == 0
        if self.run.loop.keep_checkpoints and epoch_ends:
            names.append(f"epoch-{round(self.epoch):04d}{self._loss_in_name()}")
        self.best_is_unsaved = False
        if self.writer:
            self.writer.save(self._checkpoint(), names)

    def _loss_in_name(self) -> str:
        """-loss-0.1234, of the steps since the last validation, or of those up to it; nothing where that is not known."""
        mean = self.journal.totals.mean("train/loss")
        loss = self.loss if mean is None else mean
        return f"-loss-{loss:.4f}" if self.run.loop.loss_in_name and loss is not None else ""

    def _checkpoint(self) -> dict[str, Any]:
        return {**self.state.state_dict(), **self.portrait, "logger": self.journal.ids()}

    def result(self, parameters: int) -> dict[str, Any]:
        """What `result.json` says of a finished run."""
        state = self.state
        last = state.history[-1] if state.history else {"step": state.step, "epoch": self.epoch}
        return {
            "metric": self.metric,
            "mode": "max" if self.higher_is_better else "min",
            "validated_on": self.run.dataset.validates_on(),
            "best": state.best or last,
            "last": last,
            "history": state.history,
            "steps": state.step,
            "samples": state.samples,
            "seconds": round(state.seconds, 3),
            "images_per_second": round(state.samples / max(state.seconds, 1e-9), 1),
            "parameters": parameters,
        }
