"""Every choice has been killed and resumed, and run on two ranks, on the day it is added.

Choices of different groups are combined: the n-th run takes the n-th choice of each, so each is in at least one.
"""

from __future__ import annotations

import signal
from itertools import cycle
from pathlib import Path

import pytest

from tests.any_task import KILL
from tests.layouts import LAYOUTS
from tests.processes import finish, logs, start, start_ranks
from tests.test_exact import SHORT, assert_same_run, last
from trainer.launch.compose import CONF, compose_run

NEEDED = {  # what a choice asks the user for
    ("optimizer", "timm"): ["optimizer.name=nadamw"],
    ("scheduler", "onecycle"): ["scheduler.warmup_epochs=0"],
}
COMMON = [
    *SHORT,
    "model=timm",
    "model.name=test_vit",
    "model.patch_size=8",
    "dataset.image_size=32",
    "loop.checkpoint_every_steps=2",
    "dataset.num_workers=1",
]
GROUPS = ["augmentation", "scheduler", "optimizer", "precision"]


def choices(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def combinations() -> list[list[str]]:
    columns = [choices(group) for group in GROUPS]
    longest = max(map(len, columns))
    endless = [cycle(c) for c in columns]
    rows = [[next(c) for c in endless] for _ in range(longest)]
    return [
        [word for group, choice in zip(GROUPS, row, strict=True) for word in (f"{group}={choice}", *NEEDED.get((group, choice), []))]
        for row in rows
    ]


def usable(overrides: list[str]) -> list[str]:
    """Multi-crop batches are for the task that learns from them."""
    return [o for o in overrides if o not in ("augmentation=dino",)]


@pytest.mark.parametrize("combination", combinations(), ids=lambda c: "-".join(w.split("=")[1] for w in c if w.split("=")[0] in GROUPS))
def test_every_choice_killed_on_two_ranks_and_resumed(combination, tmp_path):
    overrides = [*COMMON, *usable(combination)]
    compose_run(*overrides)
    whole = start_ranks(tmp_path / "unbroken", overrides, 2)
    fault = {"TRAINYARD_CHECKPOINT_FAULT": "sync:kill:3"}  # rank 0 dies while it writes its third checkpoint
    broken = start_ranks(tmp_path / "killed", overrides, 2, environment=fault)
    assert finish(whole) == [0, 0], logs(tmp_path / "unbroken")
    codes = finish(broken)
    assert codes[0] == -signal.SIGKILL, logs(tmp_path / "killed")
    assert codes[1] == 6, "the other rank ends too, and says why"
    assert 0 < last(tmp_path / "killed")["step"] < 9
    assert finish(start_ranks(tmp_path / "killed", overrides, 2)) == [0, 0], logs(tmp_path / "killed")
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")


ON_DISK = sorted(LAYOUTS)
EMBEDDED = ["digits", "digit_scenes", "digit_parts", "synthetic"]


def test_every_dataset_is_covered():
    elsewhere = {"hugging_face"}  # tests/trainer/data/test_formats_hugging_face.py, where its library is installed
    assert {*ON_DISK, *EMBEDDED} == set(choices("dataset")) - elsewhere


@pytest.mark.parametrize("name", [*ON_DISK, *EMBEDDED])
def test_every_dataset_killed_in_an_epoch_and_resumed(name, tmp_path):
    """kill -9 in the middle of the second epoch; by the test's own task, so that datasets are ready before theirs."""
    overrides = [*SHORT, f"dataset={name}", "dataset.image_size=32", "augmentation=basic", "loop.batch_size=8", "loop.samples_per_epoch=32",
                 "loop.checkpoint_every_steps=1", "dataset.num_workers=1", "task.label_smoothing=0"]  # fmt: skip
    if name in LAYOUTS:
        LAYOUTS[name](tmp_path / "data")
        overrides.append(f"dataset.path={tmp_path / 'data'}")
    unbroken = start(tmp_path / "unbroken", overrides, any_task=True)
    killed = start(tmp_path / "killed", overrides, environment={KILL: "6"}, any_task=True)
    assert finish([unbroken, killed]) == [0, -signal.SIGKILL], logs(tmp_path / "unbroken") + logs(tmp_path / "killed")
    assert 0 < last(tmp_path / "killed")["step"] <= 6
    assert finish([start(tmp_path / "killed", overrides, any_task=True)]) == [0], logs(tmp_path / "killed")
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")


def test_folders_and_shards_train_alike(tmp_path):
    """The same images from a folder and from shards packed of it: the same batches, so the same weights."""
    LAYOUTS["webdataset"](tmp_path / "shards")
    runs: list[Path] = []
    for name, path in (("image_folder", "folders"), ("webdataset", "shards")):
        overrides = [
            *SHORT,
            f"dataset={name}",
            f"dataset.path={tmp_path / path}",
            "dataset.image_size=32",
            "dataset.num_workers=0",
            "task.label_smoothing=0",
        ]
        assert finish([start(tmp_path / name, overrides, any_task=True)]) == [0], logs(tmp_path / name)
        runs.append(tmp_path / name)
    assert_same_run(*runs)
