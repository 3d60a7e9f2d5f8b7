"""Rules between the parts of a run: each fires where it should, with a way out that silences it, and nowhere else."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks  # noqa: F401
from trainer import cautions, validation
from trainer.cautions import warnings_of
from trainer.config import RunConfig
from trainer.config.dataset import is_test
from trainer.config.loop import StageConfig
from trainer.data.order import Order
from trainer.errors import ConfigError, Problem
from trainer.launch.compose import checked, compose, compose_run
from trainer.surroundings import emulates_bf16, surroundings
from trainer.validation import problems_of, steps_per_epoch, validate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sound() -> RunConfig:
    return compose_run("dataset=synthetic", "dataset.num_train=640", "loop.batch_size=32", "model=vit_tiny", "loop.epochs=4")


def changed(run: RunConfig, **changes: Any) -> RunConfig:
    """A copy with other values: `loop__batch_size=3` for run.loop.batch_size."""
    run = copy.deepcopy(run)
    for path, value in changes.items():
        *parts, last = path.split("__")
        owner = run
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return run


def told(run: RunConfig) -> dict[str, Problem]:
    return {p.key: p for p in problems_of(run)}


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch):
    """Pretend to be one of `size` processes that torchrun has started, on a host with `gpus`."""

    def pretend(size: int = 1, gpus: int = 0) -> None:
        if size > 1:
            for name, value in {
                "RANK": 0,
                "WORLD_SIZE": size,
                "LOCAL_RANK": 0,
                "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": 1,
            }.items():
                monkeypatch.setenv(name, str(value))
            assert surroundings().size == size
        for module in (validation, cautions):
            monkeypatch.setattr(module, "visible_gpus", lambda: gpus)

    return pretend


def test_a_sound_run_has_no_problems(sound):
    assert list(problems_of(sound)) == []
    assert list(warnings_of(sound)) == []
    validate(sound)


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"dataset__image_size": 30}, "dataset.image_size", "multiple of 16"),
        ({"loop__batch_size": 33, "loop__accumulate": 2}, "loop.batch_size", "multiple of 2"),
        ({"loop__batch_size": 1000}, "loop.batch_size", "more than the 640 training images"),
        ({"dataset__train_fraction": 0.01}, "loop.batch_size", "more than the 6 training images"),
        ({"loop__samples_per_epoch": 8}, "loop.samples_per_epoch", "less than one batch"),
        ({"scheduler__warmup_epochs": 9.0}, "scheduler.warmup_epochs", "of the run's 80 optimizer steps"),
        ({"loop__epochs": 3, "loop__steps": 3}, "loop.steps", "one length"),
        ({"loop__best_metric": "top1"}, "loop.best_metric", "validation metric"),
        ({"dataset__mean": [0.5, 0.5], "dataset__std": [0.5, 0.5]}, "dataset.mean", "each of the 3 channels"),
        ({"dataset__mean": [], "dataset__std": []}, "dataset.mean", "each of the 3 channels"),
        ({"model__in_channels": 1}, "model.in_channels", "images have 3 channels"),
        ({"dataset__num_classes": 1}, "dataset.path", "at least two"),
        ({"init_from": "/nowhere/last.pt"}, "init_from", "no such file"),
        ({"name": "../elsewhere"}, "name", "folder"),
        ({"version": "a/b"}, "version", "folder"),
        ({"logger__wandb__project": "a/b"}, "logger.wandb.project", "W&B takes"),
        ({"logger__wandb__resume_id": "x:y"}, "logger.wandb.resume_id", "W&B takes"),
        ({"logger__wandb__tags": ["fine", ""]}, "logger.wandb.tags", "1 to 64"),
        ({"augmentation__crop_ratio": [2.0, 1.0]}, "augmentation.crop_ratio", "smallest to the largest"),
        ({"optimizer__no_decay": ["("]}, "optimizer.no_decay[0]", "regular expression"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr", "finite"),
        ({"dataset__num_workers": "some"}, "dataset.num_workers", "or auto"),
    ],
)
def test_a_rule_fires(sound, changes, key, says):
    problems = told(changed(sound, **changes))
    assert key in problems, problems
    assert says in problems[key].reason


def test_the_ways_out_mend(sound):
    """Each fix that is an override, applied to the run as the user would, silences its rule."""
    bad = ["dataset.image_size=30", "loop.batch_size=5000", "scheduler.warmup_epochs=90", "loop.best_metric=top1", "logger.wandb.project=a/b", "name=../x",
           "dataset.mean=[0.5,0.5]", "model.in_channels=1"]  # fmt: skip
    good = ["dataset=synthetic", "model=vit_tiny"]
    for override in bad:
        with pytest.raises(ConfigError) as caught:
            compose_run(*good, override)
        problem = next(p for p in caught.value.problems if isinstance(p, Problem) and p.key == override.split("=")[0])
        compose_run(*good, problem.fix.partition(", or ")[0])


def test_every_rule_speaks_though_others_have(sound):
    bad = changed(
        sound,
        optimizer__lr=-1.0,
        loop__batch_size=33,
        loop__accumulate=2,
        dataset__image_size=30,
        scheduler__warmup_epochs=99.0,
        dataset__mean=[0.5],
        dataset__std=[0.5, 1.0],
    )
    assert {"optimizer.lr", "loop.batch_size", "dataset.image_size", "scheduler.warmup_epochs"} <= set(told(bad))


def test_a_rule_that_stumbles_over_a_bad_value_keeps_quiet(sound):
    assert set(told(changed(sound, loop__batch_size=0))) == {"loop.batch_size"}
    assert set(told(changed(sound, loop__accumulate=0))) == {"loop.accumulate"}


def test_a_missing_value_ends_the_check(sound):
    assert set(told(changed(sound, optimizer__lr="???"))) == {"optimizer.lr"}


# Between the parts


def test_the_dataset_must_hold_what_the_task_learns_from(sound, monkeypatch):
    run = copy.deepcopy(sound)
    monkeypatch.setattr(type(run.dataset), "offers", frozenset({"image"}))
    problem = told(run)["dataset"]
    assert "no label" in problem.reason
    assert problem.fix == "dataset=digits"  # embedded ones first


def test_classes_cannot_be_balanced_without_labels(sound, monkeypatch):
    run = changed(sound, dataset__class_balanced=True)
    monkeypatch.setattr(type(run.dataset), "offers", frozenset({"image"}))
    monkeypatch.setattr(type(run.task), "needs", frozenset({"image"}))
    assert set(told(run)) == {"dataset.class_balanced"}


def test_the_model_must_offer_what_the_task_asks(sound, monkeypatch):
    run = copy.deepcopy(sound)
    monkeypatch.setattr(type(run.task), "asks", frozenset({"features", "patches_of_gold"}))
    assert "patches_of_gold" in told(run)["model"].reason


def test_without_labels_there_is_nothing_to_mix(sound, monkeypatch):
    run = changed(sound, augmentation__mixup=0.2, augmentation__cutmix=1.0)
    assert not told(run)
    monkeypatch.setattr(type(run.task), "needs", frozenset({"image"}))
    assert set(told(run)) == {"augmentation.mixup", "augmentation.cutmix"}


# Ranks and devices


def test_the_batch_is_cut_up_evenly(sound, ranks):
    ranks(3)
    problem = told(sound)["loop.batch_size"]
    assert "multiple of 3" in problem.reason
    assert problem.fix == "loop.batch_size=33"
    assert not told(changed(sound, loop__batch_size=36, loop__accumulate=4))
    assert "3 ranks x 4 micro-batches" in told(changed(sound, loop__batch_size=40, loop__accumulate=4))["loop.batch_size"].reason


def test_local_ranks_count_too(sound):
    assert "multiple of 5" in told(changed(sound, distributed__processes=5))["loop.batch_size"].reason


def test_processes_are_not_asked_for_twice(sound, ranks):
    ranks(2)
    assert set(told(changed(sound, distributed__processes=4))) == {"distributed.processes"}
    assert not told(changed(sound, distributed__processes=2))
    assert not told(changed(sound, distributed__processes=1))  # as debug=tiny has it


def test_batch_statistics_are_synchronised_on_gpus_only(sound, ranks):
    ranks(2)
    assert set(told(changed(sound, loop__sync_batchnorm=True))) == {"loop.sync_batchnorm"}
    ranks(2, gpus=2)
    assert not told(changed(sound, loop__sync_batchnorm=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision__autocast": "float16"}, "no GPU"),
        ({"precision__autocast": "bfloat16"}, "emulate"),
        ({"dataset__num_workers": 4096}, "more processes than"),
        ({"optimizer__base_batch_size": 64}, "no effect"),
        ({"logger__wandb__watch": True}, "W&B is off"),
        ({"model__pretrained": True, "init_from": "timm:pretrained"}, "replaces the weights"),
    ],
)
def test_a_warning_is_no_error(sound, ranks, monkeypatch, changes, says):
    ranks(1, gpus=0)
    monkeypatch.setattr(cautions, "emulates_bf16", lambda: True)
    run = changed(sound, **changes)
    assert not told(run)
    (warning,) = warnings_of(run)
    assert says in warning
    of_host = changes.keys() & {"precision__autocast", "dataset__num_workers"}
    assert list(warnings_of(run, here=False)) == ([] if of_host else [warning])  # a login node is no compute node


WHOLE_BATCH = {
    "presence": (["task=part_discovery"], "task.presence_weight=1 "),
    "balanced": (["task=dino"], "task.centering=sinkhorn "),
    "koleo": (["task=dino", "task.centering=mean", "task.koleo_weight=0.1"], "task.koleo_weight=0.1 "),
    "nothing": (["task=part_discovery", "task.presence_weight=0"], None),
    "a running centre": (["task=dino", "task.centering=mean"], None),
    "each image": (["task=classification"], None),
}


@pytest.mark.parametrize("name", WHOLE_BATCH)
def test_cutting_up_a_batch_that_the_loss_looks_at_as_a_whole_is_warned_of(name):
    """The way out, loop.accumulate=1, is what the same run without it has: it warns of nothing."""
    overrides, term = WHOLE_BATCH[name]
    run = compose_run(*overrides)
    assert list(warnings_of(run, here=False)) == []
    cuts = [
        {"loop__accumulate": 2},
        {"loop__batch_finder": True},
        {"loop__stages": [StageConfig(epochs=1), StageConfig(epochs=1, accumulate=2)]},
    ]
    for cut in cuts:
        found = list(warnings_of(changed(run, **cut), here=False))
        assert len(found) == (term is not None)
        assert all(term in text and "micro-batch" in text and "loop.accumulate=1" in text for text in found)


TEST_IMAGES = {
    "cub": (["dataset=cub"], "test", "dataset.val_fraction=0.1"),
    "meta_shift": (["dataset=meta_shift"], "test", "dataset.val_fraction=0.1"),
    "siim_acr": (["dataset=siim_acr"], "full_test_set", "dataset.val_fraction=0.1"),
    "waterbirds": (["dataset=waterbirds", "dataset.validate_on=test"], "test", "dataset.validate_on=val"),
    "image_folder": (["dataset=image_folder", "dataset.val_path=/data/test2017"], "test2017", "dataset.val_fraction=0.1"),
}


@pytest.mark.parametrize("name", TEST_IMAGES)
def test_choosing_the_best_on_test_images_is_warned_of(name):
    overrides, split, out = TEST_IMAGES[name]
    for path, warned in (([], True), ([out, "dataset.val_path=null"], False)):
        run, _ = checked(compose([*overrides, *path, "dataset.path=/data/somewhere"]))
        assert run is not None
        found = list(warnings_of(run, here=False))
        assert (split in run.dataset.validates_on()) == warned
        assert len(found) == warned
        assert all(f"({split})" in text and out in text for text in found)


def test_names_of_test_sets():
    assert all(map(is_test, ("test", "full_test_set", "Test", "test2017", "my-test")))
    assert not any(map(is_test, ("val", "latest", "contest", "train")))


def test_half_precision_on_a_gpu_is_fine(sound, ranks):
    ranks(1, gpus=1)
    assert not list(warnings_of(changed(sound, precision__autocast="float16")))


def test_what_torch_says_of_bf16_is_what_we_say():
    import torch

    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else True
    assert emulates_bf16() == (platform.machine() == "x86_64" and not supported)


# Data on disk


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"dataset\.path"):
        compose_run("dataset=image_folder", f"dataset.path={tmp_path}/nothing")


def test_one_class_is_not_enough(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "only" / "a.jpg")
    with pytest.raises(ConfigError, match="at least two"):
        compose_run("dataset=image_folder", f"dataset.path={tmp_path}", "loop.batch_size=1")


def test_an_index_that_cannot_be_read(sound, monkeypatch):
    def unreadable(self):
        raise PermissionError(13, "Permission denied", "/data/train")

    run = copy.deepcopy(sound)
    monkeypatch.setattr(type(run.dataset), "facts", unreadable)
    problem = told(run)["dataset.path"]
    assert (problem.value, problem.reason) == ("/data/train", "Permission denied")


# The same arithmetic as the order's


@given(
    size=st.integers(1, 500), batch=st.integers(1, 64), drop=st.booleans(), virtual=st.none() | st.integers(1, 700), repeats=st.integers(1, 3),
    fraction=st.floats(0.01, 1.0), balanced=st.booleans(),
)  # fmt: skip
def test_the_length_of_an_epoch_is_the_orders(size, batch, drop, virtual, repeats, fraction, balanced):
    run = changed(
        BASE,
        loop__batch_size=batch,
        loop__drop_last=drop,
        loop__samples_per_epoch=virtual,
        dataset__repeats=repeats,
        dataset__train_fraction=fraction,
    )
    labels = np.arange(size) % 3 if balanced else None
    order = Order(
        size, seed=0, batch_size=batch, drop_last=drop, samples_per_epoch=virtual, repeats=repeats, fraction=fraction, labels=labels
    )
    assert steps_per_epoch(run, size) == order.steps_per_epoch


BASE = compose_run("dataset=synthetic")


def test_overfitting_has_an_epoch_of_one_batch():
    assert steps_per_epoch(changed(BASE, debug__overfit=True), 1000) == 1
    assert steps_per_epoch(changed(BASE, debug__overfit=True), 10) == 1


def test_checking_a_run_loads_neither_torch_nor_numpy():
    code = "import sys, tasks\nfrom trainer.launch.compose import compose_run\ncompose_run('seed=1')\nprint({'torch', 'numpy', 'PIL', 'matplotlib', 'submitit'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
