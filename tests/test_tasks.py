"""Every task as it comes, made small: killed and resumed to the last bit, and the same on two ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.processes import finish, logs, start, start_ranks
from tests.test_exact import assert_same_run, last
from trainer import load_model
from trainer.launch import evaluate, export
from trainer.launch.compose import CONF, compose_run
from trainer.run import train
from trainer.rundir import RunDirectory

LENGTH = ["loop.batch_size=8", "loop.samples_per_epoch=24", "loop.epochs=2", "loop.log_every=1", "loop.progress=none", "logger.plots=false",
          "loop.max_validation_batches=2", "loop.max_reference_images=32", "loop.checkpoint_every_steps=1", "dataset.num_workers=1",
          "scheduler.warmup_epochs=0"]  # fmt: skip
SMALL: dict[str, list[str]] = {  # a task's own way of being small; all its features stay on
    # A plain transformer: the default one's batch statistics are each rank's own.
    "part_discovery": ["model=timm", "model.name=test_vit", "model.patch_size=8", "dataset.image_size=32", "dataset.num_val=18", "task.gumbel=true",
                       "task.threshold_quantile=0.05"],
    "classification": ["model=timm", "model.name=test_vit", "model.patch_size=4", "dataset.image_size=16", "augmentation.mixup=0.2"],
    "detection": ["model=timm", "model.name=test_convnext", "dataset.image_size=64", "dataset.num_val=17", "task.width=32", "task.score_threshold=0"],
    "dino": ["model=timm", "model.name=test_vit", "model.patch_size=4", "dataset.image_size=16", "task.method=dinov2", "task.out_dim=32",
             "task.hidden_dim=32", "task.bottleneck_dim=16", "augmentation.local_crops=2"],
    "kd": ["model=timm", "model.name=test_vit", "model.patch_size=4", "dataset.image_size=32", "task.teacher_model=test_resnet",
           "task.feature_weight=1", "augmentation.mixup=0.2", "loop.ema_decay=0.9"],
    "mim": ["model=timm", "model.name=test_vit", "model.patch_size=4", "dataset.image_size=16", "loop.ema_decay=0.9"],
}  # fmt: skip

TASKS = sorted(p.stem for p in (CONF / "task").glob("*.yaml"))


def ready(task: str, tmp_path: Path) -> list[str]:
    """Its overrides; what it needs to have been trained before is."""
    overrides = [f"task={task}", *LENGTH, *SMALL[task], f"runs_dir={tmp_path / 'runs'}"]
    run = compose_run(*overrides)
    for needed in run.task.prerequisites(run):
        train(needed)
    return overrides


@pytest.mark.parametrize("task", TASKS)
def test_every_task_killed_and_resumed_on_two_ranks(task: str, tmp_path: Path):
    overrides = ready(task, tmp_path)
    whole = start_ranks(tmp_path / "unbroken", overrides, 2)
    fault = {"TRAINYARD_CHECKPOINT_FAULT": "sync:kill:4"}  # rank 0 dies while it writes its fourth checkpoint
    broken = start_ranks(tmp_path / "killed", overrides, 2, environment=fault)
    assert finish(whole) == [0, 0], logs(tmp_path / "unbroken")
    assert finish(broken)[0] == -signal.SIGKILL, logs(tmp_path / "killed")
    assert 0 < last(tmp_path / "killed")["step"] < 6
    assert finish(start_ranks(tmp_path / "killed", overrides, 2)) == [0, 0], logs(tmp_path / "killed")
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_on_one_rank_sees_and_measures_what_two_do(task: str, tmp_path: Path):
    """The same samples; and the same validation of the untrained network, which no difference of the training can touch."""
    overrides = [*ready(task, tmp_path), "optimizer.lr=1e-12"]
    one, two = start(tmp_path / "one", overrides), start_ranks(tmp_path / "two", overrides, 2)
    assert finish([one, *two]) == [0, 0, 0], logs(tmp_path / "one") + logs(tmp_path / "two")
    assert last(tmp_path / "one")["samples"] == last(tmp_path / "two")["samples"]
    scores = [json.loads((tmp_path / name / "result.json").read_text())["last"] for name in ("one", "two")]
    assert scores[0].keys() == scores[1].keys()
    for name, value in scores[0].items():
        if name.startswith("val/") and "seconds" not in name:
            assert scores[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_measured_again_as_it_was(task: str, tmp_path: Path):
    """`python -m trainer evaluate` builds it from its run directory and gives the scores of its last validation, from the checkpoint alone."""
    overrides = [*ready(task, tmp_path), "loop.epochs=1"]
    last_scores = train(compose_run(*overrides), RunDirectory(tmp_path / "run"))["last"]
    assert evaluate.main([str(tmp_path / "run"), "checkpoint=last", "loop.max_validation_batches=2", "--name", "again"]) == 0
    again = json.loads((tmp_path / "run" / "evaluations" / "again" / "scores.json").read_text())
    timeless = lambda scores: {k: v for k, v in scores.items() if k.startswith("val/") and "seconds" not in k}  # noqa: E731
    assert timeless(again) == pytest.approx(timeless(last_scores), rel=1e-6, nan_ok=True)
    model: Any = load_model(tmp_path / "run", checkpoint="last")
    assert callable(model.transform) and model.classes is not None
    assert export.main([str(tmp_path / "run"), "checkpoint=last"]) == 0, "its weights in a file, with the outputs of the original"
