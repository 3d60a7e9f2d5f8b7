"""Colour operations against torchvision's, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import RandomPhotometricDistort
from torchvision.transforms.v2 import functional as tv

from tests import thresholds
from trainer.data.augment import colour
from trainer.random import sample_keys, uniform

KEYS = torch.from_numpy(sample_keys(3, 0, np.arange(3000), np.zeros(3000, np.int64)))
IMAGES = torch.rand(12, 3, 16, 20, generator=torch.Generator().manual_seed(0))
GREYS = torch.cat([IMAGES[:1].mean(1, keepdim=True).expand(1, 3, 16, 20), torch.zeros(1, 3, 16, 20), torch.ones(1, 3, 16, 20)])


@pytest.mark.parametrize(
    ("operation", "theirs"),
    [(colour.brightness, tv.adjust_brightness), (colour.contrast, tv.adjust_contrast), (colour.saturation, tv.adjust_saturation)],
)
@pytest.mark.parametrize("images", [IMAGES, GREYS])
def test_factors(operation, theirs, images):
    factors = torch.linspace(0, 2, len(images))
    expected = torch.stack([theirs(image, float(f)) for image, f in zip(images, factors, strict=True)])
    assert torch.allclose(operation(images, factors), expected, atol=1e-5)


@pytest.mark.parametrize("images", [IMAGES, GREYS])
def test_hue(images):
    turns = torch.linspace(-0.5, 0.5, len(images))
    expected = torch.stack([tv.adjust_hue(image, float(t)) for image, t in zip(images, turns, strict=True)])
    assert torch.allclose(colour.hue(images, turns), expected, atol=1e-4)
    assert torch.allclose(colour.hue(images, torch.zeros(len(images))), images, atol=1e-6)


def test_grey_and_solarise():
    assert torch.allclose(colour.to_grey(IMAGES), tv.rgb_to_grayscale(IMAGES), atol=1e-6)
    assert torch.allclose(colour.solarise(IMAGES), tv.solarize(IMAGES, 0.5))


@pytest.mark.parametrize("size", [(16, 20), (40, 9)])
def test_blur(size):
    images = torch.rand(5, 3, *size)
    sigmas = torch.linspace(0.1, 2.0, 5)
    reach = min(6, min(size) - 1)
    expected = torch.stack([tv.gaussian_blur(image, [2 * reach + 1] * 2, [float(s)] * 2) for image, s in zip(images, sigmas, strict=True)])
    assert torch.allclose(colour.blur(images, sigmas), expected, atol=1e-5)


def test_light_follows_the_published_gains():
    """The first, a middle and the last row of the table of arXiv:2202.07993: red and blue over green."""
    table = {3.0: (1.6736, 0.0032), 6.5: (1.0461, 1.0387), 15.0: (0.7529, 1.4900)}
    images = torch.full((3000, 3, 1, 1), 0.4)
    lit = colour.illuminate(images, KEYS, 1.0)[..., 0, 0] / 0.4
    assert len(lit.unique(dim=0)) == 25
    for red, blue in table.values():
        nearest = (lit - torch.tensor([red, 1.0, blue])).abs().amax(1).min()
        assert nearest < 0.06 if blue < 0.1 else nearest < 0.015
    some = (colour.illuminate(images, KEYS, 0.8) != images).flatten(1).any(1)
    assert stats.binomtest(int(some.sum()), 3000, 0.8).pvalue > thresholds.CHANCE
    assert colour.illuminate(torch.ones(50, 3, 2, 2), KEYS[:50], 1.0).max() == 1


def changed(result: Tensor, images: Tensor) -> Tensor:
    return (result != images).flatten(1).any(1)


def test_probabilities_and_independence_of_the_batch():
    images = IMAGES[:1, :, :4, :4].expand(3000, 3, 4, 4).contiguous()
    operations = {
        "grey": lambda x, k: colour.grey(x, k, 0.3),
        "jitter": lambda x, k: colour.jitter(x, k, [0.4, 0.4, 0.2, 0.1], 0.3),
        "blur": lambda x, k: colour.random_blur(x, k, 0.3),
        "solarise": lambda x, k: colour.random_solarise(x, k, 0.3),
    }
    fates = {name: changed(operation(images, KEYS), images) for name, operation in operations.items()}
    for name, operation in operations.items():
        if name != "jitter":  # without the hue's rounding, what is not chosen stays bit by bit
            assert stats.binomtest(int(fates[name].sum()), 3000, 0.3).pvalue > thresholds.CHANCE
        assert torch.allclose(operation(images[5:9], KEYS[5:9]), operation(images, KEYS)[5:9], atol=1e-6)
    together = (fates["grey"] & fates["solarise"]).float().mean()
    assert abs(together - 0.09) < 0.02  # independent of one another


def test_jitter_reaches_its_range_and_no_further():
    images = torch.full((3000, 3, 2, 2), 0.5)
    brightness = colour.jitter(images, KEYS, [0.4, 0.0, 0.0, 0.0])[:, 0, 0, 0] / 0.5
    assert 0.6 <= brightness.min() < 0.61
    assert 1.39 < brightness.max() <= 1.4
    assert stats.kstest(((brightness - 0.6) / 0.8).numpy(), "uniform").pvalue > thresholds.CHANCE


def test_photometric_distortion_is_torchvisions():
    """With the numbers drawn for each key, put into torchvision's own transform."""
    images, keys = IMAGES.repeat(8, 1, 1, 1), KEYS[:96]
    u = uniform(keys, colour.DISTORTION, 11)
    transform = RandomPhotometricDistort()
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    ranges = (transform.brightness, transform.contrast, transform.saturation, transform.hue)
    for image, result, v in zip(images, colour.distort(images, keys, 0.5), u.tolist(), strict=True):
        params = {
            n: low + (high - low) * v[4 + i] if v[i] < 0.5 else None for i, (n, (low, high)) in enumerate(zip(names, ranges, strict=True))
        }
        order = torch.tensor(colour.ORDERS[int(v[10] * 6)])
        params |= {"contrast_before": v[8] < 0.5, "channel_permutation": order if v[9] < 0.5 else None}
        torch.testing.assert_close(result, transform.transform(image, params), atol=1e-4, rtol=0)
    torch.testing.assert_close(colour.distort(IMAGES, KEYS[:12], 0.0), IMAGES, atol=1e-6, rtol=0)
    torch.testing.assert_close(colour.distort(images, keys, 0.5)[3:5], colour.distort(images[3:5], keys[3:5], 0.5), atol=1e-6, rtol=0)


def test_three_augment_takes_each_third():
    images = IMAGES[:1].expand(3000, 3, 16, 20)[..., :4, :4].contiguous()
    result = colour.one_of_three(images, KEYS)
    grey = (result[:, 0] == result[:, 1]).flatten(1).all(1)
    solarised = ~changed(result, colour.solarise(images))
    blurred = ~grey & ~solarised
    assert stats.chisquare([int(x.sum()) for x in (grey, solarised, blurred)]).pvalue > thresholds.CHANCE
