"""Whole images on a canvas, and boxes that follow every move: the boxes that are drawn are found where they are said to be."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.data.sources import batches
from trainer.config import Letterbox
from trainer.data.augment.letterbox import Boxed
from trainer.data.formats.scenes import DigitScenes
from trainer.data.order import Order
from trainer.data.reading import Reading
from trainer.data.source import BadSample
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
    np.testing.assert_array_equal(out["truth"][:, :4], [[0, 0, 120, 80], [70, 30, 1, 1]])
    np.testing.assert_array_equal(out["truth"][:, 4:], np.column_stack([sample["labels"], sample["crowd"], sample["area"]]))
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


def test_distorted_colours_leave_boxes_alone_and_depend_on_the_key():
    plain, distorted = augmentation(train=True), augmentation(train=True, distortion=0.5)
    a, b = (augment.sample(scene(120, 80, [[10, 8, 50, 36]]), SampleRandom(3)) for augment in (plain, distorted))
    np.testing.assert_array_equal(a["boxes"], b["boxes"])
    keys = torch.arange(40)

    def coloured(augment: Boxed, keys: torch.Tensor) -> torch.Tensor:
        return augment.batch({"image": torch.as_tensor(b["image"]).expand(len(keys), -1, -1, -1), "key": keys, "index": keys})["image"]

    before, after = coloured(plain, keys), coloured(distorted, keys)
    assert 30 < int((before != after).flatten(1).any(1).sum()) <= 40
    torch.testing.assert_close(coloured(distorted, keys[7:9]), after[7:9], atol=1e-5, rtol=0)
    validation = augmentation(train=False, distortion=0.5)
    assert torch.equal(coloured(validation, keys), coloured(augmentation(train=False), keys))


def test_several_sizes_are_drawn_and_the_last_one_validates():
    sides = [20, 30, 40]
    augment = augmentation(train=True, shorter_side=sides)
    drawn = {min(augment.sample(scene(60, 60, []), SampleRandom(key))["size"]) for key in range(40)}
    assert drawn == set(sides)
    assert min(augmentation(train=False, shorter_side=sides).sample(scene(60, 60, []), SampleRandom(0))["size"]) == 40


def mosaic_of(augment: Boxed, key: int, scenes: list[dict[str, Any]]) -> dict[str, Any]:
    return augment.together(scenes[0], lambda number, use: use(scenes[number]), SampleRandom(key))


def test_a_mosaic_shows_four_images_and_its_boxes_are_where_their_pixels_are():
    augment = augmentation(train=True, hflip=0.5, mosaic=1.0, mosaic_scale=[0.5, 1.2], min_visible=0.3)
    kept = 0
    for key in range(60):
        scenes = []
        for number, (width, height) in enumerate([(120, 80), (60, 90), (100, 100), (70, 40)]):
            left = width // 8
            box = [left, 8, left + width // 2, height - 4]
            # There are three colours: the fourth image's object is white.
            drawn = scene(width, height, [box if number in (c, 3) else [0, 0, 0, 0] for c in range(3)])
            scenes.append({
                "image": drawn["image"], "boxes": np.array([box], np.float32), "labels": np.array([number]), "crowd": np.zeros(1, bool),
                "area": np.ones(1), "image_id": 7,
            })  # fmt: skip
        out = mosaic_of(augment, key, scenes)
        assert out["image"].shape == (3, SIZE, SIZE)
        assert (out["size"], out["image_id"]) == ((SIZE, SIZE), 7)
        assert len(out["boxes"]) == len(out["labels"]) == len(out["crowd"]) == len(out["area"])
        kept += len(out["boxes"])
        bright = np.asarray(out["image"]) > 130  # black and the mean beside the objects
        for label, box in zip(out["labels"].tolist(), out["boxes"], strict=True):
            wanted = np.array([channel in (label, *((0, 1, 2) if label == 3 else ())) for channel in range(3)])
            object_pixels = (bright == wanted[:, None, None]).all(0)
            ys, xs = np.nonzero(object_pixels)
            np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], box, atol=1.7)
    assert 100 < kept < 240, "most objects stay; some are cut off"


def test_mosaics_stop_after_their_epochs_and_come_with_their_probability():
    augment = augmentation(train=True, mosaic=0.5, mosaic_epochs=2)
    asked = [[augment.others(SampleRandom(key), epoch) for key in range(200)] for epoch in range(4)]
    assert asked[0] == asked[1], "a function of the key"
    assert set(asked[0]) == {0, 3}
    assert 60 < asked[0].count(3) < 140
    assert not any(asked[2] + asked[3])
    assert not any(augmentation(train=False, mosaic=1.0).others(SampleRandom(key), 0) for key in range(20)), "none in validation"


def test_the_config_refuses_what_shows_less_than_the_whole_image():
    cfg = Letterbox(hflip=0.5, crop_scale=None, val_crop=0.9, jitter=[2.0, 1.0], shorter_side=[], mosaic_epochs=3)
    assert {p.key for p in cfg.problems()} == {
        "augmentation.val_crop", "augmentation.jitter", "augmentation.shorter_side", "augmentation.mosaic_epochs"
    }  # fmt: skip


def test_mosaics_do_not_depend_on_workers_ranks_or_where_a_run_began():
    source = DigitScenes("train", num_samples=20, size=48, max_objects=3, noise=0.5, seed=0)
    order = Order(20, 0, 8, drop_last=False)

    def of(steps: int, **how: Any) -> list[dict[str, Any]]:
        augment = augmentation(train=True, mosaic=0.6, mosaic_epochs=2)
        return batches(steps, order, source=source, augmentation=augment, **how)

    whole = of(9)
    seen = {int(i): image for batch in whole[3:6] for i, image in zip(batch["index"], batch["image"], strict=True)}
    for rank in range(2):
        for batch in of(3, rank=rank, world=2, workers=2, start_step=3):  # the second epoch, as a resumed run on two ranks has it
            assert all(torch.equal(image, seen[int(i)]) for i, image in zip(batch["index"], batch["image"], strict=True))


def test_an_image_that_cannot_join_a_mosaic_is_replaced_and_named():
    class Broken(DigitScenes):
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise BadSample(self.name(3), "broken")
            return super().__getitem__(index)

    source = Broken("train", num_samples=8, size=48, max_objects=3, noise=0.5, seed=0)
    reading = Reading(source, augmentation(train=True, mosaic=1.0), replace=True)
    bad: list[tuple[str, str]] = []
    for key in range(20):
        found = reading.read(0, key, 0, bad)
        assert found is not None and found[0] == 0
    assert bad and set(bad) == {(source.name(3), "broken")}
