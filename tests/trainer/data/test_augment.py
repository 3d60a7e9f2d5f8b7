"""Cutting, flipping, mixing, erasing: against torchvision and timm, and keyed by sample."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from timm.data.mixup import mixup_target
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from tests import thresholds
from trainer.data.augment import mixing
from trainer.data.augment.geometry import SCALES, Cut, centre_crop, decoded, random_crop, resize_shorter, size_of
from trainer.data.images import open_image
from trainer.data.source import BadSample
from trainer.random import SampleRandom, sample_keys

KEYS = torch.from_numpy(sample_keys(0, 0, np.arange(2000), np.zeros(2000, np.int64)))


def photo(width: int, height: int, *, mode: str = "RGB") -> Image.Image:
    """Smooth enough for JPEG, with no symmetry."""
    y, x = np.mgrid[:height, :width]
    channels = [127 + 60 * np.sin(x / (5 + c)) + 60 * np.cos(y / (9 - c) + x / 17) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


boxes = st.tuples(st.integers(0, 30), st.integers(0, 20), st.integers(8, 60), st.integers(8, 40))


@settings(max_examples=30)
@given(box=boxes, size=st.integers(4, 80), flip=st.booleans(), bicubic=st.booleans())
def test_a_cut_is_torchvision_s_resized_crop(box, size, flip, bicubic):
    left, top, width, height = box
    image = photo(95, 70)
    cut = Cut((left, top, left + width, top + height), size, flip).pixels(image, gap=1.0, bicubic=bicubic)
    mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    expected = tv.resized_crop(tv.pil_to_tensor(image), top, left, height, width, [size, size], mode, antialias=True)
    assert cut.equal(tv.horizontal_flip(expected) if flip else expected)


def test_arrays_of_any_type_and_number_of_channels():
    random = np.random.default_rng(0)
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535), (np.float32, 1)):
        image = (random.random((30, 40, 5)) * top).astype(dtype)
        cut = Cut((4, 2, 24, 22), 8).pixels(image, gap=1.0)
        expected = tv.resized_crop(torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1) / top, 2, 4, 20, 20, [8, 8], antialias=True)
        assert cut.dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)
        scale = 255 if dtype is np.uint8 else 1
        assert (cut.float() / scale - expected).abs().max() < 1 / scale if scale > 1 else torch.allclose(cut, expected, atol=1e-5)


@given(width=st.integers(1, 200), height=st.integers(1, 200), key=st.integers(0, 2**62), low=st.floats(0.02, 1))
def test_random_crops_lie_inside(width, height, key, low):
    left, top, right, bottom = random_crop(width, height, [low, 1.0], [0.75, 4 / 3], SampleRandom(key))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_random_crops_have_the_areas_and_ratios_asked_for():
    crops = np.array([random_crop(1000, 1000, [0.1, 0.5], [0.5, 2.0], SampleRandom(key)) for key in range(3000)])
    width, height = crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1]
    assert stats.kstest(width * height / 1e6, stats.uniform(0.1, 0.4).cdf).pvalue > thresholds.CHANCE
    assert stats.kstest(np.log(width / height), stats.uniform(-math.log(2), 2 * math.log(2)).cdf).pvalue > thresholds.CHANCE
    assert stats.kstest(crops[:, 0] / (1001 - width), "uniform").pvalue > thresholds.CHANCE


@pytest.mark.parametrize(("width", "height", "size"), [(100, 80, 56), (80, 131, 64), (64, 64, 64)])
def test_the_centre_crop_is_torchvision_s_up_to_a_pixel_s_rounding(width, height, size):
    image = photo(width, height)
    for fraction in (1.0, 0.875):
        cut = Cut(centre_crop(width, height, fraction), size).pixels(image, gap=2.0)
        expected = tv.center_crop(tv.resize(tv.pil_to_tensor(image), [round(size / fraction)], antialias=True), [size])
        assert (cut.float() - expected.float()).abs().mean() < 8  # of 255; an unrelated crop is off by 50


def test_what_lies_in_the_image_s_frame_moves_with_its_pixels():
    image = np.zeros((60, 80, 3), np.uint8)
    image[20:30, 40:60] = 255
    mask = (image[..., 0] > 0).astype(np.uint8)
    sample = {
        "image": image, "mask": mask, "label": 3, "boxes": np.array([[40, 20, 60, 30]], np.float32), "labels": np.array([1]),
        "box": np.array([40, 20, 60, 30], np.float32), "parts": np.array([[41, 21, 1], [5, 5, 1], [59, 29, 0]], np.float32),
    }  # fmt: skip
    for flip in (False, True):
        cut = Cut((20, 10, 80, 50), 120, flip)
        pixels, rest = cut.pixels(image, gap=1.0), cut.rest(sample)
        ys, xs = torch.nonzero(pixels[0] > 127, as_tuple=True)
        extent = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
        assert np.abs(rest["boxes"][0] - extent).max() <= 1
        assert rest["box"].tolist() == rest["boxes"][0].tolist()
        assert rest["boxes"].dtype == rest["parts"].dtype == np.float32
        moved = rest["mask"].astype(bool)
        assert (moved != (pixels[0].numpy() > 127)).mean() < 0.005
        x, y, visible = rest["parts"][0]
        assert moved[int(y), int(x)] and visible == 1
        assert rest["parts"][1, 2] == 0  # outside the cut now
        assert rest["parts"][2, 2] == 0
        assert rest["label"] == 3
        assert rest["labels"].tolist() == [1]


# Reading JPEGs


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_images_of_every_mode_become_rgb(mode):
    data = jpeg(photo(123, 77, mode=mode))
    cut = Cut((0, 0, 77, 77), 77).pixels(open_image(data, "x"), gap=1.0)
    assert np.array_equal(cut.permute(1, 2, 0).numpy(), np.array(Image.open(io.BytesIO(data)).convert("RGB"))[:, :77])


@given(width=st.integers(64, 200), height=st.integers(64, 200), size=st.integers(8, 40), gap=st.sampled_from([1.0, 2.0]), data=st.data())
@settings(max_examples=30)
def test_scaled_decoding_keeps_the_pixels_asked_for_and_shows_the_same(width, height, size, gap, data):
    left, top = data.draw(st.integers(0, width // 2)), data.draw(st.integers(0, height // 2))
    cut = Cut((left, top, data.draw(st.integers(left + 16, width)), data.draw(st.integers(top + 16, height))), size)
    encoded = jpeg(photo(width, height))
    read, scale = decoded(open_image(encoded, "x"), cut.magnification / gap)
    assert scale == max([s for s in SCALES if s * gap <= cut.magnification], default=1)
    assert size_of(read) == (math.ceil(width / scale), math.ceil(height / scale))
    at = cut.at(scale)
    assert at.box[2] <= size_of(read)[0] and at.box[3] <= size_of(read)[1]
    if scale > 1:
        assert at.magnification >= gap
    whole = cut.pixels(Image.open(io.BytesIO(encoded)).convert("RGB"), gap=gap)
    assert (cut.pixels(open_image(encoded, "x"), gap=gap).float() - whole.float()).abs().mean() < 12


def test_spoilt_files_are_bad_samples_at_any_scale():
    data = jpeg(photo(200, 160))
    for size in (20, 200):
        with pytest.raises(BadSample, match="truncated"):
            Cut((0, 0, 160, 160), size).pixels(open_image(data[: len(data) // 2], "x"), gap=1.0)


def test_the_shorter_side():
    assert resize_shorter(photo(100, 50), 25, gap=1.0).shape == (3, 25, 50)
    assert resize_shorter(open_image(jpeg(photo(200, 401)), "x"), 25, gap=1.0).shape == (3, 50, 25)


# On the device


def test_flips_are_torchvision_s_and_as_frequent_as_asked():
    images = torch.randint(0, 256, (200, 3, 5, 6), dtype=torch.uint8)
    flipped = mixing.flip(images, KEYS[:200], 0.3)
    chosen = torch.tensor([mixing.flips(SampleRandom(key), 0.3) for key in KEYS[:200].tolist()])
    assert flipped[chosen].equal(tv.horizontal_flip(images[chosen]))
    assert flipped[~chosen].equal(images[~chosen])
    many = torch.arange(2.0).expand(2000, 1, 1, 2)
    assert stats.binomtest(int(mixing.flip(many, KEYS, 0.3)[:, 0, 0, 0].sum()), 2000, 0.3).pvalue > thresholds.CHANCE


def test_normalisation_is_torchvision_s():
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    expected = tv.normalize(images.float() / 255, mean, std)
    assert torch.allclose(mixing.normalise(images, mean, std), expected, atol=1e-5)
    assert torch.allclose(mixing.normalise(images.float() / 255, mean, std), expected, atol=1e-5)
    assert torch.allclose(mixing.normalise(images, [0.4], [0.2]), tv.normalize(images.float() / 255, [0.4] * 3, [0.2] * 3), atol=1e-5)


def test_erasing_takes_one_box_of_the_right_area_and_leaves_the_rest():
    images = torch.ones(2000, 1, 40, 50)
    erased = mixing.erase(images, KEYS, 0.6)
    gone = erased[:, 0] == 0  # [N, H, W]
    changed = gone.flatten(1).any(1)
    assert stats.binomtest(int(changed.sum()), 2000, 0.6).pvalue > thresholds.CHANCE
    rows, columns = gone.any(2), gone.any(1)
    assert gone.equal(rows.unsqueeze(2) & columns.unsqueeze(1))  # a box
    height, width = rows.sum(1)[changed].double(), columns.sum(1)[changed].double()
    assert ((rows.diff(dim=1) != 0).sum(1) <= 2).all()  # without a gap
    area = (height * width / 2000).numpy()
    assert area.min() > 0.01 and area.max() < 0.35
    # torchvision's own boxes, drawn alike (they too may have to be drawn again where they do not fit).
    theirs = [tv_box_area() for _ in range(1000)]
    same: Any = stats.ks_2samp(area, theirs)
    assert same.pvalue > thresholds.CHANCE


def tv_box_area() -> float:
    from torchvision.transforms.v2 import RandomErasing

    erasing = RandomErasing(p=1.0)
    parameters = erasing.make_params([torch.zeros(1, 40, 50)])
    return parameters["h"] * parameters["w"] / 2000


def test_each_image_s_fate_is_its_own():
    images = torch.rand(32, 3, 16, 16)
    together = mixing.erase(mixing.flip(images, KEYS[:32], 0.5), KEYS[:32], 0.5)
    for order in (torch.arange(31, -1, -1), torch.tensor([7])):
        assert mixing.erase(mixing.flip(images[order], KEYS[order], 0.5), KEYS[order], 0.5).equal(together[order])


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 3.0])
def test_shares_follow_the_beta_distribution(alpha):
    u = torch.linspace(0.001, 0.999, 999)
    found = mixing.beta_quantile(u, alpha).double().numpy()
    assert np.abs(found - stats.beta(alpha, alpha).ppf(u.double().numpy())).max() < 2e-3


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_a_blend_or_a_box_and_targets_say_how_much(mixup, cutmix):
    count, side = 256, 24
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 2, side, side).contiguous()
    labels = torch.arange(count) % 10
    mixed, target = mixing.mix(images, labels, KEYS[:count], 10, mixup=mixup, cutmix=cutmix, probability=1.0, switch=0.5)
    assert torch.allclose(target.sum(1), torch.ones(count))
    partner = images.roll(-1, 0)
    other = (mixed - images) / (partner - images)  # how much of each pixel is the partner's
    share = 1 - other.mean((1, 2, 3))
    for i in range(count):
        a, b = labels[i : i + 1], labels.roll(-1)[i : i + 1]
        # timm mixes an image with its mirror in the batch: two samples in which ours comes first.
        theirs = mixup_target(torch.cat([a, b]), 10, lam=float(share[i]))[0]
        assert torch.allclose(target[i], theirs, atol=1e-3)
    is_box = ((other < 1e-4) | (other > 1 - 1e-4)).flatten(1).all(1)
    flat = (other.flatten(1).amax(1) - other.flatten(1).amin(1)) < 1e-3
    assert (is_box | flat).all()
    fraction = float((is_box & ~flat).float().mean())
    assert {0.0: fraction < 0.05, 0.5: 0.3 < fraction < 0.6, 1.0: fraction > 0.8}[0.5 if mixup and cutmix else float(cutmix > 0)]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_an_odd_batch_is_mixed_as_an_even_one(count):
    """The partner is the next image, round the end, so that nobody is left over; a lone image is its own partner."""
    images, labels = torch.rand(count, 3, 8, 8), torch.arange(count)
    partners = images.roll(-1, 0)
    mixed, target = mixing.mix(images, labels, KEYS[:count], 10, mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5)
    assert torch.allclose(target.sum(1), torch.ones(count))
    low, high = torch.minimum(images, partners), torch.maximum(images, partners)
    assert ((mixed >= low - 1e-6) & (mixed <= high + 1e-6)).all()
    for i in range(count):
        assert set(target[i].nonzero().flatten().tolist()) <= {i, (i + 1) % count}
    if count == 1:
        assert torch.allclose(mixed, images) and target[0, 0] == 1
    else:
        assert not torch.allclose(mixed, images)


def test_mixing_with_probability():
    images, labels = torch.rand(2000, 1, 4, 4), torch.arange(2000) % 7
    mixed, target = mixing.mix(images, labels, KEYS, 7, mixup=0.8, cutmix=1.0, probability=0.25, switch=0.5)
    untouched = (mixed == images).flatten(1).all(1)
    assert (target[untouched].max(1).values == 1).sum() >= (untouched.sum() * 0.95)
    assert 0.2 < 1 - untouched.float().mean() < 0.28
    nothing, hard = mixing.mix(images, labels, KEYS, 7, mixup=0.8, cutmix=1.0, probability=0.0, switch=0.5)
    assert nothing.equal(images) and hard.argmax(1).equal(labels) and (hard.max(1).values == 1).all()
