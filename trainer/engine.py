"""The training loop. It knows steps, ranks, precision and checkpoints; it does not know what is being learned.

Between two log points the host never waits for the device: metrics and the non-finite flag stay there as tensors, learning
rates come in closed form, and ranks agree to stop over a CPU side channel.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import LoopConfig, PrecisionConfig
from trainer.distributed import World
from trainer.errors import Diverged
from trainer.random import fold, mix
from trainer.state import TrainState
from trainer.task import Batch, ComparesWithTraining, Evaluator, Illustrates, Keeps, Progress, StepOutput, Task
from trainer.update import BufferGuard, Clip, Rates, Update, clip_adaptively, clip_each, clip_values

logger = logging.getLogger(__name__)

STEP_ODD = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: consecutive steps get seeds far apart


@dataclass(frozen=True)
class Periods:
    """When things are due, in optimizer steps. 0 = only at the end.

    A run may have several stages with periods of their own; then these are one stage's, [start, stop) of the run's `total`.
    """

    total: int
    epoch: int  # the length of one
    log: int
    validate: int
    checkpoint: int
    checkpoint_steps: int = 0
    start: int = 0
    stop: int | None = None  # None = total
    epochs_before: int = 0  # the stage

    @property
    def end(self) -> int:
        return self.total if self.stop is None else self.stop

    def is_due(self, every: int, step: int) -> bool:
        return step == self.end or (every > 0 and (step - self.start) % every == 0)

    def epochs_at(self, step: int) -> float:
        """Epochs of the run that are finished at `step`."""
        return self.epochs_before + (step - self.start) / self.epoch


class BadSamples(Protocol):
    """What a loader knows of the samples that it could not read."""

    limit: int
    found: dict[str, str]  # of this rank, by name

    def judge_together(self, of_ranks: Iterable[Mapping[str, str]]) -> None: ...  # raises where there are too many


class Reporter(Protocol):
    """What the engine tells the outside. Every rank calls it; the main rank writes."""

    def logged(self, scalars: dict[str, float]) -> None: ...
    def validated(self, scores: dict[str, float]) -> None: ...
    def pictures(self, pictures: Mapping[str, Tensor]) -> None: ...  # {name: uint8 [3, H, W]}
    def save(self) -> None: ...
    def tick(self) -> None: ...  # a sign of life, at every step and validation batch


@dataclass
class Window:
    """What happened since the last log point, still on the device."""

    losses: list[Tensor] = field(default_factory=list)  # [] each
    weights: list[Tensor | float] = field(default_factory=list)
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)
    bad: list[Tensor] = field(default_factory=list)  # [] flags, one a step
    started: float = field(default_factory=time.perf_counter)
    images: int = 0  # over all ranks
    paused: float = 0.0  # seconds of it spent validating or saving


class Engine:
    """Runs one task from `state.step` to the end of the run, or until the ranks agree to stop."""

    def __init__(
        self,
        state: TrainState,
        world: World,
        schedule: Rates,
        periods: Periods,
        loop: LoopConfig,
        precision: PrecisionConfig,
        *,
        seed: int,
        reporter: Reporter,
        poll: Callable[[int], int],
        step_size: Callable[[int], int] | None = None,
        describe_step: Callable[[int], str] = lambda step: "",
        inspect: Callable[[nn.Module], dict[str, float]] | None = None,
        decay: Callable[[float], float] | None = None,
    ) -> None:
        self.state, self.world, self.periods, self.loop = state, world, periods, loop
        self.reporter, self.poll, self.inspect = reporter, poll, inspect
        self.describe_step = describe_step
        self.step_size = step_size  # images of a step over all ranks, where an epoch's last batch is short
        self.guard = BufferGuard(state.task)  # before anything else takes hold of the buffers
        self.update = Update(
            state.optimizers, schedule, state.scaler, loop.max_grad_norm if loop.clip_mode == "norm" else None,
            clip=clipping(loop, state.task), decay=None if decay is None else lambda step: decay(step / periods.total),
        )  # fmt: skip
        self.module: nn.Module = self._distribute(state.task)
        self.autocast = self._autocast(precision)
        self.seed = fold(seed, world.rank)
        self.inspected: dict[str, float] = {}
        self.stop_reason = 0
        self.bad_streak = 0  # bad steps in a row, up to the last log point
        self.bad_since = 0  # the step they began with
        self.before_update = _own(state.task, "before_update")
        self.after_update = _own(state.task, "after_update")
        self.guards_buffers = bool(self.guard.blocks)
        self.reference: Iterable[Batch] | None = None
        self.bad_samples: BadSamples | None = None  # of training, as the loader counts them

    def fit(self, batches: Iterable[Batch], validation: Iterable[Batch] | None, reference: Iterable[Batch] | None = None) -> int:
        """Train until the stage's last step or until told to stop. Returns 0, or the reason the ranks agreed on.

        `reference` is the training set as validation sees it, for evaluators that compare with it.
        """
        self.reference, self.bad_samples = reference, getattr(batches, "bad", None)
        stream = iter(batches)
        state, periods = self.state, self.periods
        self.window = Window()
        self.clock = self.window.started  # up to which training time has been counted
        self.state.task.train()
        if self._validation_is_owed():  # killed between a checkpoint and its validation
            self._validate(validation)
        while state.step < periods.end and not self.stop_reason:
            self.train_step(stream)
            step = state.step
            self.reporter.tick()
            validates, saves = periods.is_due(periods.validate, step), self._checkpoint_is_due(step)
            # A window ends where the device is waited for anyway, so that none is lost when the run is resumed.
            if step % periods.log == 0 or validates or saves:
                self.log()
            if validates:
                self._validate(validation)
            self.stop_reason = self.stop_reason or self.poll(step)
            if self.stop_reason and self.window.losses:
                self.log()
            if self.stop_reason or saves:
                self._save()
        return self.stop_reason if state.step < periods.total else 0

    def train_step(self, stream: Iterator[Batch]) -> None:
        """One optimizer step, over `loop.accumulate` micro-batches."""
        state, window = self.state, self.window
        step = state.step
        # In-model noise is a function of (seed, rank, step): a resumed run draws what it would have drawn.
        reseed(mix(self.seed + step * STEP_ODD))
        self.update.set_rates(step)
        periods = self.periods
        progress = Progress(step, periods.total, periods.epoch, periods.start, periods.epochs_before)
        if self.guards_buffers:
            self.guard.save()
        total = self._backward(stream, progress, window)
        norm, bad = self.update.finish_gradients(total)
        if self.inspect and (step + 1) % self.periods.log == 0:
            self.inspected = self.inspect(state.task)  # now, as the update drops the gradients
        if self.before_update:
            self.before_update(progress)
        self.update.step(bad)
        if self.guards_buffers:
            self.guard.restore(bad)
        if self.after_update:
            self.after_update(progress)
        if state.ema is not None:
            state.ema.update(step)
        window.norms.append(norm)
        window.bad.append(bad)
        state.step = step + 1

    def _backward(self, stream: Iterator[Batch], progress: Progress, window: Window) -> Tensor | None:
        """Forward and backward over the micro-batches. Returns the weight the gradients still have to be divided by,
        or None where they already are a mean."""
        accumulate, size = self.loop.accumulate, self.world.size
        images = self.loop.batch_size if self.step_size is None else self.step_size(progress.step)
        self.state.samples += images
        window.images += images
        weighted = images != self.loop.batch_size
        total: Tensor | float | None = None
        for i in range(accumulate):
            batch = next(stream)
            count = batch["count"]
            last = i == accumulate - 1
            with nullcontext() if last or size == 1 else self.module.no_sync():  # type: ignore[operator]
                output = self._forward(batch, progress)
                loss = output.loss
                weight: Tensor | float = count if output.weight is None else output.weight
                # The loss is a mean over `weight` items. Where micro-batches differ in weight (a short last batch, a
                # task that counts something else than images), sums add up and the division comes at the end.
                weighted = weighted or output.weight is not None
                if weighted and (accumulate > 1 or size > 1):
                    loss = loss * weight
                    total = weight if total is None else total + weight
                elif accumulate > 1:
                    loss = loss / accumulate
                (loss if self.state.scaler is None else self.state.scaler.scale(loss)).backward()
            window.losses.append(output.loss.detach())
            window.weights.append(weight)
            for name, value in output.metrics.items():
                window.metrics.setdefault(name, []).append(value)
        if total is None:
            return None
        total = torch.as_tensor(total, dtype=torch.float32, device=self.world.device)
        return self.world.sum(total) / size  # DDP has averaged the ranks' sums: sum / size

    def _forward(self, batch: Batch, progress: Progress) -> StepOutput:
        batch = self._laid_out(batch)
        if self.autocast is None:
            return self.module(batch, progress)
        with self.autocast:
            return self.module(batch, progress)

    def _laid_out(self, batch: Batch) -> Batch:
        if self.loop.channels_last and isinstance(image := batch.get("image"), Tensor) and image.ndim == 4:
            batch["image"] = image.contiguous(memory_format=torch.channels_last)
        return batch

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[Batch], *, illustrate: bool = False, evaluator: Evaluator | None = None
    ) -> dict[str, float] | None:
        """One validation pass, with the averaged weights where there are some. Collective. None if the ranks stopped in it.

        `evaluator` is a fresh one of the task's, for who wants to ask it for more than scores.
        """
        task = self.state.task
        task.eval()
        evaluator = evaluator or task.evaluator()
        if isinstance(evaluator, Keeps):
            evaluator.keeps = illustrate and self.world.is_main
        reseed(mix(self.seed))
        # DDP gives all ranks the main rank's batch statistics, but only as the next step begins; a checkpoint holds the main rank's.
        self.world.align([live for live, _ in self.guard.blocks] + (self.state.ema.buffers if self.state.ema else []))
        weights: AbstractContextManager[Any] = self.state.ema.swapped(task) if self.state.ema else nullcontext()
        scores = None
        with weights:
            if self.reference is not None and isinstance(evaluator, ComparesWithTraining):
                self._visit(self.reference, evaluator.reference)
            if not self.stop_reason:
                self._visit(batches, evaluator.update)
            if not self.stop_reason:
                bad = getattr(batches, "bad", None)
                self._judge(bad, self.world.sum(torch.tensor(float(len(bad.found)), device=self.world.device)).item() if bad else 0)
                scores = {f"val/{name}": value for name, value in evaluator.compute().items()}
            if scores is not None and illustrate and self.world.is_main and isinstance(evaluator, Illustrates):
                with self.autocast or nullcontext():
                    self.reporter.pictures(evaluator.pictures())
        task.train()
        return scores

    def _visit(self, batches: Iterable[Batch], show: Callable[[Batch], None]) -> None:
        """Show every batch, until the ranks agree to stop."""
        # Ranks may have unequal numbers of batches; asked to stop, they have to answer equally often.
        rounds = getattr(batches, "rounds", None)
        stream = iter(batches)
        with self.autocast or nullcontext():
            for _ in itertools.count() if rounds is None else range(rounds):
                batch = next(stream, None)
                if batch is not None:
                    show(self._laid_out(batch))
                elif rounds is None:
                    break
                self.reporter.tick()
                if rounds is not None and (reason := self.poll(self.state.step)):
                    self.stop_reason = reason
                    break

    def _validate(self, batches: Iterable[Batch] | None) -> None:
        if batches is None:
            return
        with self._pause() as seconds:
            every = self.loop.preview_every
            due = every is not None and (len(self.state.history) % every == 0 or self.state.step == self.periods.total)
            scores = self.evaluate(batches, illustrate=due)
            if scores is not None:
                self.state.validated = self.state.step
                self.reporter.validated({**scores, "val/seconds": seconds()})

    def _validation_is_owed(self) -> bool:
        step = self.state.step
        return step > 0 and self.periods.is_due(self.periods.validate, step) and self.state.validated != step

    def _checkpoint_is_due(self, step: int) -> bool:
        periods = self.periods
        return periods.is_due(periods.checkpoint, step) or (periods.checkpoint_steps > 0 and step % periods.checkpoint_steps == 0)

    def _save(self) -> None:
        with self._pause():
            self.reporter.save()

    @contextmanager
    def _pause(self) -> Iterator[Callable[[], float]]:
        """Time in here does not count as training. Yields how many seconds it has been so far."""
        self._count_seconds()
        started = time.perf_counter()
        try:
            yield lambda: time.perf_counter() - started
        finally:
            self.clock = time.perf_counter()
            self.window.paused += self.clock - started

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self.clock
        self.clock = now

    def log(self) -> None:
        """Read the window: one packed all-reduce over ranks and one transfer to the host."""
        window, self.window = self.window, Window()
        scalars, bad, unread = self._reduce(window)  # waits for the device, so the clock is read after it
        self._judge(self.bad_samples, unread)
        self._count_bad_steps(bad)
        self._count_seconds()
        elapsed = max(self.clock - window.started - window.paused, 1e-9)
        self.window.started = self.clock
        rates = dict.fromkeys(group["lr"] for group in self.update.groups)  # each once, in order
        scalars.update({"train/lr" if i == 0 else f"train/lr_{i}": rate for i, rate in enumerate(rates)})
        if self.update.decay is not None:
            scalars["train/weight_decay"] = max(group["weight_decay"] for group in self.update.groups)
        if self.update.cycles_momentum:
            scalars["train/momentum"] = self.update.schedule.momentum(max(self.state.step - 1, 0)) or 0.0
        if self.state.skipped:
            scalars["train/skipped_steps"] = self.state.skipped
        scalars["system/images_per_second"] = window.images / elapsed
        if self.world.device.type == "cuda":
            scalars["system/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        scalars.update(self.inspected)
        self.reporter.logged(scalars)

    def _reduce(self, window: Window) -> tuple[dict[str, float], list[float], float]:
        """Weighted means over the window and all ranks, this window's bad-step flags, and how many samples the ranks have not been able to read."""
        device = window.losses[0].device
        if all(isinstance(w, int | float) for w in window.weights):
            weights = torch.tensor(window.weights, dtype=torch.float64, device=device)  # [steps * accumulate]
        else:
            weights = torch.stack([torch.as_tensor(w, dtype=torch.float64, device=device) for w in window.weights])
        columns = {"loss": window.losses, **window.metrics}
        table = torch.stack([torch.stack(c).double() for c in columns.values()])  # [names, steps * accumulate]
        unread = weights.new_tensor([len(self.bad_samples.found) if self.bad_samples else 0])
        sums = self.world.sum(torch.cat([(table * weights).sum(1), weights.sum().view(1), unread]))
        means = sums[:-2] / sums[-2]
        norms, bad = torch.stack(window.norms).double(), torch.stack(window.bad).double()
        finite = norms.isfinite()
        norm = norms.where(finite, 0).sum() / finite.sum()
        *values, norm_value, all_unread = torch.cat([means, norm.view(1), sums[-1:]]).tolist()
        flags = bad.tolist() if device.type == "cpu" else bad.cpu().tolist()
        scalars = {f"train/{name}": value for name, value in zip(columns, values, strict=True)}
        return {**scalars, "train/grad_norm": norm_value}, flags, all_unread

    def _judge(self, bad: BadSamples | None, of_all: float) -> None:
        """Each rank reads other samples, so what all together could not read (a file that two have met counts once) is held
        against the limit."""
        if bad is not None and of_all > bad.limit:
            bad.judge_together(self.world.gather(bad.found))

    def _count_bad_steps(self, flags: list[float]) -> None:
        """Skipped steps are counted; too many in a row end the run, naming the batch they began with."""
        enough, first = self.loop.max_bad_steps, self.state.step - len(flags)
        for step, flag in enumerate(flags, first):
            if not flag:
                self.bad_streak = 0
                continue
            if not self.bad_streak:
                self.bad_since = step
            self.bad_streak += 1
            self.state.skipped += 1
            if self.bad_streak >= enough:
                raise Diverged(
                    f"gradients were not finite for {enough} steps in a row, from step {self.bad_since} on (loop.max_bad_steps={enough}). "
                    f"{self.describe_step(self.bad_since)}\n    try: a lower optimizer.lr, loop.max_grad_norm=1, scheduler.warmup_epochs=1, "
                    "or precision=bf16 instead of fp16; debug=anomaly names the operation"
                )
        if any(flags) and self.state.scaler is None:  # a scaler finds its scale by such steps
            logger.warning("skipped %d step(s) whose gradients were not finite (%d so far)", int(sum(flags)), self.state.skipped)

    def _distribute(self, task: nn.Module) -> nn.Module:
        """DDP around the task, so that the loss is computed inside. With one rank DDP would cost 8 % and do nothing."""
        if self.world.size == 1:
            return task
        ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        unused = bool(getattr(task, "find_unused_parameters", False))
        return DistributedDataParallel(task, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=unused)

    def _autocast(self, precision: PrecisionConfig) -> torch.autocast | None:
        if precision.autocast is None:
            return None
        return torch.autocast(self.world.device.type, dtype=getattr(torch, precision.autocast))


def _own(task: nn.Module, method: str) -> Callable[[Progress], None] | None:
    """A hook that the task overrides; None where it is the empty one of the base class, which need not be called."""
    return None if getattr(type(task), method) is getattr(Task, method) else getattr(task, method)


def clipping(loop: LoopConfig, task: Task) -> Clip | None:
    """The clipping that is not by the norm of all gradients together."""
    if loop.max_grad_norm is None or loop.clip_mode == "norm":
        return None
    if loop.clip_mode == "agc":
        head = getattr(task.network(), "get_classifier", lambda: None)()
        return clip_adaptively(loop.max_grad_norm, list(head.parameters()) if isinstance(head, nn.Module) else ())
    return (clip_each if loop.clip_mode == "parameter" else clip_values)(loop.max_grad_norm)


def reseed(seed: int) -> None:
    """Seed the generators that in-model noise is drawn from. `torch.manual_seed` does the same and costs 160 us: it
    formats a stack trace for every backend that has not been initialised."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
