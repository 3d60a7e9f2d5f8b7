"""What a run's network has learnt, judged by nearest neighbours: features of labelled images, and no training. It knows no task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from trainer.backends import set_backends
from trainer.config import RunConfig
from trainer.data.loader import Loader, validation_loader, worker_count
from trainer.data.source import Source
from trainer.distributed import World, open_world
from trainer.errors import ConfigError, Problem
from trainer.evaluation import Neighbours
from trainer.files import write_atomically
from trainer.inference import load_task
from trainer.run import known_errors
from trainer.rundir import RunDirectory
from trainer.task import Task
from trainer.watchdog import Watchdog


def knn(
    run: RunConfig, directory: RunDirectory, checkpoint: str, neighbours: Sequence[int], temperature: float, out: Path
) -> dict[str, Any]:
    """Ask the training images about the validation images; every rank calls this. Writes `out`/scores.json and returns what it holds.

    All training images are asked, whatever the run compared with while it went.

    Raises:
        ConfigError: the data have no labels, or one of the splits has no images.
    """
    with ExitStack() as stack:
        world = stack.enter_context(open_world(run.distributed))
        with known_errors(run, world):
            set_backends(run, world.device)
            watchdog = stack.enter_context(Watchdog(run.distributed.timeout, world))
            task, run, saved = load_task(directory.path, checkpoint, run)
            task.to(world.device).eval()
            train, val = run.dataset.build("train"), run.dataset.build("val")
            for split, source in (("train", train), ("val", val)):
                if source is None or not len(source):
                    raise ConfigError(
                        Problem("dataset.path", run.dataset.path, f"there are no images to {split} on", "dataset.val_fraction=0.1")
                    )
            judge = Neighbours(len(train.classes))
            for source, tell in ((train, judge.remember), (val, judge.ask)):
                loader = _loader(run, task, source, world)
                with torch.inference_mode(), _autocast(run, world):
                    for batch in loader:
                        tell(batch["index"], task.features(batch["image"]), batch["label"])
                        watchdog.tick()
            found = judge.accuracy(*neighbours, temperature=temperature)
            assert found is not None
            scores = {f"val/knn_top1_of_{k}": value for k, value in zip(neighbours, found, strict=True)}
            answer = {
                "run": str(directory.path), "checkpoint": checkpoint, "step": saved.get("step"), "temperature": temperature,
                "num_known": len(train), "num_samples": len(val), "image_size": run.dataset.image_size, **scores,
            }  # fmt: skip
            if world.is_main:
                out.mkdir(parents=True, exist_ok=True)
                write_atomically(out / "scores.json", json.dumps(answer, indent=1, ensure_ascii=False) + "\n")
            world.barrier()
            return answer


def _loader(run: RunConfig, task: Task, source: Source, world: World) -> Loader:
    """Every image once, as validation sees it, in the ranks' shares."""
    cfg = run.dataset
    return validation_loader(
        source, task.augmentation(train=False) or run.augmentation.build(cfg, train=False), world, seed=run.seed,
        batch_size=max(1, run.loop.batch_size // (world.size * run.loop.accumulate)), workers=worker_count(cfg.num_workers, world.local_size, world.device),
        prefetch=cfg.prefetch, timeout=cfg.worker_timeout, max_bad_samples=cfg.max_bad_samples, num_classes=len(source.classes) or None,
    )  # fmt: skip


def _autocast(run: RunConfig, world: World) -> Any:
    kind = run.precision.autocast
    return nullcontext() if kind is None else torch.autocast(world.device.type, dtype=getattr(torch, kind))
