"""Whole runs of the detection task: stopped and resumed, in every precision, with what they leave behind."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tasks  # noqa: F401  (its schemas)
from tests import layouts
from tests.processes import finish, logs, start_ranks
from tests.test_exact import assert_same_run, last, stop_after
from tests.test_launch import Call
from tests.thresholds import OVERFIT_MAP_50
from trainer import load_model
from trainer.data.shards.verbs import shards
from trainer.errors import Diverged, Stopped
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory
from trainer.sweep.manifest import Manifest

SHORT = ["task=detection", "dataset.image_size=64", "loop.batch_size=4", "loop.samples_per_epoch=8", "loop.epochs=3", "loop.log_every=1",
         "loop.progress=none", "logger.plots=false", "loop.max_validation_batches=2", "task.width=64", "task.score_threshold=0",
         "dataset.num_workers=0"]  # fmt: skip
RESNET, CONVNEXT = (["model=timm", f"model.name={name}"] for name in ("test_resnet", "test_convnext"))
FEW = ["task.roi_samples=8", "+task.args.rpn_post_nms_top_n_train=32", "+task.args.rpn_post_nms_top_n_test=32"]
SCENES = ["dataset.num_train=16", "dataset.num_val=9", *FEW]
RUNS: dict[str, list[str]] = {
    "faster_rcnn-fp16": [*RESNET, *SCENES, "loop.ema_decay=0.9", "augmentation=boxes_large_jitter", "precision=fp16"],
    "faster_rcnn_v2": [*RESNET, *SCENES, "task.detector=faster_rcnn_v2"],
    "retinanet-accumulated": [*CONVNEXT, *SCENES[:2], "task.detector=retinanet", "loop.accumulate=2"],
    "retinanet_v2-bf16": [*CONVNEXT, *SCENES[:2], "task.detector=retinanet_v2", "precision=bf16"],
    "fcos-vit": ["model=timm", "model.name=test_vit", *SCENES[:2], "task.detector=fcos", "augmentation.shorter_side=[40,64]"],
    "ssdlite-mosaic": [*RESNET, *SCENES[:2], "task.detector=ssdlite", "augmentation.mosaic=0.7", "augmentation.mosaic_epochs=2",
                       "dataset.num_workers=2"],
}  # fmt: skip
TERMS = {
    "faster_rcnn": ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"],
    "retinanet": ["classification", "bbox_regression"],
    "fcos": ["classification", "bbox_regression", "bbox_ctrness"],
    "ssdlite": ["classification", "bbox_regression"],
}


def run(directory: Path, *overrides: str):
    return train(compose_run(*SHORT, *overrides), RunDirectory(directory))


def resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> Path:
    """The directory of a run that was never stopped and of one that was, after the third of six steps, compared."""
    run(tmp_path / "unbroken", *overrides)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            run(tmp_path / "broken", *overrides)
    assert last(tmp_path / "broken")["step"] == 3
    run(tmp_path / "broken", *overrides)
    assert last(tmp_path / "broken")["step"] == 6
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")
    return tmp_path / "unbroken"


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_to_the_last_bit(name, tmp_path, monkeypatch):
    directory = resumed(tmp_path, monkeypatch, RUNS[name])
    rows = list(csv.DictReader((directory / "batches.csv").read_text().splitlines()))
    terms = TERMS[name.partition("-")[0].partition("_v2")[0]]
    assert len(rows) == 6
    for row in rows:
        parts = sum(float(row[f"train/{term}"]) for term in terms)
        assert float(row["train/loss"]) == pytest.approx(parts, rel=0.01), "the terms that the loss is the sum of"
    result = json.loads((directory / "result.json").read_text())
    assert (result["metric"], result["mode"]) == ("val/map", "max")
    assert {"val/map", "val/map_50", "val/map_75"} <= result["last"].keys()
    pictures = list((directory / "previews").rglob("detections-*.png"))
    assert len(pictures) == 3 * 4, "of every validation"
    with Image.open(pictures[0]) as picture:
        assert picture.size == (64, 64)


@pytest.mark.parametrize(
    "model", [["model=mit_b0", "model.fusion=cross_attention", "precision=bf16"], ["model=mit_b0"]], ids=["fused", "one"]
)
def test_five_channels_resumed_and_best_by_training_loss(model, tmp_path, monkeypatch):
    layouts.multispectral(tmp_path / "data")
    overrides = ["dataset=multispectral", f"dataset.path={tmp_path / 'data'}", *model, "task.width=32", *FEW, "loop.best_metric=train/loss",
                 "loop.loss_in_name=true", "loop.keep_checkpoints=2"]  # fmt: skip
    directory = resumed(tmp_path, monkeypatch, overrides)
    result = json.loads((directory / "result.json").read_text())
    losses = [row["train/loss"] for row in result["history"]]
    assert result["best"]["train/loss"] == min(losses)
    rows = list(csv.DictReader((directory / "epochs.csv").read_text().splitlines()))
    assert [float(row["train/loss"]) for row in rows] == pytest.approx(losses)
    numbered = [f"epoch-{n:04d}-loss-{losses[n - 1]:.4f}" for n in (2, 3)]
    assert sorted(p.stem for p in (directory / "checkpoints").glob("epoch-*.pt")) == numbered
    assert [row["train/loss"] for row in last(directory)["history"]] == losses, "a complete checkpoint holds the history"
    names = set(last(directory)["task"])
    weights = load_file(directory / "checkpoints" / "model.safetensors")
    assert {f"model.{name}" for name in weights} == names, "and the final weights are there by themselves"
    assert load_model(directory, "epoch-0002").classes == ["even", "odd"]


SETS = ["+task.args.encoder_layers=1", "+task.args.decoder_layers=2", "+task.args.num_queries=10"]
ON_RANKS = {
    "ssdlite": ["task.detector=ssdlite"],
    "faster_rcnn": FEW,
    "faster_rcnn_v2": ["task.detector=faster_rcnn_v2", *FEW],
    "retinanet": ["task.detector=retinanet"],
    "retinanet_v2": ["task.detector=retinanet_v2"],
    "fcos": ["task.detector=fcos"],
    "detr": ["task.detector=detr", *SETS],
    "deformable_detr": ["task.detector=deformable_detr", *SETS],
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ("ssdlite", "faster_rcnn") else pytest.mark.slow) for n in ON_RANKS])
def test_two_ranks_score_every_image_and_killed_they_end_in_the_same_bits(name, tmp_path):
    """All parameters take part in every rank's step, in mosaics too, and every image is scored once."""
    if "detr" in name:
        pytest.importorskip("transformers")
    overrides = [*SHORT, *RESNET, *SCENES[:2], "augmentation.mosaic=0.5", "loop.max_validation_batches=null", "loop.validate_every=3",
                 "loop.checkpoint_every_steps=1", *ON_RANKS[name]]  # fmt: skip
    whole = start_ranks(tmp_path / "unbroken", overrides, 2)
    broken = start_ranks(tmp_path / "killed", overrides, 2, environment={"TRAINYARD_CHECKPOINT_FAULT": "sync:kill:4"})
    assert finish(whole) == [0, 0], logs(tmp_path / "unbroken")
    assert finish(broken)[0] == -signal.SIGKILL, logs(tmp_path / "killed")
    assert 0 < last(tmp_path / "killed")["step"] < 6
    assert finish(start_ranks(tmp_path / "killed", overrides, 2)) == [0, 0], logs(tmp_path / "killed")
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")
    done = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert done["steps"] == 6 and "val/map" in done["last"]


