"""Reading JPEGs no further than needed: the rows that are wanted are those of the whole image, and a cut-off file is still found out."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from trainer.data.augment.geometry import SCALES, Cut, decoded
from trainer.data.images import load_down_to, open_image
from trainer.data.source import BadSample

WIDTH, HEIGHT = 333, 250


def jpeg(mode: str = "RGB", **options) -> bytes:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 16, 4 if mode == "CMYK" else 3), dtype=np.uint8)
    image = Image.fromarray(coarse, "CMYK" if mode == "CMYK" else "RGB").resize((WIDTH, HEIGHT)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


KINDS = {
    "baseline": jpeg(quality=90),
    "all colours": jpeg(quality=90, subsampling=0),
    "progressive": jpeg(progressive=True),
    "restarts": jpeg(restart_marker_rows=1),
    "grey": jpeg("L"),
    "CMYK": jpeg("CMYK"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1, *SCALES])
def test_rows_that_are_wanted_are_those_of_the_whole_image(kind, scale):
    data = KINDS[kind]
    whole, got = decoded(open_image(data, ""), scale)
    assert got == scale
    whole = np.asarray(whole)
    for bottom in (1, 9, 77, 200, HEIGHT):
        part, _ = decoded(open_image(data, ""), scale, bottom=bottom)
        rows = -(-bottom // scale)
        np.testing.assert_array_equal(np.asarray(part)[:rows], whole[:rows])


@pytest.mark.parametrize("kind", ["baseline", "grey", "restarts"])
def test_not_all_of_a_file_is_unpacked(kind):
    image = open_image(KINDS[kind], "")
    load_down_to(image, 40)
    rows = np.flatnonzero(np.asarray(image.convert("L")).any(axis=1))
    assert 40 < rows.max() < HEIGHT / 2
    image.load()  # as everything that Pillow does with it begins with
    assert np.flatnonzero(np.asarray(image.convert("L")).any(axis=1)).max() == rows.max()


def test_black_rows_are_no_sign_of_rows_that_are_missing():
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:60] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    part, _ = decoded(open_image(buffer.getvalue(), ""), 1, bottom=100)
    whole, _ = decoded(open_image(buffer.getvalue(), ""), 1)
    np.testing.assert_array_equal(np.asarray(part), np.asarray(whole))


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_file_that_was_cut_off_is_found_out_wherever_the_crop_lies(share):
    data = KINDS["baseline"]
    cut = Cut((0, 0, WIDTH, 30), 16)  # its rows are there
    cut.pixels(open_image(data, "whole"), gap=1.0)
    with pytest.raises(BadSample, match="cannot be decoded"):
        cut.pixels(open_image(data[: int(len(data) * share)], "cut off"), gap=1.0)
