"""From a `RunConfig` to a finished run: build the parts in order, hand them to the engine, write down what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer import batch_finder, debug, lr_finder
from trainer.backends import set_backends
from trainer.build import Data, best_metric, build_data
from trainer.checkpoint import Writer, load, newest_good, save_safetensors, set_aside
from trainer.config import Progressing, Resume, RunConfig
from trainer.config.plain import to_plain
from trainer.distributed import World, open_world
from trainer.engine import Engine, Periods
from trainer.environment import changes, write_environment
from trainer.errors import ConfigError, Interrupted, Problem, Pruned, TrainyardError
from trainer.feeds import close, describe, loaders
from trainer.lock import Busy
from trainer.log import Display, Journal, ending, open_display, open_journal, open_log, show_facts, show_result
from trainer.recorder import Recorder
from trainer.rundir import RunDirectory, run_directory
from trainer.signals import StopSignals, stop_error
from trainer.stages import Stage, begin, carry, fresh_state, stage_at, stages_of
from trainer.state import TrainState, portrait
from trainer.task import Task
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
        for needed in run.task.prerequisites(run):
            finish_first(needed, world, signals)
        stack.enter_context(open_log(directory.path, world.rank))
        with known_errors(run, world):
            return _train(run, directory, world, signals, stack)


def _train(run: RunConfig, directory: RunDirectory, world: World, signals: StopSignals, stack: ExitStack) -> dict[str, Any]:
    set_backends(run, world.device)
    data = build_data(run)
    stages = stages_of(run, data)
    resumed = find_checkpoint(run, directory, world)
    stage = stage_at(stages, resumed["step"] if resumed else 0)
    stage, state = open_stage(stage, world, resumed.get("accumulate"))
    if resumed:
        state.load_state_dict(resumed)
    else:
        start_from(run, state, world, data.train.classes)

    journal = stack.enter_context(open_journal(directory.path, run, world.is_main, resumed.get("logger")))
    journal.rewind(state.step, state.seconds if resumed else None)
    if run.logger.wandb.watch:
        journal.watch(state.task, run.loop.log_every)
    total = stages[-1].stop
    display = stack.enter_context(open_display(run.loop.progress, world.is_main, total, stages[-1].data.steps_per_epoch))
    writer = stack.enter_context(Writer(directory.checkpoints, keep=run.loop.keep_checkpoints)) if world.is_main else None
    if world.is_main:
        directory.write_config(run)
        record_environment(directory, data, world, resumed=bool(resumed))
        directory.status("running", step=state.step, total_steps=total)
        if state.step == 0 and run.loop.progress is not Progressing.none:
            show_facts(facts(directory, stages, state.task))
    watchdog = stack.enter_context(Watchdog(run.distributed.timeout, world))
    profile_step = stack.enter_context(debug.instruments(run.debug, directory.path, is_main=world.is_main))
    vote = StopVote(world, signals.told)

    def alive() -> None:
        watchdog.tick()
        profile_step()
        if writer:
            signals.save_seconds = writer.save_seconds  # a deadline must leave time for one more

    if run.loop.lr_finder and state.step == 0:
        state, reason = lr_finder.before_run(stage, state, world, vote.poll, watchdog.tick, directory.path)
        if reason:
            raise stopped(reason, directory, world)
    while True:
        periods = stage.periods()
        display.enter(str(stage) if stage.labels else "", stages[-1].periods().epochs_at(total), periods.epochs_at)
        recorder = recorder_of(stage, directory, state, periods, world, journal, display, writer, alive)
        engine = Engine(
            state, world, stage.schedule(), periods, stage.run.loop, run.precision,
            seed=run.seed, reporter=recorder, poll=vote.poll, step_size=None if run.loop.drop_last else stage.data.order.step_size,
            describe_step=partial(describe, stage.data), inspect=debug.gradient_norms if run.debug.anomaly else None,
            decay=run.optimizer.decay_factor if run.optimizer.weight_decay_end is not None else None,
        )  # fmt: skip
        sets = loaders(stage.run, stage.data, state.task, world, state.step)
        reason = engine.fit(*sets)
        if reason or stage.number == stage.count:
            break
        close(sets)
        del engine  # and with it DDP's buffers
        before, old = stage, state
        stage, state = open_stage(stages[stage.number], world)
        carry(old, state, before, stage)
        del old
    if writer:
        writer.wait()
    if reason:
        raise stopped(reason, directory, world)
    if writer:
        writer.forget_previous()
    result = recorder.result(sum(p.numel() for p in state.task.parameters() if p.requires_grad))
    if world.is_main:
        with state.ema.swapped(state.task) if state.ema else ExitStack():
            save_safetensors(state.task.network(), directory.checkpoints / "model.safetensors")
        directory.write_result(result)
        directory.status("completed", step=state.step)
        show_result(result, directory.path)
    world.barrier()
    return result


def open_stage(stage: Stage, world: World, accumulate: int | None = None) -> tuple[Stage, TrainState]:
    """A stage and its fresh state; in micro-batches as large as fit where that is asked for, or as a checkpoint has found them."""
    state = begin(stage, world)
    if not stage.run.loop.batch_finder:
        return stage, state
    if accumulate is None:
        accumulate = batch_finder.fewest_micro_batches(stage, state, world)
        state = fresh_state(stage, state.task)
        images = stage.run.loop.batch_size // (world.size * accumulate)
        if world.is_main:
            print(f"micro-batches of {images} images fit: loop.accumulate={accumulate}", flush=True)
    state.accumulate = accumulate
    return stage.with_micro_batches(accumulate), state


def stopped(reason: int, directory: RunDirectory, world: World) -> TrainyardError:
    """The error that a run ends with which the ranks have agreed to stop."""
    error = stop_error(reason, directory.path)
    pruned = world.broadcast(directory.asked_to_prune() if world.is_main else None)
    if pruned is not None and not isinstance(error, Interrupted):
        error = Pruned(pruned)
    if world.is_main:  # said before the sinks are closed, which may take seconds that a preempted job does not have
        directory.status(ending(error), reason=str(error))
    return error


def find_lr(run: RunConfig, out: Path) -> dict[str, float]:
    """Sweep the learning rate of `run` and write the curve to `out`, without a run directory. Every rank calls this."""
    with StopSignals() as signals, open_world(run.distributed) as world, known_errors(run, world):
        set_backends(run, world.device)
        data = build_data(run)
        stage = stages_of(run, data)[0]
        state = begin(stage, world)
        start_from(run, state, world, data.train.classes)
        with Watchdog(run.distributed.timeout, world) as watchdog:
            found, _, reason = lr_finder.sweep(stage, state, world, StopVote(world, signals.told).poll, watchdog.tick)
        if reason:
            raise Interrupted("the sweep was stopped before its end")
        rates = lr_finder.conclude(found, run)
        if world.is_main:
            files = lr_finder.write(found, rates, out)
            print(lr_finder.words(found, rates), *files, sep="\n")
        return rates


def recorder_of(
    stage: Stage, directory: RunDirectory, state: TrainState, periods: Periods, world: World, journal: Journal, display: Display,
    writer: Writer | None, heartbeat: Callable[[], None],
) -> Recorder:  # fmt: skip
    metric, higher_is_better = best_metric(stage.run, state.task)
    return Recorder(
        stage.run, directory, state, periods, world, journal, display, writer, labels=stage.labels,
        portrait=portrait(to_plain(stage.portrait()), stage.data.info()), metric=metric, higher_is_better=higher_is_better, heartbeat=heartbeat,
    )  # fmt: skip


def finish_first(run: RunConfig, world: World, signals: StopSignals) -> None:
    """Train what another run needs, if that has not been done; where another process is at it, wait for its end."""
    directory = RunDirectory(run_directory(run))
    while True:
        with ExitStack() as stack:
            place = world.broadcast(_place(directory, stack) if world.is_main else None)
            if place == "ours":
                if world.is_main:
                    print(f"needed first, and kept for other runs: {directory}")
                stack.enter_context(open_log(directory.path, world.rank))
                with known_errors(run, world):
                    _train(run, directory, world, signals, stack)
            if place != "busy":
                return
        if reason := max(world.gather(int(signals.told()))):
            raise stop_error(reason)
        time.sleep(1.0)


def _place(directory: RunDirectory, stack: ExitStack) -> str:
    """finished, busy or ours; and if ours, claimed."""
    if directory.is_finished():
        return "finished"
    try:
        stack.enter_context(directory.claim())
    except Busy:
        return "busy"
    return "finished" if directory.is_finished() else "ours"


def find_checkpoint(run: RunConfig, directory: RunDirectory, world: World) -> dict[str, Any]:
    """The last good checkpoint, on every rank; {} at a start."""
    found = newest_good(directory.checkpoints) if world.is_main else None
    chosen: Path | None = world.broadcast(found[0] if found else None)
    if chosen is None:
        if run.resume is Resume.must:
            raise ConfigError(Problem("resume", "must", f"there is no checkpoint in {directory.checkpoints}", "resume=auto"))
        return {}
    saved = found[1] if found else load(chosen)
    if found and chosen.name != "last.pt":
        set_aside(directory.checkpoints / "last.pt")
    logger.info("going on at step %d, from %s", saved["step"], chosen)
    return saved


def start_from(run: RunConfig, state: TrainState, world: World, classes: Sequence[str]) -> None:
    """Load the weights of `init_from`, if there are to be any, and say what became of each."""
    if run.init_from is None:
        return
    from trainer import weights

    account = weights.load_weights(state.task, run.init_from, classes=classes or None)
    if state.ema:  # it began as a copy of the weights that were drawn
        state.ema.restart()
    if world.is_main:
        print(account)


def record_environment(directory: RunDirectory, data: Data, world: World, *, resumed: bool) -> None:
    """Write down what this start is made of, and say where it is something else than the start that it goes on from."""
    before = directory.read_environment() if resumed else {}
    now = write_environment(directory.path, ranks=world.size, data=data.fingerprints)
    for change in changes(before, now):
        logger.warning("%s; going on all the same. resume=never begins anew, beside this run", change)


def facts(directory: RunDirectory, stages: Sequence[Stage], task: Task) -> dict[str, str]:
    """What a person wants to see before the first step."""
    info, epochs = stages[-1].data.info(), stages[-1].data.steps_per_epoch
    parameters = [sum(p.numel() for p in task.parameters() if p.requires_grad or frozen) for frozen in (False, True)]
    length = f"{info.total_steps / epochs:g} epochs of {epochs:g}" if len(stages) == 1 else "; ".join(map(str, stages))
    frozen = "" if parameters[0] == parameters[1] else f" of {parameters[1]:,} train"
    classes = f" of {len(info.classes)} classes" if info.classes else ""
    return {
        "run": str(directory.path),
        "data": f"{info.num_train:,} images{classes} to train on, {info.num_val:,} to validate on",
        "model": f"{type(task.network()).__name__}, {parameters[0]:,}{frozen} parameters",
        "length": f"{info.total_steps:,} steps, {length}",
    }


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
    whole = run.task.whole_batch()
    effect = f"though {whole} looks at each micro-batch by itself then" if whole else "which changes nothing else"
    return ConfigError(Problem("loop.batch_size", run.loop.batch_size, reason, f"{halved}, {effect}"))
