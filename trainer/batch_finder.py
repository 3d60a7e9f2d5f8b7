"""Into how few micro-batches can a rank's share of the batch be cut? The fewest that fit into its memory, by trying.

The batch over all ranks stays what it is, so the run is the same run; only its micro-batches are as large as can be.
"""

from __future__ import annotations

import dataclasses
import gc
import logging

import torch

from trainer.config import LoopConfig
from trainer.distributed import World
from trainer.engine import Engine, Periods
from trainer.errors import ConfigError, Problem
from trainer.feeds import close, loaders
from trainer.lr_finder import Listener, Rising, kept
from trainer.stages import Stage
from trainer.state import TrainState

logger = logging.getLogger(__name__)

STEPS = 2  # optimizers make their state in the first, so the second needs most
SHARE = 0.95  # of a GPU's memory that a trial may take: the loader's and the validation's share has to fit beside it


def fewest_micro_batches(stage: Stage, state: TrainState, world: World) -> int:
    """The least `loop.accumulate`, from the config's on, with which two optimizer steps fit. Collective.

    `state` is worn out afterwards: make a fresh one.
    """
    loop = stage.run.loop
    share = loop.batch_size // world.size
    for count in range(loop.accumulate, share + 1):
        if share % count:
            continue
        with kept(state.task):
            fits = _fits(stage.with_micro_batches(count), state, world)
        # The ranks try by themselves, without a word between them: one that runs out of memory would leave the others waiting.
        if world.sum(torch.tensor(0.0 if fits else 1.0)).item() == 0:
            return count
        logger.info("micro-batches of %d images do not fit", share // count)
    reason = f"not even one image at a time fits into the memory of {world.device}"
    raise ConfigError(
        Problem("loop.batch_finder", True, reason, "a smaller model or dataset.image_size, or loop.activation_checkpointing=true")
    )


def _fits(stage: Stage, state: TrainState, world: World) -> bool:
    run = stage.run
    alone = World(device=world.device)
    periods = Periods(total=STEPS, epoch=STEPS, log=STEPS, validate=0, checkpoint=0)
    schedule = Rising(1e-30, 1e-30, STEPS, 1.0)
    gpu = world.device.type == "cuda"
    sets = loaders(run, stage.data, state.task, world, stage.start)
    state = dataclasses.replace(state, step=0)
    if gpu:
        torch.cuda.set_per_process_memory_fraction(SHARE, world.device)
    try:
        loop = dataclasses.replace(_share(run.loop, world.size), max_bad_steps=STEPS + 1)
        engine = Engine(
            state,
            alone,
            schedule,
            periods,
            loop,
            run.precision,
            seed=run.seed,
            reporter=Listener(schedule, lambda: None),
            poll=lambda step: 0,
        )
        engine.fit(sets[0], None)
        return True
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error) and "can't allocate" not in str(error):
            raise
        return False
    finally:
        close(sets)
        for parameter in state.task.parameters():
            parameter.grad = None
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, world.device)


def _share(loop: LoopConfig, ranks: int) -> LoopConfig:
    """The loop of one rank on its own."""
    return dataclasses.replace(loop, batch_size=loop.batch_size // ranks)
