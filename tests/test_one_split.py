"""Data of which only one split is there: enough to measure a network on, or to pack."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import tasks  # noqa: F401  (its schemas)
from tests.layouts import LAYOUTS, TRAIN, VAL
from tests.tasks.detection import test_runs as detection
from tests.test_exact import MODELS, run
from trainer.data.shards.verbs import dataset_config, shards
from trainer.errors import ConfigError
from trainer.evaluate import training_images
from trainer.launch import evaluate
from trainer.launch.compose import compose_run

SETTINGS = {"meta_shift": ["val_folder=test"], "multispectral": ["channels=5", "mean=[0.5,0.5,0.5,0.5,0.5]", "std=[0.2,0.2,0.2,0.2,0.2]"]}


def folders(train: str, val: str) -> Callable[[Path, str], None]:
    return lambda root, split: shutil.rmtree(root / {"train": val, "val": train}[split])


def files(train: str, val: str) -> Callable[[Path, str], None]:
    return lambda root, split: (root / {"train": val, "val": train}[split]).unlink()


def shards_of(root: Path, split: str) -> None:
    for path in root.glob({"train": "val-*.tar", "val": "train-*.tar"}[split]):
        path.unlink()


def listed_by_cub(root: Path, split: str) -> None:
    path = root / "train_test_split.txt"
    path.write_text("".join(f"{line.split()[0]} {int(split == 'train')}\n" for line in path.read_text().splitlines()))


def listed_by_waterbirds(root: Path, split: str) -> None:
    header, *rows = (line.split(",") for line in (root / "metadata.csv").read_text().splitlines())
    for row in rows:
        row[3] = {"train": "0", "val": "1"}[split]
    (root / "metadata.csv").write_text("\n".join(",".join(row) for row in (header, *rows)) + "\n")


def yolo(root: Path, split: str) -> None:
    for what in ("images", "labels"):
        folders("train", "val")(root / what, split)


KEEP_ONLY: dict[str, Callable[[Path, str], None]] = {
    "image_folder": folders("train", "val"), "meta_shift": folders("train", "test"), "siim_acr": folders("train_set", "full_test_set"),
    "webdataset": shards_of, "cub": listed_by_cub, "waterbirds": listed_by_waterbirds,
    "coco": files("annotations/instances_train.json", "annotations/instances_val.json"), "yolo": yolo, "multispectral": yolo,
    "voc": files("ImageSets/Main/train.txt", "ImageSets/Main/val.txt"),
}  # fmt: skip


def one_split(root: Path, name: str, split: str) -> Path:
    LAYOUTS[name](root)
    KEEP_ONLY[name](root, split)
    return root


def one_layout(root: Path, name: str) -> Path:
    LAYOUTS[name](root)
    return root


def test_every_layout_is_covered():
    assert KEEP_ONLY.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_one_split_is_checked_and_packed_alone(name: str, split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, settings = one_split(tmp_path / "data", name, split), SETTINGS.get(name, [])
    config = dataset_config(name, {"path": str(root)}, settings)
    assert list(config.problems()), "a run wants both"
    alone, other = config.alone(split), config.alone("val" if split == "train" else "train")
    assert not list(alone.problems()) and config.splits == ("train", "val")
    assert list(other.problems()), "of the split that is not there, there is something to say"
    count = len(alone.build(split))
    facts = alone.facts()
    assert count in (TRAIN, VAL, TRAIN + VAL, TRAIN + 2 * VAL) and getattr(facts, f"num_{split}") == count
    assert facts.num_classes == 2
    capsys.readouterr()
    arguments = ["pack", str(root), str(tmp_path / "out"), *settings, "--dataset", name]
    assert shards([*arguments, "--split", split]) == 0
    assert f"{split}: {count} samples" in capsys.readouterr().out
    packed = dataset_config("webdataset", {"path": str(tmp_path / "out")}, []).alone(split)
    assert not list(packed.problems()) and len(packed.build(split)) == count
    with pytest.raises(ConfigError):
        shards(arguments)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It knows the classes even and odd."""
    base = tmp_path_factory.mktemp("classifier")
    LAYOUTS["image_folder"](base / "data")
    run(base / "run", *MODELS["vit"], "dataset=image_folder", f"dataset.path={base / 'data'}", "dataset.num_workers=0", "loop.epochs=1",
        "loop.samples_per_epoch=16", "dataset.image_size=16")  # fmt: skip
    return base / "run"


def scores(directory: Path, *overrides: str) -> dict:
    assert evaluate.main([str(directory), *overrides, "--name", "it"]) == 0
    return json.loads((directory / "evaluations" / "it" / "scores.json").read_text())


def test_a_classifier_is_measured_on_shards_or_folders_of_one_split(classifier: Path, tmp_path: Path) -> None:
    folder, packed = one_split(tmp_path / "folder", "image_folder", "val"), one_split(tmp_path / "shards" / "data", "webdataset", "val")
    last = f"{len(list(packed.glob('val-*'))) - 1:06}"
    braces = f'dataset.path="{packed}/val-{{000000..{last}}}.tar"'
    found = [
        scores(classifier, *words)
        for words in (
            ["dataset=image_folder", f"dataset.path={folder}"],
            ["dataset=webdataset", f"dataset.path={packed}"],
            ["dataset=webdataset", braces],
        )
    ]
    (packed / "_info.json").unlink()
    found.append(scores(classifier, "dataset=webdataset", f"dataset.path={packed}"))
    for path in list(packed.glob("*.tar")):
        path.rename(path.with_name(path.name.removeprefix("val-")))  # names that speak of no split
    found.append(scores(classifier, "dataset=webdataset", f"dataset.path={packed}"))
    assert [row["num_samples"] for row in found] == [VAL] * 5
    assert all(row["val/loss"] == pytest.approx(found[0]["val/loss"]) for row in found)
    train = one_split(tmp_path / "train", "image_folder", "train")
    assert scores(classifier, "dataset=image_folder", f"dataset.path={train}", "split=train")["num_samples"] == TRAIN
    with pytest.raises(ConfigError, match=r"no such directory: .*val"):
        scores(classifier, "dataset=image_folder", f"dataset.path={train}")


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("detector")
    LAYOUTS["coco"](base / "data")
    detection.run(base / "run", *detection.RESNET, *detection.FEW, "dataset=coco", f"dataset.path={base / 'data'}", "dataset.image_size=64",
                  "loop.epochs=1")  # fmt: skip
    return base / "run"


@pytest.mark.parametrize("name", ["coco", "voc", "yolo"])
def test_a_detector_is_measured_on_data_of_one_split(detector: Path, name: str, tmp_path: Path) -> None:
    root = one_split(tmp_path / "data", name, "val")
    assert scores(detector, f"dataset={name}", f"dataset.path={root}")["num_samples"] == VAL


@pytest.mark.parametrize("name", ["image_folder", "webdataset"])
def test_images_are_not_compared_with_themselves(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nearest neighbours among the very images that are asked about would all be right."""
    both = compose_run(f"dataset={name}", f"dataset.path={one_layout(tmp_path / 'both' / 'data', name)}", "loop.batch_size=8")
    whole = both.dataset
    both.dataset = whole.alone("val")
    known = training_images(both, both.dataset.build("val"), "val")
    assert known is not None and len(known) == TRAIN and not caplog.text
    both.dataset = replace(whole, path=str(one_split(tmp_path / "one" / "data", name, "val"))).alone("val")
    with caplog.at_level(logging.WARNING):
        assert training_images(both, both.dataset.build("val"), "val") is None
    assert "no training images to compare with" in caplog.text
