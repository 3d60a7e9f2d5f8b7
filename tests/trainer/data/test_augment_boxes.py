"""Whole images on a canvas, and boxes that follow every move: the boxes that are drawn are found where they are said to be."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.config import Letterbox
from trainer.data.augment.letterbox import Boxed
from trainer.launch.compose import compose_run
from trainer.random import SampleRandom

SIZE = 64


def scene(width: int, height: int, boxes: list[list[int]]) -> dict[str, Any]:
    """Black, with every box filled in a channel of its own."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        pixels[y1:y2, x1:x2, i] = 200
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    return {
        "image": Image.fromarray(pixels), "boxes": corners, "labels": np.arange(len(boxes)), "crowd": np.zeros(len(boxes), bool),
        "area": (corners[:, 2:] - corners[:, :2]).prod(1), "image_id": 7,
    }  # fmt: skip


def augmentation(*, train: bool, **changes: Any) -> Boxed:
    run = compose_run("task=detection", "augmentation=boxes", f"dataset.image_size={SIZE}")
    cfg = dataclasses.replace(run.augmentation, **changes)
    assert isinstance(cfg, Letterbox)
    return Boxed(cfg, run.dataset, train=train)


def seen(sample: dict[str, Any], channel: int) -> list[int]:
    """The box around what is bright in a channel."""
    height, width = sample["size"]
    ys, xs = np.nonzero(np.asarray(sample["image"])[channel, :height, :width] > 100)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"jitter": [0.5, 2.0]},
        {"crop_scale": [0.3, 1.0]},
        {"shorter_side": [24, 32, 40]},
        {"crop_scale": [0.4, 1.0], "jitter": [0.8, 1.5]},
    ],
    ids=str,
)
def test_boxes_are_where_the_pixels_are(changes):
    augment = augmentation(train=True, hflip=0.5, min_visible=0.3, **changes)
    flipped = dropped = 0
    for key in range(60):
        sample = scene(120, 80, [[10, 8, 50, 36], [70, 30, 110, 72]])
        out = augment.sample(sample, SampleRandom(key))
        height, width = out["size"]
        assert out["image"].shape == (3, SIZE, SIZE)
        assert max(height, width) <= SIZE
        assert len(out["boxes"]) == len(out["labels"]) == len(out["crowd"]) == len(out["area"])
        assert (out["boxes"] >= 0).all()
        assert (out["boxes"] <= [width, height, width, height]).all()
        said = dict(zip(out["labels"].tolist(), out["boxes"], strict=True))
        for channel, box in said.items():
            np.testing.assert_allclose(seen(out, channel), box, atol=1.6)
        dropped += 2 - len(said)
        flipped += len(said) == 2 and said[0][0] > said[1][0]
    assert 10 < flipped < 50 or dropped
    assert dropped == 0 or "crop_scale" in changes or "jitter" in changes


def test_validation_shows_the_whole_image_and_keeps_the_files_own_boxes():
    augment = augmentation(train=False, jitter=[0.1, 2.0], crop_scale=[0.1, 0.2], hflip=1.0)
    sample = scene(120, 80, [[0, 0, 120, 80], [70, 30, 71, 31]])  # the second is less than a pixel on the canvas, and counts
    out = augment.sample(dict(sample), SampleRandom(0))
    assert out["size"] == (43, 64)
    assert out["source_size"] == (80, 120)
    np.testing.assert_array_equal(out["source_boxes"], sample["boxes"])
    assert len(out["boxes"]) == 2
    np.testing.assert_allclose(out["boxes"][0], [0, 0, 64, 43], atol=1e-4)


def test_an_image_of_nothing_and_five_channels():
    augment = augmentation(train=True)
    empty = augment.sample(scene(50, 90, []), SampleRandom(0))
    assert empty["boxes"].shape == (0, 4)
    assert empty["size"] == (64, 36)
    many = {**scene(50, 90, []), "image": np.full((90, 50, 5), 9, np.uint8)}
    assert augment.sample(many, SampleRandom(0))["image"].shape == (5, SIZE, SIZE)


def test_beside_the_picture_is_the_mean_which_is_zero_once_normalised():
    augment = augmentation(train=False)
    out = augment.sample(scene(120, 60, []), SampleRandom(0))
    keys = torch.zeros(1, dtype=torch.int64)
    image = augment.batch({"image": torch.as_tensor(out["image"])[None], "key": keys, "index": keys})["image"]
    assert image[0, :, out["size"][0] :].abs().max() < 0.02


def test_a_sample_is_a_function_of_its_key():
    augment = augmentation(train=True, hflip=0.5, jitter=[0.5, 2.0], shorter_side=[20, 40])
    first, again, other = (augment.sample(scene(120, 80, [[10, 8, 50, 36]]), SampleRandom(key)) for key in (3, 3, 4))
    assert torch.equal(first["image"], again["image"])
    assert not torch.equal(first["image"], other["image"])


def test_several_sizes_are_drawn_and_the_last_one_validates():
    sides = [20, 30, 40]
    augment = augmentation(train=True, shorter_side=sides)
    drawn = {min(augment.sample(scene(60, 60, []), SampleRandom(key))["size"]) for key in range(40)}
    assert drawn == set(sides)
    assert min(augmentation(train=False, shorter_side=sides).sample(scene(60, 60, []), SampleRandom(0))["size"]) == 40


def test_the_config_refuses_what_shows_less_than_the_whole_image():
    cfg = Letterbox(hflip=0.5, crop_scale=None, val_crop=0.9, jitter=[2.0, 1.0], shorter_side=[])
    assert {p.key for p in cfg.problems()} == {"augmentation.val_crop", "augmentation.jitter", "augmentation.shorter_side"}
