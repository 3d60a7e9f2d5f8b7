"""Ten steps of ours and ten of timm's own pieces, put together as its train.py does, from the same weights and batches: the same losses.

train.py itself is not in timm's wheel; what it is made of is: `create_optimizer_v2`, its losses, its clipping, its schedulers,
called in the order of its `train_one_epoch`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad

from tests.test_exact import MODELS
from tests.thresholds import PARITY_LOSS
from trainer.build import build_data, build_task
from trainer.data.loader import train_loader
from trainer.distributed import World
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory

STEPS, EPOCH = 10, 5
COMMON = [f"loop.steps={STEPS}", "loop.batch_size=16", f"loop.samples_per_epoch={16 * EPOCH}", "loop.log_every=1", "loop.progress=none",
          "loop.validate_every=null", "logger.plots=false", "dataset.num_workers=0"]  # fmt: skip

CASES: dict[str, tuple[list[str], dict[str, Any], dict[str, Any], Any]] = {
    # our overrides; timm's optimizer; its schedule (in updates); how it clips
    "adamw": (
        [*MODELS["vit"], "optimizer=adamw", "optimizer.lr=1e-3", "optimizer.weight_decay=0.1", "task.label_smoothing=0.1",
         "scheduler=cosine", "scheduler.final_fraction=0.01", "loop.max_grad_norm=1.0"],
        {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        {"sched": "cosine", "min_lr": 1e-5},
        (1.0, "norm"),
    ),
    "nesterov": (
        [*MODELS["batchnorm"], "optimizer=sgd", "optimizer.nesterov=true", "optimizer.lr=0.05", "optimizer.weight_decay=1e-3",
         "scheduler=step", "scheduler.decay_every_steps=3", "scheduler.gamma=0.5", "augmentation.mixup=0.8", "augmentation.cutmix=1.0"],
        {"opt": "sgd", "lr": 0.05, "weight_decay": 1e-3, "momentum": 0.9},
        {"sched": "step", "decay_epochs": 3 / EPOCH, "decay_rate": 0.5},
        None,
    ),
    "lamb": (
        [*MODELS["vit"], "optimizer=lamb", "optimizer.lr=5e-3", "optimizer.weight_decay=0.02", "scheduler=polynomial", "scheduler.power=2",
         "scheduler.final_fraction=0", "scheduler.warmup_steps=4", "scheduler.warmup_start=0.1", "loop.max_grad_norm=0.02", "loop.clip_mode=agc"],
        {"opt": "lamb", "lr": 5e-3, "weight_decay": 0.02},
        {"sched": "poly", "decay_rate": 2.0, "min_lr": 0.0, "warmup_epochs": 4 / EPOCH, "warmup_lr": 5e-4, "warmup_prefix": True,
         "num_epochs": (STEPS - 4) / EPOCH},  # timm counts a warm-up that comes before beside the epochs
        (0.02, "agc"),
    ),
    "layer_decay": (
        [*MODELS["vit"], "optimizer=adamw", "optimizer.lr=2e-3", "optimizer.weight_decay=0.05", "optimizer.layer_decay=0.65",
         "scheduler=cosine", "scheduler.final_fraction=0"],
        {"opt": "adamw", "lr": 2e-3, "weight_decay": 0.05, "layer_decay": 0.65},
        {"sched": "cosine", "min_lr": 0.0},
        None,
    ),
}  # fmt: skip


def by_timm(overrides: list[str], optimizer: dict[str, Any], schedule: dict[str, Any], clip: Any) -> list[float]:
    run = compose_run(*COMMON, *overrides)
    data, world = build_data(run), World()
    start = build_task(run, data, torch.device("cpu"), 1).state_dict()
    extra: dict[str, Any] = {"patch_size": run.model.patch_size, "img_size": run.dataset.image_size} if run.model.patch_size else {}
    model = timm.create_model(run.model.name, num_classes=10, **extra)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in start.items()})
    opt = create_optimizer_v2(model, **optimizer)
    rates = create_scheduler_v2(opt, **{"num_epochs": STEPS // EPOCH, **schedule}, updates_per_epoch=EPOCH, step_on_epochs=False)[0]
    assert rates is not None
    batches = train_loader(data.train, run.augmentation.build(run.dataset, train=True), data.order, world, num_classes=10)
    losses = []
    rates.step_update(0)
    model.train()
    for update, batch in enumerate(itertools.islice(batches, STEPS)):
        soft = "target" in batch
        smooth = run.task.label_smoothing  # type: ignore[attr-defined]
        loss_fn = SoftTargetCrossEntropy() if soft else LabelSmoothingCrossEntropy(smooth) if smooth else torch.nn.CrossEntropyLoss()
        loss = loss_fn(model(batch["image"]), batch["target"] if soft else batch["label"])
        opt.zero_grad()
        loss.backward()
        if clip:
            dispatch_clip_grad(model_parameters(model, exclude_head=clip[1] == "agc"), value=clip[0], mode=clip[1])
        opt.step()
        rates.step_update(update + 1)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_have_the_same_losses(case: str, tmp_path: Path):
    overrides, *theirs = CASES[case]
    expected = by_timm(overrides, *theirs)
    train(compose_run(*COMMON, *overrides), RunDirectory(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == STEPS and max(expected) - min(expected) > 0.02, "something is learned that could differ"
    assert losses == pytest.approx(expected, rel=PARITY_LOSS)
