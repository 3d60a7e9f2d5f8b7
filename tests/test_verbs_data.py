"""The verbs that look at data before a run does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.launch import bench_loader, show_batch
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


def test_fewest_workers_within_reach_of_the_best_are_recommended():
    assert bench_loader.recommend({(0, 2): 500.0, (1, 2): 960.0, (1, 4): 990.0, (2, 2): 1000.0}) == (1, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_is_measured_and_its_workers_end(workers, capsys):
    assert bench_loader.main(["loop.batch_size=8", "--workers", str(workers), "--prefetch", "2", "--seconds", "0.2"]) == 0
    assert f"use dataset.num_workers={workers}" in capsys.readouterr().out