def test_shards_with_boxes_in_batches_of_one_shape(tmp_path, monkeypatch):
    """Packed from COCO's layout, stopped and resumed."""
    layouts.coco(tmp_path / "coco")
    for split in ("train", "val"):
        arguments = ["pack", str(tmp_path / "coco"), str(tmp_path / "shards"), "--dataset", "coco", "--split", split, "--size", "20KB"]
        assert shards(arguments) == 0
    overrides = [*RESNET, "dataset=webdataset", f"dataset.path={tmp_path / 'shards'}", "augmentation=boxes", "augmentation.mosaic=0.5",
                 "dataset.shape_groups=3", "loop.samples_per_epoch=null", "dataset.train_fraction=0.25", *FEW]  # fmt: skip
    resumed(tmp_path, monkeypatch, overrides)


@pytest.mark.parametrize("layout", ["coco", "yolo", "voc"])
def test_every_layout_of_boxes_on_disk(layout, tmp_path):
    getattr(layouts, layout)(tmp_path / "data")
    done = run(tmp_path / "run", *RESNET, f"dataset={layout}", f"dataset.path={tmp_path / 'data'}", *FEW, "loop.epochs=1")
    assert done["metric"] in done["last"]


def test_a_loaded_detector_finds_boxes_in_the_pixels_of_a_file(tmp_path):
    run(tmp_path / "run", *RESNET, *SCENES, "loop.epochs=1")
    model = load_model(tmp_path / "run")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 120, 3), dtype=np.uint8))
    with torch.inference_mode():
        (found,) = model(model.transform(photo))  # type: ignore[operator]
    assert set(found) == {"boxes", "labels", "scores"}
    assert model.classes == list("0123456789")
    assert ((found["boxes"] >= 0) & (found["boxes"] <= 64)).all()


