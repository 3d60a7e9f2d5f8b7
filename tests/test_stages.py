"""A run in stages: resumed in any of them to the last bit, one stage like none, the order of the data that of an unstaged run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.processes import finish, logs, start, start_ranks
from tests.test_exact import MODELS, SHORT, assert_same, assert_same_run, last, run, stop_after
from trainer import load_model
from trainer.build import build_data
from trainer.engine import Engine
from trainer.errors import Stopped
from trainer.launch.compose import checked, compose, compose_run
from trainer.launch.evaluate import main as evaluate
from trainer.launch.plot_lr import main as plot_lr
from trainer.stages import stage_at, stages_of

VIT, RESNET = [*MODELS["vit"], "dataset.num_workers=0"], [*MODELS["batchnorm"], "dataset.num_workers=0"]
# 48 images an epoch: 3 steps of 16, then 2 of 24 in larger images, mixed, then 3 of which only the head trains.
THREE = "loop.stages=[{epochs: 1, image_size: 8}, {epochs: 1, image_size: 16, batch_size: 24, mixup: 0.8, lr_scale: 0.5}, {epochs: 1, freeze_to: backbone, data_fraction: 0.5}]"
STAGED = [THREE, "loop.epochs=3", "loop.ema_decay=0.9", "model.drop_rate=0.2"]


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("staged") / "unbroken"
    run(directory, *VIT, *STAGED)
    return directory


@pytest.mark.parametrize("at", [2, 3, 5])  # at the last step of the first stage, in the second, in the third
def test_stopped_in_any_stage_it_ends_in_the_same_bits(at: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stop_after(patch, at)
        with pytest.raises(Stopped):
            run(tmp_path / "broken", *VIT, *STAGED)
    assert last(tmp_path / "broken")["step"] == at + 1
    run(tmp_path / "broken", *VIT, *STAGED)
    assert_same_run(unbroken, tmp_path / "broken")


def test_killed_in_the_second_stage_on_two_ranks(tmp_path: Path):
    overrides = [
        *SHORT,
        *RESNET,
        THREE.replace("image_size: 16", "image_size: 48"),
        "loop.epochs=3",
        "loop.ema_decay=0.9",
        "loop.checkpoint_every_steps=1",
    ]
    whole = start_ranks(tmp_path / "unbroken", overrides, 2)
    fault = {"TRAINYARD_CHECKPOINT_FAULT": "sync:kill:5"}
    broken = start_ranks(tmp_path / "killed", overrides, 2, environment=fault)
    assert finish(whole) == [0, 0], logs(tmp_path / "unbroken")
    assert finish(broken)[0] == -signal.SIGKILL, logs(tmp_path / "killed")
    assert last(tmp_path / "killed")["step"] == 4, "in the second stage, of steps 4 and 5"
    assert finish(start_ranks(tmp_path / "killed", overrides, 2)) == [0, 0], logs(tmp_path / "killed")
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")


def test_evaluate_measures_at_the_size_of_the_last_stage(tmp_path: Path):
    sizes = "loop.stages=[{epochs: 1, image_size: 8}, {epochs: 1, image_size: 16}]"
    run(tmp_path / "run", *VIT, "dataset.image_size=24", sizes, "loop.epochs=2")
    assert evaluate([str(tmp_path / "run"), "checkpoint=last", "loop.max_validation_batches=2", "--name=it"]) == 0
    (measured,) = [json.loads(file.read_text()) for file in (tmp_path / "run" / "evaluations" / "it").glob("scores.json")]
    assert measured["image_size"] == 16
    assert measured["val/loss"] == [row["val/loss"] for row in rows(tmp_path / "run") if "val/loss" in row][-1]


def test_what_the_record_says_of_the_stages(unbroken: Path):
    record = [r for r in rows(unbroken) if "train/loss" in r]
    assert [(r["train/stage"], r["train/image_size"], r["train/batch_size"]) for r in record] == [(1, 8, 16)] * 3 + [(2, 16, 24)] * 2 + [
        (3, 16, 16)
    ] * 3
    assert [r["epoch"] for r in record] == pytest.approx([1 / 3, 2 / 3, 1, 1.5, 2, 7 / 3, 8 / 3, 3], abs=1e-3)
    assert record[-1]["samples"] == 48 * 3
    result = json.loads((unbroken / "result.json").read_text())
    assert [(r["step"], r["stage"], r["image_size"]) for r in result["history"]] == [(3, 1, 8), (5, 2, 16), (8, 3, 16)]
    # The best of the size that the model ends with: the second stage's counts, the first's does not compare.
    assert result["best"]["val/top1"] == max(r["val/top1"] for r in result["history"][1:])
    header = (unbroken / "epochs.csv").read_text().splitlines()[0].split(",")
    assert {"stage", "image_size", "batch_size"} <= set(header)


def test_what_is_frozen_does_not_move_and_the_model_takes_its_own_size(unbroken: Path):
    run(
        unbroken.parent / "two",
        *VIT,
        *STAGED[1:],
        "loop.epochs=2",
        THREE.replace(", {epochs: 1, freeze_to: backbone, data_fraction: 0.5}", ""),
    )
    two, three = last(unbroken.parent / "two")["task"], last(unbroken)["task"]
    assert [name for name in three if not torch.equal(two[name], three[name])] == ["model.head.weight", "model.head.bias"]
    model = load_model(unbroken, checkpoint="last")
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


# The head alone for three steps, then all of the network for six.
UNFREEZE = [
    "loop.stages=[{epochs: 1, freeze_to: backbone}, {epochs: 2, lr_scale: 0.5}]",
    "loop.ema_decay=0.9",
    "loop.max_validation_batches=1",
]


@pytest.mark.parametrize("schedule", ["each", "whole"])
@pytest.mark.parametrize("network", [VIT, RESNET], ids=["vit", "batchnorm"])
def test_an_unfrozen_network_killed_in_the_second_stage_ends_in_the_same_bits(network: list[str], schedule: str, tmp_path: Path):
    overrides = [*network, *UNFREEZE, f"loop.stage_schedule={schedule}", "scheduler=onecycle", "loop.checkpoint_every_steps=1"]
    run(tmp_path / "unbroken", *overrides)
    broken = start(tmp_path / "killed", [*SHORT, *overrides], environment={"TRAINYARD_CHECKPOINT_FAULT": "sync:kill:6"})
    assert finish([broken]) == [-signal.SIGKILL], logs(tmp_path / "killed")
    middle = last(tmp_path / "killed")
    assert 3 < middle["step"] < 9, "in the second stage"
    run(tmp_path / "killed", *overrides)
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")


@pytest.mark.parametrize("schedule", ["each", "whole"])
def test_what_is_unfrozen_learns_from_its_stage_on_and_its_average_begins_there(
    schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    overrides = [*RESNET, *UNFREEZE, f"loop.stage_schedule={schedule}"]
    seen: dict[int, tuple[dict, dict]] = {}  # step -> weights and averages after it
    original = Engine.train_step

    def train_step(self, stream):
        original(self, stream)
        copied = lambda state: {k: v.detach().clone() for k, v in state.items()}  # noqa: E731
        seen[self.state.step] = (copied(self.state.task.state_dict()), copied(self.state.ema.state_dict()))

    monkeypatch.setattr(Engine, "train_step", train_step)
    run(tmp_path / "run", *overrides)
    assert sorted(seen) == list(range(1, 10))
    head = {"model.fc.weight", "model.fc.bias"}
    moved = lambda a, b: {name for name in seen[a][0] if not torch.equal(seen[a][0][name], seen[b][0][name])}  # noqa: E731
    statistics = {name for name in seen[1][0] if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert moved(1, 3) - statistics == head
    assert moved(3, 4) >= {name for name in seen[1][1] if not name.endswith("running_mean")}
    trained = set(seen[9][1]) - statistics
    assert set(seen[3][1]) - statistics == head and trained > head and len(trained) > 20
    for name in trained - head:  # begun with the weights as they were when the stage began, and moved towards the step's
        (before, _), (after, average) = seen[3], seen[4]
        share = 1 - min(0.9, (1 + 3) / (10 + 3))
        torch.testing.assert_close(average[name], before[name].lerp(after[name], share), msg=name)
    for name in head:  # that of the first stage goes on
        torch.testing.assert_close(seen[4][1][name], seen[3][1][name].lerp(seen[4][0][name], 1 - 4 / 13), msg=name)


def test_one_stage_is_like_none(tmp_path: Path):
    run(tmp_path / "none", *VIT, "loop.ema_decay=0.9")
    run(tmp_path / "one", *VIT, "loop.ema_decay=0.9", "loop.stages=[{epochs: 3}]")
    assert_same_run(tmp_path / "none", tmp_path / "one")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_stages_that_change_nothing_under_one_schedule_are_like_none(optimizer: str, tmp_path: Path):
    """The optimizer's state, the data's order, epochs, noise and averages go on."""
    common = [*VIT, f"optimizer={optimizer}", "loop.ema_decay=0.9", "model.drop_rate=0.3", "scheduler=onecycle", "augmentation.mixup=0.5"]
    run(tmp_path / "none", *common)
    run(tmp_path / "two", *common, "loop.stages=[{epochs: 1}, {epochs: 2}]", "loop.stage_schedule=whole")
    a, b = last(tmp_path / "none"), last(tmp_path / "two")
    for key in ("task", "ema", "step", "samples", "best"):
        if key != "best":
            assert_same(a[key], b[key], key)
    for x, y in zip(a["optimizers"], b["optimizers"], strict=True):
        assert_same(x["state"], y["state"], "state")
    assert a["best"]["val/top1"] == b["best"]["val/top1"]


def test_the_order_of_the_data_is_that_of_an_unstaged_run():
    staged = compose_run("loop.stages=[{epochs: 2, batch_size: 32}, {epochs: 1, batch_size: 100}, {epochs: 2}]", "loop.drop_last=false")
    plain = compose_run("loop.epochs=5", "loop.drop_last=false")
    data, reference = build_data(staged), build_data(plain)
    seen: dict[int, list[np.ndarray]] = {}
    keys: dict[int, list[np.ndarray]] = {}
    for stage in stages_of(staged, data):
        for step in range(stage.start, stage.stop):
            draw = stage.data.order.step_samples(step)
            seen.setdefault(draw.epoch, []).append(draw.index)
            keys.setdefault(draw.epoch, []).append(draw.key)
            assert len(draw.index) == stage.data.order.step_size(step)
    assert sorted(seen) == [0, 1, 2, 3, 4]
    for epoch in seen:
        steps = range(epoch * reference.steps_per_epoch, (epoch + 1) * reference.steps_per_epoch)
        draws = [reference.order.step_samples(step) for step in steps]
        np.testing.assert_array_equal(np.concatenate(seen[epoch]), np.concatenate([d.index for d in draws]))
        np.testing.assert_array_equal(np.concatenate(keys[epoch]), np.concatenate([d.key for d in draws]))


def test_a_smaller_fraction_is_part_of_a_larger():
    staged = compose_run("loop.stages=[{epochs: 1, data_fraction: 0.3}, {epochs: 1, data_fraction: 0.6}]")
    first, second = (set(stage.data.order.rows.tolist()) for stage in stages_of(staged, build_data(staged)))  # type: ignore[union-attr]
    assert first < second and len(second) == round(0.6 * 1438)


def test_a_checkpoint_at_a_boundary_is_of_the_stage_before():
    stages = stages_of(staged := compose_run("loop.stages=[{epochs: 1}, {epochs: 2}]"), build_data(staged))
    assert [stage_at(stages, step).number for step in (0, 1, 22, 23, 66)] == [1, 1, 1, 2, 2]


STAGES = "loop.stages=[{epochs: 2}, {epochs: 3}]"


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        ([STAGES, "loop.epochs=6"], "loop.epochs", "2 + 3 = 5"),
        ([STAGES, "loop.steps=6"], "loop.steps", "make up 5 epochs"),
        (["loop.stages=[{epochs: 2}, {image_size: 32}]"], "loop.stages[1].epochs", "has no value"),
        (["loop.stages=[{epochs: 0}]"], "loop.stages[0].epochs", ">= 1"),
        (["loop.stages=[{epochs: 1, size: 32}]"], "loop.stages[0].size", ""),
        (["loop.stages=[{epochs: 1, batch_size: 5000}]"], "loop.stages[0].batch_size", "more than the 1438"),
        (["loop.stages=[{epochs: 1, batch_size: 30, accumulate: 4}]"], "loop.stages[0].batch_size", "multiple of 4"),
        (["model=vit_tiny", "loop.stages=[{epochs: 1, image_size: 33}]"], "loop.stages[0].image_size", "multiple of 16"),
        ([STAGES, "scheduler.warmup_epochs=4"], "scheduler.warmup_epochs", "in stage 1"),
        ([STAGES, "debug=overfit", "loop.stages=[{epochs: 2}]"], "loop.stages", "overfitting"),
        (["loop.stages=[{epochs: 1, batch_size: 32}, {epochs: 1}]", "loop.stage_schedule=whole", "scheduler.warmup_epochs=0.5"],
         "scheduler.warmup_epochs", "differ in length"),
    ],
)  # fmt: skip
def test_stages_that_do_not_add_up_are_refused(overrides: list[str], key: str, words: str):
    _, problems = checked(compose(overrides))
    found = [p for p in problems if p.key == key and words in p.reason]
    assert found, [str(p) for p in problems]


def test_an_equal_average_of_several_stages_is_refused(tmp_path: Path):
    from trainer.errors import ConfigError

    with pytest.raises(ConfigError, match="before the last stage"):
        run(tmp_path, *VIT, "loop.stages=[{epochs: 1}, {epochs: 2}]", "loop.swa_start=0.1")


def test_plot_lr_shows_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = ["loop.stages=[{epochs: 2, batch_size: 32}, {epochs: 3, lr_scale: 0.5}]", "scheduler=onecycle"]
    assert plot_lr([*overrides, "--out", str(tmp_path / "lr.png")]) == 0
    said = capsys.readouterr().out
    assert "stage 2" in said and (tmp_path / "lr.png").exists()
    peaks = [float(line.split()[2]) for line in said.splitlines() if "peak" in line and line.split()[0].isdigit()]
    assert peaks == pytest.approx([1e-3, 5e-4], rel=1e-3)
    starts = [int(line.split()[0]) for line in said.splitlines() if "stage 2" in line and line.split()[0].isdigit()]
    assert starts == [88], "two epochs of 44 steps"
