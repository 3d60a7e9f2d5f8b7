"""From a `RunConfig` to a finished run: build the parts in order, hand them to the engine, write down what came of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.amp.grad_scaler import GradScaler

from trainer import debug, optim
from trainer.build import Data, best_metric, build_data, build_task, periods_of
from trainer.checkpoint import Writer, load, newest_good, save_safetensors, set_aside
from trainer.config import Progressing, Resume, RunConfig
from trainer.config.plain import to_plain
from trainer.data.loader import train_loader, validation_loader, worker_count
from trainer.data.source import Source, Subset
from trainer.distributed import World, open_world
from trainer.ema import Ema
from trainer.engine import Engine
from trainer.environment import changes, write_environment
from trainer.errors import ConfigError, Interrupted, Problem
from trainer.log import open_display, open_journal, open_log, show_facts, show_result
from trainer.recorder import Recorder
from trainer.rundir import RunDirectory, run_directory
from trainer.signals import StopSignals, stop_error
from trainer.state import TrainState, portrait
from trainer.task import Batch, ComparesWithTraining, Task
from trainer.vote import StopVote
from trainer.watchdog import Watchdog

logger = logging.getLogger(__name__)


def train(run: RunConfig, directory: RunDirectory | None = None) -> dict[str, Any]:
    """Train `run` in `directory`, going on from its last checkpoint if there is one. Every rank calls this.

    Without a directory the first rank chooses it: with `resume=never` each would make one of its own.

    Returns what `result.json` holds.

    Raises:
        TrainyardError: with the exit code of the contract. `Stopped` and `Interrupted` mean that a checkpoint is saved.
    """
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals(max_hours=run.loop.max_hours))
        world = stack.enter_context(open_world(run.distributed))
        if directory is None:
            directory = RunDirectory(world.broadcast(str(run_directory(run)) if world.is_main else None))
        if world.is_main:
            stack.enter_context(directory.claim())
        world.barrier()  # nobody reads a checkpoint before the directory is ours
        stack.enter_context(open_log(directory.path, world.rank))
        with known_errors(run, world):
            return _train(run, directory, world, signals, stack)


def _train(run: RunConfig, directory: RunDirectory, world: World, signals: StopSignals, stack: ExitStack) -> dict[str, Any]:
    set_backends(run)
    data = build_data(run)
    task = build_task(run, data, world.device, world.size)
    state = build_state(run, task)
    metric, higher_is_better = best_metric(run, task)
    periods = periods_of(run, data)
    resumed = restore(run, directory, state, world, data.train.classes)

    journal = stack.enter_context(open_journal(directory.path, run, world.is_main, resumed.get("logger")))
    journal.rewind(state.step, state.seconds if resumed else None)
    if run.logger.wandb.watch:
        journal.watch(task, run.loop.log_every)
    display = stack.enter_context(open_display(run.loop.progress, world.is_main, periods.total, data.steps_per_epoch))
    writer = stack.enter_context(Writer(directory.checkpoints, keep=run.loop.keep_checkpoints)) if world.is_main else None
    if world.is_main:
        directory.write_config(run)
        record_environment(directory, data, world, resumed=bool(resumed))
        directory.status("running", step=state.step, total_steps=periods.total)
        if state.step == 0 and run.loop.progress is not Progressing.none:
            show_facts(facts(directory, data, task))
    watchdog = stack.enter_context(Watchdog(run.distributed.timeout, world))
    profile_step = stack.enter_context(debug.instruments(run.debug, directory.path, is_main=world.is_main))

    def alive() -> None:
        watchdog.tick()
        profile_step()
        if writer:
            signals.save_seconds = writer.save_seconds  # a deadline must leave time for one more

    recorder = Recorder(
        run, directory, state, periods, world, journal, display, writer,
        portrait=portrait(to_plain(run), data.info()), metric=metric, higher_is_better=higher_is_better, heartbeat=alive,
    )  # fmt: skip
    engine = Engine(
        state, world, run.scheduler.build(periods.total, data.steps_per_epoch), periods, run.loop, run.precision,
        seed=run.seed, reporter=recorder, poll=StopVote(world, signals.told).poll,
        step_size=None if run.loop.drop_last else data.order.step_size,
        describe_step=lambda step: describe(data, step), inspect=debug.gradient_norms if run.debug.anomaly else None,
        decay=run.optimizer.decay_factor if run.optimizer.weight_decay_end is not None else None,
    )  # fmt: skip
    reason = engine.fit(*loaders(run, data, task, world, state.step))
    if writer:
        writer.wait()
    if reason:
        error = stop_error(reason, directory.path)
        if world.is_main:  # said before the sinks are closed, which may take seconds that a preempted job does not have
            directory.status("interrupted" if isinstance(error, Interrupted) else "preempted", reason=str(error))
        raise error
    if writer:
        writer.forget_previous()
    result = recorder.result(sum(p.numel() for p in task.parameters() if p.requires_grad))
    if world.is_main:
        with state.ema.swapped(task) if state.ema else ExitStack():
            save_safetensors(task.network(), directory.checkpoints / "model.safetensors")
        directory.write_result(result)
        directory.status("completed", step=state.step)
        show_result(result, directory.path)
    world.barrier()
    return result


def set_backends(run: RunConfig) -> None:
    """Process-wide switches of torch."""
    torch.set_float32_matmul_precision("high" if run.precision.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = run.precision.tf32
    torch.backends.cudnn.benchmark = not run.loop.deterministic
    torch.use_deterministic_algorithms(run.loop.deterministic)


def build_state(run: RunConfig, task: Task) -> TrainState:
    groups = optim.parameter_groups(task, run.optimizer, run.loop.batch_size, task.param_rules())
    device = next(task.parameters()).device
    return TrainState(
        task=task,
        optimizers=[run.optimizer.build(groups)],
        scaler=GradScaler(device.type) if run.precision.autocast == "float16" else None,
        ema=Ema(task, run.loop.ema_decay) if run.loop.ema_decay is not None else None,
    )


def restore(run: RunConfig, directory: RunDirectory, state: TrainState, world: World, classes: Sequence[str]) -> dict[str, Any]:
    """Go on where the last good checkpoint stands, or start from `init_from`. Returns the checkpoint, {} at a start."""
    found = newest_good(directory.checkpoints) if world.is_main else None
    chosen: Path | None = world.broadcast(found[0] if found else None)
    if chosen is None:
        if run.resume is Resume.must:
            raise ConfigError(Problem("resume", "must", f"there is no checkpoint in {directory.checkpoints}", "resume=auto"))
        if run.init_from:
            from trainer import weights

            account = weights.load_weights(state.task, run.init_from, classes=classes or None)
            if state.ema:  # it began as a copy of the weights that were drawn
                state.ema = Ema(state.task, state.ema.decay)
            if world.is_main:
                print(account)
        return {}
    saved = found[1] if found else load(chosen)
    state.load_state_dict(saved)
    if found and chosen.name != "last.pt":
        set_aside(directory.checkpoints / "last.pt")
    logger.info("going on at step %d, from %s", state.step, chosen)
    return saved


def record_environment(directory: RunDirectory, data: Data, world: World, *, resumed: bool) -> None:
    """Write down what this start is made of, and say where it is something else than the start that it goes on from."""
    before = directory.read_environment() if resumed else {}
    now = write_environment(directory.path, ranks=world.size, data=data.fingerprints)
    for change in changes(before, now):
        logger.warning("%s; going on all the same. resume=never begins anew, beside this run", change)


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


def facts(directory: RunDirectory, data: Data, task: Task) -> dict[str, str]:
    """What a person wants to see before the first step."""
    info, parameters = data.info(), sum(p.numel() for p in task.parameters() if p.requires_grad)
    classes = f" of {len(info.classes)} classes" if info.classes else ""
    return {
        "run": str(directory.path),
        "data": f"{info.num_train:,} images{classes} to train on, {info.num_val:,} to validate on",
        "model": f"{type(task.network()).__name__}, {parameters:,} parameters",
        "length": f"{info.total_steps:,} steps, {info.total_steps / info.steps_per_epoch:g} epochs of {info.steps_per_epoch:g}",
    }


def describe(data: Data, step: int) -> str:
    """The samples of a step, for a message."""
    indices = data.order.step_samples(step).index[:8].tolist()
    return f"That batch begins with {', '.join(data.train.name(i) for i in indices)}"


@contextmanager
def known_errors(run: RunConfig, world: World) -> Iterator[None]:
    """Give foreign errors the words and the exit code they deserve."""
    try:
        yield
    except Exception as error:
        known = world.fail(_too_large(run, world) if isinstance(error, torch.OutOfMemoryError) else error)
        if known is error:
            raise
        raise known from error


def _too_large(run: RunConfig, world: World) -> ConfigError:
    halved = f"loop.accumulate={run.loop.accumulate * 2}"
    reason = f"does not fit into the memory of {world.device}, cut into {world.size * run.loop.accumulate} part(s)"
    return ConfigError(Problem("loop.batch_size", run.loop.batch_size, reason, f"{halved}, which changes nothing else"))
