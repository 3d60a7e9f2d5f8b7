"""What a run writes down: the record on disk first, then everything that is fed from the same call.

It knows steps, rows and files; it does not know what the numbers mean beyond their prefixes `train/`, `val/`, `system/`.
Imports no torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trainer.config.logger import WandbMode
from trainer.config.run import RunConfig
from trainer.errors import Interrupted, Pruned, Stopped
from trainer.log.gallery import Gallery
from trainer.log.plots import Plotter
from trainer.log.record import Record, rows_after
from trainer.log.relay import Relay
from trainer.log.sheet import Sheet
from trainer.log.tensorboard_sink import TensorboardSink
from trainer.log.totals import Kinds, Totals
from trainer.log.wandb_sink import WandbSink, choose_id, end_service, how_to_sync, mark_unsent

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds the last drawing may take
GRACE = 10.0  # seconds W&B has for the end beyond its own timeout, before it is killed
HEAD_START = 3.0  # seconds the sinks are waited for before training begins
BATCH_FIRST, BATCH_LAST = ["epoch", "step"], ["seconds", "timestamp"]  # columns on the left and on the right
EPOCH_FIRST = ["epoch", "step", "train/loss", "train/loss_total"]
EPOCH_LAST = ["train/lr", "train/momentum", "seconds", "epoch_seconds", "is_best", "checkpoint", "timestamp"]


class Journal:
    """One run's numbers. On every rank but the main one it is silent."""

    def __init__(
        self, directory: Path, *, csv: bool = True, relays: Sequence[Relay] = (), ids: Mapping[str, str] | None = None, silent: bool = False
    ) -> None:
        self.directory, self.silent = directory, silent
        self.relays = list(relays)
        self.record = Record(directory / "metrics.jsonl")
        self.batches: Sheet | None = Sheet(directory / "batches.csv", BATCH_FIRST, BATCH_LAST) if csv else None
        self.epochs: Sheet | None = Sheet(directory / "epochs.csv", EPOCH_FIRST, EPOCH_LAST) if csv else None
        self.totals = Totals()
        self.kinds: dict[tuple[str, ...], Kinds] = {}
        self.last_ids = dict(ids or {})
        self.start_step = 0
        self.before = 0.0  # seconds of earlier starts
        self.started = time.monotonic()
        self.watcher: Relay | None = None  # the W&B sink, where it is to watch the model
        self.plotter: Plotter | None = None
        self.gallery = Gallery(directory / "previews", self.images)
        self.closed = False

    def write(self, step: int, epoch: float, samples: int, scalars: Mapping[str, float]) -> None:
        """One row of the record, and what follows from it. Raises StorageError where the record cannot be written."""
        if self.silent:
            return
        row = {"step": step, "epoch": round(epoch, 6), "samples": samples, "seconds": self.seconds(), **scalars}
        self.record.append(row)
        kinds = self.kinds.get(names := tuple(scalars)) or self._sort(names)
        self.totals.add(step, scalars, kinds)
        if kinds.trains and self.batches is not None:
            self._append(self.batches, {name: row[name] for name in kinds.batch} | {"timestamp": timestamp()})
        for relay in self.relays:
            relay.send(lambda sink: sink.write(row))

    def _sort(self, names: tuple[str, ...]) -> Kinds:
        """What each of these names is. Rows have few different sets of names, so this is asked once for each."""
        self.kinds[names] = Kinds.of(names)
        return self.kinds[names]

    def epoch(self, row: Mapping[str, Any]) -> None:
        """One row of epochs.csv. `row` needs epoch and step; means, totals and scores since the last call are added."""
        if self.silent:
            return
        seconds = self.seconds()
        full = {
            **self.totals.take(),
            "seconds": seconds,
            "epoch_seconds": round(seconds - self.totals.since, 3),
            **row,
            "timestamp": timestamp(),
        }
        self.totals.since = seconds
        if self.epochs is not None:
            self._append(self.epochs, full)
        if self.plotter is not None:
            self.plotter.epoch()
        if row.get("is_best"):
            for relay in self.relays:
                relay.send(lambda sink: sink.best(full))

    def rewind(self, step: int, seconds: float | None = None) -> None:
        """Forget what lies after `step`, where a resumed run goes on; time counts on from there (or from `seconds`)."""
        if self.silent:
            return
        last = self.record.rewind(step)
        epoch = None
        for sheet in (self.batches, self.epochs):
            if sheet is not None:
                try:
                    epoch = sheet.rewind(step)
                except Exception as error:
                    self._drop(sheet, error)
        self.start_step = step
        self.before = seconds if seconds is not None else float(last["seconds"]) if last else 0.0
        self.started = time.monotonic()
        self.totals = Totals(step=int(epoch["step"]), since=float(epoch["seconds"])) if epoch else Totals()
        if last:
            for row in rows_after(self.record.path, self.totals.step):
                self.totals.add(row["step"], row, Kinds.of(tuple(row)))
        self.totals.step = step
        self.open_sinks()

    def open_sinks(self) -> None:
        """Start the sinks. Waits a moment for them, so that they are usually there when the loader forks its workers and
        when training begins; a server that takes longer is waited for beside the training."""
        for relay in self.relays:
            relay.start()
        deadline = time.monotonic() + HEAD_START
        for relay in self.relays:
            relay.opened.wait(max(0.0, deadline - time.monotonic()))

    def watch(self, module: nn.Module, log_every: int) -> None:
        """Have W&B draw histograms of the module's gradients and parameters, where the config asks for it."""
        if self.watcher is not None:
            relay = self.watcher
            relay.opened.wait(relay.patience)
            if isinstance(relay.sink, WandbSink):
                try:
                    relay.sink.watch(module, log_every)
                except Exception as error:
                    logger.warning("W&B does not watch the model (%s: %s)", type(error).__name__, error)

    def images(self, step: int, paths: Sequence[Path]) -> None:
        """Show pictures that lie in the run directory to the sinks that can show them."""
        if not self.silent and paths:
            for relay in self.relays:
                relay.send(lambda sink: sink.images(step, paths))

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Write pictures, {name: uint8 [H, W, 3]}, to previews/ and show them to the sinks, in the background."""
        if not self.silent:
            self.gallery.add(step, pictures)

    def seconds(self) -> float:
        """Since the run began, over all its starts."""
        return round(self.before + time.monotonic() - self.started, 3)

    def ids(self) -> dict[str, str]:
        """What the sinks need to go on in the same place, for the checkpoint."""
        return dict(self.last_ids)

    def sync(self) -> None:
        """Wait until the disk has the record."""
        if not self.silent:
            self.record.sync()

    def close(self, state: str = "completed", why: str = "") -> None:
        """Finish the sinks, each within its own patience, whatever state a server is in. `why` is for a run that failed."""
        if self.silent or self.closed:
            return
        self.closed = True
        self.gallery.close()
        now = time.monotonic()
        for relay in self.relays:
            if state == "failed":
                relay.send(lambda sink: sink.failed(why))
            relay.finish(state)
        if self.plotter is not None:
            self.plotter.finish()
        for relay in self.relays:
            relay.join(now + relay.patience)
        if self.plotter is not None:
            # Where the run was stopped, somebody is waiting for its end.
            self.plotter.join(now + (PATIENCE if state == "completed" else PATIENCE / 6))
        for file in (self.record, self.batches, self.epochs):
            if file is not None:
                file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(ending(error), f"{kind.__name__}: {error}" if kind else "")

    def _append(self, sheet: Sheet, row: Mapping[str, Any]) -> None:
        try:
            sheet.append(row)
        except Exception as error:
            self._drop(sheet, error)

    def _drop(self, sheet: Sheet, error: Exception) -> None:
        name = sheet.path.name
        logger.warning("%s cannot be written and is left out from here on (%s). The same numbers are in metrics.jsonl", name, error)
        if sheet is self.batches:
            self.batches = None
        else:
            self.epochs = None


def open_journal(directory: Path, run: RunConfig, is_main: bool, ids: Mapping[str, str] | None = None) -> Journal:
    """The journal of `run`, with the sinks its config asks for. `ids` is what `Journal.ids` gave to the checkpoint.

    Call `rewind` with the step the run goes on from (0 at a start) before the first row.
    """
    directory, cfg = Path(directory), run.logger
    if not is_main:
        return Journal(directory, silent=True)
    journal = Journal(directory, csv=cfg.csv, ids=ids)
    if cfg.wandb.enabled and cfg.wandb.mode is not WandbMode.disabled:
        run_id = choose_id(directory, cfg.wandb, journal.last_ids)
        journal.last_ids["wandb"] = run_id
        # W&B waits for its server at most twice: while it starts and while it ends.
        relay = Relay(
            "W&B",
            lambda: WandbSink(directory, run, run_id, journal.start_step),
            how_to_sync(directory),
            patience=cfg.wandb.timeout + GRACE,
            abandon=end_service,
            lost=lambda: mark_unsent(directory),
        )
        journal.relays.append(relay)
        journal.watcher = relay if cfg.wandb.watch else None
    if cfg.tensorboard.enabled:
        advice = "the numbers are in metrics.jsonl"
        journal.relays.append(Relay("TensorBoard", lambda: TensorboardSink(directory, journal.start_step), advice, patience=30))
    if cfg.plots:
        journal.plotter = Plotter(directory)
    return journal


def ending(error: BaseException | None) -> str:
    """The state of a run that ended with `error`, in the words of status.json."""
    if error is None:
        return "completed"
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Stopped):
        return "pruned" if isinstance(error, Pruned) else "preempted"
    return "failed"


_second, _stamp = 0, ""


def timestamp() -> str:
    """Now, in ISO 8601 with the zone's offset. Made once a second: formatting a date costs more than writing the row."""
    global _second, _stamp
    now = int(time.time())
    if now != _second:
        local = time.localtime(now)
        offset = time.strftime("%z", local)
        _second, _stamp = now, time.strftime("%Y-%m-%dT%H:%M:%S", local) + offset[:3] + ":" + offset[3:]
    return _stamp
