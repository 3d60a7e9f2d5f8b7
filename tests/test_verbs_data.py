"""The verbs that look at data before a run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import layouts
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.launch import bench_loader, describe, show_batch
from trainer.launch.compose import compose_run


def test_the_sheet_shows_the_very_pixels_of_the_batch(tmp_path, capsys):
    """Un-normalised and un-augmented, an image on the sheet is the dataset's own."""
    out = tmp_path / "sheet.png"
    assert show_batch.main(["augmentation=none", "--val", "--count", "3", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    run = compose_run("augmentation=none")
    image = np.asarray(run.dataset.build("val")[0]["image"].resize((32, 32), Image.Resampling.BILINEAR), dtype=int)
    scale = show_batch.CELL // 32
    shown = np.asarray(Image.open(out), dtype=int)[: 32 * scale : scale, : 32 * scale : scale]
    assert np.abs(shown - image).max() <= 2


def test_a_mixed_image_names_both_classes():
    run = compose_run("augmentation.mixup=1.0", "loop.batch_size=16")
    batch, classes = show_batch.first_batch(run, train=True)
    captions = [show_batch.caption(batch, i, classes) for i in range(16)]
    assert any(" + " in text and "%" in text for text in captions)


def test_boxes_and_parts_are_drawn():
    from PIL import ImageDraw

    page = Image.new("RGB", (64, 64), "white")
    batch = {
        "boxes": [torch.tensor([[4.0, 4.0, 20.0, 20.0]])],
        "labels": [torch.tensor([0])],
        "parts": torch.tensor([[[25.0, 25.0, 1.0], [2.0, 2.0, 0.0]]]),
    }
    show_batch.annotate(ImageDraw.Draw(page), batch, 0, (0, 0), 2, ["wren"])
    assert page.getpixel((8, 30)) == (255, 0, 0) and page.getpixel((50, 50)) == (255, 0, 0) and page.getpixel((4, 4)) == (255, 255, 255)


def shown(path: Path, *overrides: str, count: int) -> tuple[np.ndarray, dict[str, Any], RunConfig]:
    """The sheet that the verb writes of `count` images, int [H, W, 3], and the batch it shows."""
    assert show_batch.main([*overrides, "--count", str(count), "--out", str(path)]) == 0
    run = compose_run(*overrides)
    return np.asarray(Image.open(path), dtype=int), show_batch.first_batch(run, train=True)[0], run


def cell(sheet: np.ndarray, i: int, side: int, scale: int) -> np.ndarray:
    """The i-th picture of a full sheet, one pixel of each that became scale x scale."""
    across, down = i % show_batch.COLUMNS * (side * scale + 4), i // show_batch.COLUMNS * (side * scale + show_batch.CAPTION + 4)
    return sheet[down : down + side * scale, across : across + side * scale]


def unmarked(run: RunConfig, images: torch.Tensor, scale: int) -> np.ndarray:
    """int [N, S, S, 3]: images as they would be on a sheet without anything drawn in."""
    pixels = show_batch.to_pixels(images, run.dataset.mean, run.dataset.std).astype(int)
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def test_masks_boxes_and_parts_of_a_batch_are_marked(tmp_path):
    sheet, batch, run = shown(tmp_path / "parts.png", "dataset=digit_parts", "augmentation=none", "dataset.hidden=0.5", count=32)
    side = batch["image"].shape[-1]
    scale = show_batch.CELL // side
    assert sheet.shape == (4 * (side * scale + show_batch.CAPTION + 4), 8 * (side * scale + 4), 3)
    plain = unmarked(run, batch["image"], scale)
    for i in range(32):
        mask, found = batch["mask"][i].numpy().repeat(scale, axis=0).repeat(scale, axis=1), cell(sheet, i, side, scale)
        changed = (found != plain[i]).any(axis=2)
        left, top, right, bottom = (round(v * scale) for v in batch["box"][i].tolist())
        frame = np.zeros_like(changed)
        frame[[top, min(bottom, side * scale - 1)], left : right + 1] = frame[top : bottom + 1, [left, min(right, side * scale - 1)]] = True
        dots = np.zeros_like(changed)
        for x, y, visible in batch["parts"][i].tolist():
            if visible:
                across, down = round(x * scale), round(y * scale)
                assert found[down, across].tolist() == [255, 0, 0], "a part has its dot"
                dots[max(0, down - 4) : down + 5, max(0, across - 4) : across + 5] = True
        assert (found[frame & ~dots] == [255, 255, 0]).all(), "the figure has its frame"
        assert not changed[(mask == 0) & ~frame & ~dots].any(), "what is not marked is as it was"
        assert changed[(mask > 0) & ~frame & ~dots].mean() > 0.99
        colours = {
            part: np.median((found - plain[i] // 2)[(mask == part) & ~frame & ~dots], axis=0).round() for part in np.unique(mask) if part
        }
        assert len({tuple(c) for c in colours.values()}) == len(colours) >= 3, "every part has its own colour"


def test_boxes_of_a_detection_batch_are_drawn_with_their_classes(tmp_path):
    sheet, batch, run = shown(tmp_path / "scenes.png", "task=detection", "dataset=digit_scenes", count=8)
    side = batch["image"].shape[-1]
    scale = show_batch.CELL // side
    plain = unmarked(run, batch["image"][:8], scale)
    assert sheet.shape == (side * scale + show_batch.CAPTION + 4, 8 * (side * scale + 4), 3)
    for i in range(8):
        found = cell(sheet, i, side, scale)
        assert batch["boxes"][i].numel() and (found != plain[i]).any()
        for box in batch["boxes"][i].tolist():
            left, top, _, bottom = (v * scale for v in box)
            edge = found[round((top + bottom) / 2), [int(left), min(round(left), side * scale - 1)]]
            assert [255, 0, 0] in edge.tolist()


def test_the_views_of_an_image_lie_side_by_side(tmp_path):
    sheet, batch, run = shown(tmp_path / "views.png", "task=dino", count=3)
    large, small, scale = batch["image"].shape[-1], batch["local"].shape[-1], show_batch.CELL // batch["image"].shape[-1]
    width = (2 * large + 2 * small + 3 * show_batch.GAP) * scale
    columns = show_batch.COLUMNS * large * scale // width
    assert columns == 2 and sheet.shape == (2 * (large * scale + show_batch.CAPTION + 4), columns * (width + 4), 3)
    left = 0
    for name in ("image", "local"):
        for v in range(2):
            view = unmarked(run, batch[name][:1, v], scale)[0]
            assert (sheet[: len(view), left : left + len(view)] == view).all(), f"{name} {v} of the first image"
            left += len(view) + show_batch.GAP * scale


def described(capsys, *arguments: str) -> tuple[str, str]:
    """What the verb prints, and what it warns of."""
    assert describe.main(arguments) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_data_are_described_whatever_the_task_and_however_few(tmp_path, capsys):
    """What the run would be refused for is no reason not to look at its data."""
    layouts.coco(tmp_path / "coco")
    words = ["dataset=coco", f"dataset.path={tmp_path / 'coco'}", "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="have no label"):
        compose_run(*words[:2])
    said, warned = described(capsys, *words)
    assert f"train: {layouts.TRAIN} samples, 2 classes" in said and "objects a class: 14 to 14, odd 14, even 14" in said and not warned
    for split in ("train", "val"):
        layouts.put(tmp_path / "tiny" / split / "even" / "0.png", 0)
    words = ["dataset=image_folder", f"dataset.path={tmp_path / 'tiny'}", "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="more than the 1 training images"):
        compose_run(*words[:2])
    said, warned = described(capsys, *words)
    assert "train: 1 samples" in said and "1 images are in both splits" in said and not warned
    (tmp_path / "tiny" / "train" / "even" / "1.png").write_bytes(b"no image")
    said, _ = described(capsys, *words)
    assert "1 that cannot be read" in said and f"{tmp_path / 'tiny' / 'train' / 'even' / '1.png'}: not an image" in said
    assert (tmp_path / "out" / "data.png").is_file()


def test_one_split_is_described_alone_and_none_is_refused(tmp_path, capsys):
    layouts.voc(tmp_path / "voc")
    (tmp_path / "voc" / "ImageSets" / "Main" / "train.txt").unlink()
    words = ["dataset=voc", f"dataset.path={tmp_path / 'voc'}", "--out", str(tmp_path / "out")]
    said, warned = described(capsys, *words)
    assert f"val: {layouts.VAL} samples" in said and "train:" not in said
    assert "warning: only the val split can be looked at" in warned and "dataset.train_list" in warned
    (tmp_path / "voc" / "ImageSets" / "Main" / "val.txt").unlink()
    for wrong in ([], ["dataset.shape_groups=-1"], ["dataset.shape_group=1"]):
        with pytest.raises(ConfigError, match=r"dataset\.(train_list|shape_group)"):
            describe.main([*words, *wrong])


def test_fewest_workers_within_reach_of_the_best_are_recommended():
    assert bench_loader.recommend({(0, 2): 500.0, (1, 2): 960.0, (1, 4): 990.0, (2, 2): 1000.0}) == (1, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_is_measured_and_its_workers_end(workers, capsys):
    assert bench_loader.main(["loop.batch_size=8", "--workers", str(workers), "--prefetch", "2", "--seconds", "0.2"]) == 0
    assert f"use dataset.num_workers={workers}" in capsys.readouterr().out
