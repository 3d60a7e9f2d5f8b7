"""The recipes for classifiers, shrunk to a few steps on real photographs: on two ranks, killed and resumed to the last bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.conftest import RealData
from tests.processes import finish, logs, start_ranks
from tests.test_exact import assert_same_run, last

LENGTH = ["loop.batch_size=8", "loop.samples_per_epoch=16", "loop.log_every=1", "loop.progress=none", "logger.plots=false", "loop.validate_every=1",
          "loop.max_validation_batches=2", "loop.checkpoint_every_steps=1", "dataset.num_workers=0", "scheduler.warmup_epochs=0"]  # fmt: skip
NETWORK = ["model.stem=4", "model.widths=[4,8,8]", "model.blocks=[1,1,1]"]
SMALL = {  # a recipe's own way of being small; what it is made of stays
    "progressive_resizing": [*NETWORK, "loop.stages=[{epochs: 1, image_size: 16}, {epochs: 1, image_size: 24}, {epochs: 1, image_size: 32}]"],
    "cifar10_resnet": [*NETWORK, "loop.epochs=3"],
    "cifar10_vit": ["model.args={depth: 1, embed_dim: 24, num_heads: 2}", "loop.epochs=3"],
    "deit_vit_s": ["dataset.image_size=32", "+model.args={depth: 1, embed_dim: 24, num_heads: 2}", "loop.epochs=3"],
    "torchvision_resnet50_v1": ["dataset.image_size=32", "model.name=resnet18", "scheduler.decay_every=1", "loop.epochs=3"],
    "torchvision_resnet50_v2": ["dataset.image_size=32", "model.name=resnet18", "loop.ema_every=2", "loop.epochs=3"],
    "onecycle_resnet50": ["dataset.image_size=32", "model.name=resnet18", "loop.stages=[{epochs: 2}, {epochs: 1, mixup: 0, cutmix: 0}]"],
    "mae_cifar10": ["model.args={depth: 1, embed_dim: 24, num_heads: 2}", "loop.epochs=3", "loop.max_reference_images=32"],
    "dino_cifar10": ["loop.epochs=3", "task.out_dim=32", "task.hidden_dim=32", "loop.max_reference_images=32"],
    "kd_cifar10": [*NETWORK, "loop.epochs=3", "task.teacher_model=test_resnet"],
    "finetune_cifar10": ["model=resnet_micro", *NETWORK, "loop.epochs=3"],
    "linear_probe": ["dataset=image_folder", "dataset.image_size=32", "model=timm", "model.name=test_resnet", "loop.epochs=3"],
}  # fmt: skip
QUICK = ("progressive_resizing",)  # stages, batch normalisation, an average, bf16; the others' parts are in tests/test_choices.py


@pytest.mark.parametrize("recipe", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SMALL])
def test_killed_on_two_ranks_and_resumed(recipe: str, shared_data: RealData, tmp_path: Path):
    places = [f"dataset.path={shared_data / 'cifar10'}", f"runs_dir={tmp_path / 'runs'}"]
    overrides = [f"experiment={recipe}", *LENGTH, *SMALL[recipe], *places]
    whole = start_ranks(tmp_path / "unbroken", overrides, 2)
    if recipe == "kd_cifar10":  # its teacher is trained first, as a run of its own, which the fault is not meant for
        assert finish(whole) == [0, 0], logs(tmp_path / "unbroken")
    fault = {"TRAINYARD_CHECKPOINT_FAULT": "sync:kill:4"}
    broken = start_ranks(tmp_path / "killed", overrides, 2, environment=fault)
    assert finish(whole) == [0, 0], logs(tmp_path / "unbroken")
    assert finish(broken)[0] == -signal.SIGKILL, logs(tmp_path / "killed")
    assert 0 < last(tmp_path / "killed")["step"] < 6
    assert finish(start_ranks(tmp_path / "killed", overrides, 2)) == [0, 0], logs(tmp_path / "killed")
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")


def result_of(recipe: str, path: Path, directory: Path, seed: int, *others: str, name: str = "") -> dict:
    from trainer.launch.compose import compose_run
    from trainer.run import train
    from trainer.rundir import RunDirectory

    overrides = [f"experiment={recipe}", f"dataset.path={path}", f"seed={seed}", "loop.progress=none", "logger.plots=false", *others]
    return train(compose_run(*overrides), RunDirectory(directory / f"{name or recipe}-{seed}"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_growing_images_learn_as_well_in_less_time(shared_data: RealData, tmp_path: Path):
    """What the two recipes' headers promise; the mean of three seeds, each pair one after the other on the same machine."""
    from tests import thresholds

    path = shared_data / "cifar10"
    pairs = [[result_of(recipe, path, tmp_path, seed) for recipe in ("cifar10_resnet", "progressive_resizing")] for seed in range(3)]
    fixed, growing = ([pair[i]["best"]["val/top1"] for pair in pairs] for i in range(2))
    print(json.dumps({"fixed": fixed, "growing": growing, "seconds": [[r["seconds"] for r in pair] for pair in pairs]}))
    assert sum(fixed) / 3 >= thresholds.CIFAR_TOP1
    assert sum(growing) / 3 >= sum(fixed) / 3 - thresholds.GROWING_POINTS
    assert sum(pair[1]["seconds"] for pair in pairs) <= thresholds.GROWING_SECONDS * sum(pair[0]["seconds"] for pair in pairs)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("recipe", "model"), [("mae_cifar10", "vit_micro"), ("dino_cifar10", "resnet_micro")])
def test_what_is_learned_without_labels_is_of_use(recipe: str, model: str, shared_data: RealData, tmp_path: Path):
    """Nearest neighbours against the untrained network's, and fine-tuning against as many steps from scratch."""
    from tests import thresholds

    path = shared_data / "cifar10"
    still = ("optimizer.lr=1e-12", "loop.epochs=1", "loop.steps=null")
    before = result_of(recipe, path, tmp_path, 0, *still, name="untrained")["last"]["val/knn_top1"]
    after = result_of(recipe, path, tmp_path, 0)["last"]["val/knn_top1"]
    scratch, tuned = (
        result_of("finetune_cifar10", path, tmp_path, 0, f"model={model}", *begin, name=name)["last"]["val/top1"]
        for name, begin in (("scratch", ()), ("tuned", (f"init_from={tmp_path / f'{recipe}-0'}",)))
    )
    print(json.dumps({"untrained": before, "trained": after, "scratch": scratch, "tuned": tuned}))
    assert after >= before + thresholds.UNLABELLED_POINTS
    assert tuned > scratch


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_teacher_helps(shared_data: RealData, tmp_path: Path):
    """The mean of three seeds, against the same student on labels alone."""
    from tests import thresholds

    path = shared_data / "cifar10"
    result_of("cifar10_resnet", path, tmp_path, 0, "loop.epochs=8", name="teacher")
    teacher = f"task.teacher={tmp_path / 'teacher-0'}"
    with_one = [result_of("kd_cifar10", path, tmp_path, seed, teacher, name="kd")["last"]["val/top1"] for seed in range(3)]
    alone = [result_of("kd_cifar10", path, tmp_path, seed, "task.weight=0", name="alone")["last"]["val/top1"] for seed in range(3)]
    print(json.dumps({"with a teacher": with_one, "alone": alone}))
    assert sum(with_one) / 3 >= sum(alone) / 3 + thresholds.TEACHER_POINTS
