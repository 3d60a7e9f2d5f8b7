"""This project's engine with everything that a run has around it: keyed randomness, schedule, clipping, averaged weights,
metrics, the non-finite guard, the vote on stopping, the watchdog, the journal and its log line every 50 steps."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.workload import CLIP, EMA_WEIGHT, HORIZON, LOG_EVERY, PEAK_RATE, Stamped, workload

OVERRIDES = [
    f"loop.max_grad_norm={CLIP}",
    f"loop.ema_decay={1 - EMA_WEIGHT}",
    f"loop.log_every={LOG_EVERY}",
    f"optimizer.lr={PEAK_RATE}",
    "optimizer.weight_decay=0",  # one parameter group, as in the other loops
    "scheduler=cosine",
    "loop.progress=none",
    "logger.plots=false",
]


def engine(net: str, device: str = "cpu") -> Callable[[], float]:
    """Microseconds per step; a block is one `Engine.fit`."""
    work = workload(net, device)
    batches = Stamped([_batch(x, y) for x, y in work.batches], work.steps)
    fit = prepare(work.model, num_classes=10)

    def block() -> float:
        fit(batches, steps=len(batches))
        return batches.microseconds()

    return block


def prepare(model: torch.nn.Module, num_classes: int, overrides: list[str] | None = None) -> Callable[..., None]:
    """`fit(batches, steps)`, which trains `model` as a classifier for that many further steps."""
    from tasks.classification.config import ClassificationConfig
    from tasks.classification.task import Classification

    return prepare_task(Classification(model, ClassificationConfig(), [str(c) for c in range(num_classes)]), overrides)


def prepare_task(task: Any, overrides: list[str] | None = None) -> Callable[..., None]:
    """`fit(batches, steps)`, which trains `task` for that many further steps."""
    from trainer.distributed import World
    from trainer.engine import Engine, Periods
    from trainer.log import open_display
    from trainer.recorder import Recorder
    from trainer.stages import build_state
    from trainer.vote import StopVote

    parts = Surroundings(overrides or [])
    run, world = parts.run, World(rank=0, size=1, local_rank=0, local_size=1, device=next(task.parameters()).device)
    state = build_state(run, task)
    periods = Periods(total=HORIZON, epoch=HORIZON, log=LOG_EVERY, validate=0, checkpoint=0)

    def fit(stream: Any, steps: int) -> None:
        end = state.step + steps
        display = open_display(run.loop.progress, True, HORIZON, HORIZON)
        recorder = Recorder(
            run, parts.directory, state, periods, world, parts.journal, display, None,
            portrait={}, metric="val/top1", higher_is_better=True, heartbeat=parts.heartbeat(world),
        )  # fmt: skip
        vote = StopVote(world, parts.signals.told)
        schedule = run.scheduler.build(HORIZON, HORIZON)
        engine = Engine(
            state, world, schedule, periods, run.loop, run.precision,
            seed=0, reporter=recorder, poll=lambda step: vote.poll(step) or step >= end,
        )  # fmt: skip
        engine.fit(stream, None)

    return fit


class Surroundings:
    """What `trainer.run` lays around an engine: a run directory that is ours, its journal, the signals. Until the process ends."""

    def __init__(self, overrides: list[str]) -> None:
        import tasks  # noqa: F401  (registers the tasks' schemas)
        from trainer.launch.compose import compose_run
        from trainer.log import open_journal
        from trainer.rundir import RunDirectory
        from trainer.signals import StopSignals

        self.stack = ExitStack()
        atexit.register(self.stack.close)
        scratch = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.run = compose_run(*OVERRIDES, f"runs_dir={scratch}", *overrides)
        self.directory = RunDirectory(Path(scratch) / "run")
        self.stack.enter_context(self.directory.claim())
        self.signals = self.stack.enter_context(StopSignals(max_hours=None))
        self.journal = self.stack.enter_context(open_journal(self.directory.path, self.run, True))
        self.journal.rewind(0)

    def heartbeat(self, world: Any) -> Callable[[], None]:
        from trainer.watchdog import Watchdog

        return Watchdog(self.run.distributed.timeout, world).tick


def _batch(x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    return {"image": x, "label": y, "key": y, "index": y, "count": len(y)}