OVERFIT = ["debug=overfit", "loop.batch_size=8", "loop.samples_per_epoch=null", "loop.validate_every=null", "task.score_threshold=0.05"]


def test_eight_scenes_are_learned_by_heart(tmp_path):
    done = run(tmp_path / "run", *RESNET, *OVERFIT, "task.roi_samples=32", "loop.epochs=null", "loop.steps=80", "optimizer.lr=2e-3")
    assert done["last"]["val/map_50"] >= OVERFIT_MAP_50


# --- on real photographs: pytest -m slow ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_eight_photographs_of_blood_are_learned_by_heart(shared_data, tmp_path):
    overrides = [
        "experiment=bccd",
        f"dataset.path={shared_data / 'bccd'}",
        "debug=overfit",
        "loop.batch_size=8",
        "loop.epochs=120",
        "loop.validate_every_steps=60",
    ]
    done = train(compose_run(*overrides), RunDirectory(tmp_path / "run"))
    assert done["best"]["val/map_50"] >= 0.95


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_blood_cells_are_found_in_photographs_that_were_never_seen(shared_data, tmp_path):
    done = train(compose_run("experiment=bccd", f"dataset.path={shared_data / 'bccd'}"), RunDirectory(tmp_path / "run"))
    assert done["best"]["val/map"] >= 0.45
    assert done["best"]["val/map_50"] >= 0.85


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_default_finds_digits_in_scenes(tmp_path):
    done = train(compose_run("task=detection"), RunDirectory(tmp_path / "run"))
    assert done["best"]["val/map_50"] >= 0.80


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_sweep_over_backbones_in_two_streams_goes_on_behind_a_failure(tmp_path):
    """The recipe as it is, but for small images and a learning rate that no network survives for one of the jobs."""
    layouts.multispectral(tmp_path / "data")
    line = ["-m", "experiment=all_backbones", "model=mit_b1,mit_b0", f"dataset.path={tmp_path / 'data'}", "dataset.image_size=64",
            "optimizer.lr=0.005,1e9", "loop.epochs=2", "loop.keep_checkpoints=2", "logger.plots=false", "runs_dir=runs", *FEW]  # fmt: skip
    call = Call("launch", *line, cwd=tmp_path)
    assert call.code == Diverged.exit_code, call.out + call.err  # that of the first job that failed
    (sweep,) = (tmp_path / "runs").glob("*/sweeps/*")
    assert Call("trainer", "report", str(sweep), cwd=tmp_path).code == 0
    jobs = json.loads((sweep / "final_summary.json").read_text())["runs"]
    assert [job["state"] for job in jobs] == ["completed", "failed", "completed", "failed"], jobs
    manifest = Manifest.load(sweep)
    for job in manifest.jobs[::2]:
        directory = manifest.directory(job).path
        assert len(list((directory / "checkpoints").glob("epoch-*-loss-*.pt"))) == 2
        rows = list(csv.DictReader((directory / "batches.csv").read_text().splitlines()))
        assert {f"train/{term}" for term in TERMS["faster_rcnn"]} <= rows[0].keys()
    assert load_model(manifest.directory(manifest.jobs[2]).path).classes == ["even", "odd"]
