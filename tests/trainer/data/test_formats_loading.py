"""Formats with boxes through the loader: resumed, with workers, and on two ranks, the same batches, boxes and all."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.data.sources import Rank
from trainer.config.augmentation import Basic
from trainer.config.dataset import DatasetConfig
from trainer.data.augment.standard import Standard
from trainer.data.config import CocoConfig, DigitScenesConfig, MultispectralConfig, VocConfig, WebDatasetConfig, YoloConfig
from trainer.data.loader import train_loader, validation_loader
from trainer.data.order import Order
from trainer.data.shards.pack import pack

SIZE = {"image_size": 32}


def coco(root: Path, shared_data) -> DatasetConfig:
    return CocoConfig(path=str(shared_data / "bccd"), **SIZE)  # type: ignore[arg-type]


def voc(root: Path, shared_data) -> DatasetConfig:
    return VocConfig(path=str(shared_data / "bccd"), **SIZE)  # type: ignore[arg-type]


def webdataset(root: Path, shared_data) -> DatasetConfig:
    for split, source in (("train", coco(root, shared_data).build("val")), ("val", coco(root, shared_data).build("val"))):
        pack(source, root, split, size=1_000_000)
    return WebDatasetConfig(path=str(root), **SIZE)  # type: ignore[arg-type]


def labelled(root: Path, ending: str, write: Any) -> None:
    """Twenty images in YOLO's layout."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(20):
            write(root / "images" / split / f"{i:02}{ending}", random)
            lines = [f"{i % 2} {x:.3f} {y:.3f} 0.2 0.3\n" for x, y in random.uniform(0.2, 0.8, (i % 4, 2))]
            (root / "labels" / split / f"{i:02}.txt").write_text("".join(lines))
    (root / "classes.txt").write_text("a\nb\n")


def yolo(root: Path, shared_data) -> DatasetConfig:
    labelled(root, ".png", lambda path, random: Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path))
    return YoloConfig(path=str(root), **SIZE)  # type: ignore[arg-type]


def multispectral(root: Path, shared_data) -> DatasetConfig:
    labelled(root, ".npy", lambda path, random: np.save(path, random.integers(0, 4000, (40, 50, 5)).astype(np.uint16)))
    return MultispectralConfig(path=str(root), channels=5, mean=[0.1] * 5, std=[0.2] * 5, **SIZE)  # type: ignore[arg-type]


def digit_scenes(root: Path, shared_data) -> DatasetConfig:
    return DigitScenesConfig(source_size=48, num_train=20, num_val=20, **SIZE)  # type: ignore[arg-type]


FORMATS = {f.__name__: f for f in (coco, voc, yolo, multispectral, digit_scenes, webdataset)}


def rows(batch: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """A batch by the samples' places in the dataset."""
    names = [name for name in batch if name not in ("count", "index")]
    return {int(index): {name: batch[name][i] for name in names} for i, index in enumerate(batch["index"])}


def assert_same(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> None:
    assert list(a) == list(b)
    for index in a:
        assert a[index].keys() == b[index].keys() >= {"image", "boxes", "labels", "key"}
        for name in a[index]:
            assert torch.equal(torch.as_tensor(a[index][name]), torch.as_tensor(b[index][name])), (index, name)


@pytest.mark.parametrize("name", FORMATS)
def test_order_boxes_and_pixels_do_not_depend_on_who_reads(name: str, tmp_path: Path, shared_data) -> None:
    config = FORMATS[name](tmp_path, shared_data)
    assert not list(config.problems())
    train, val = config.build("train"), config.build("val")
    order = Order(len(train), 0, 6, True)

    def batches(steps: int, start: int = 0, rank: int = 0, world: int = 1, workers: int = 0) -> list[dict[int, dict[str, Any]]]:
        augmentation = Standard(Basic(hflip=0.5, crop_scale=[0.4, 1.0], val_crop=1.0), config, train=True)
        loader = train_loader(train, augmentation, order, Rank(rank, world), start_step=start, workers=workers)
        try:
            return [rows(batch) for batch in islice(loader, steps)]
        finally:
            loader.close()

    alone = batches(5)
    for a, b in zip(alone[2:], batches(3, start=2, workers=2), strict=True):
        assert_same(a, b)
    for whole, one, two in zip(alone, batches(5, world=2), batches(5, rank=1, world=2), strict=True):
        assert_same(whole, {index: {**one, **two}[index] for index in whole})
    assert sum(len(row["boxes"]) for batch in alone for row in batch.values()) > 5
    augmentation = Standard(Basic(hflip=0.5, crop_scale=None, val_crop=1.0), config, train=False)
    loader = validation_loader(val, augmentation, Rank(0, 1), batch_size=7)
    assert sorted(i for batch in loader for i in batch["index"].tolist()) == list(range(len(val)))
