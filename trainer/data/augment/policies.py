"""Random operations on one image, from torchvision: AutoAugment and its kin. They run in the worker, on PIL images, which is
three times as fast as on tensors, and draw from torch's global generator, which is the sample's own while they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from trainer.random import SampleRandom

POLICY = 2  # stream of a sample's numbers
BILINEAR = InterpolationMode.BILINEAR


class Policy:
    """A transform of PIL images as one of uint8 [3, H, W] tensors, keyed by sample."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, pixels: Tensor, random: SampleRandom) -> Tensor:
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        with random.stream(POLICY).global_generators():
            image = self.transform(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def rand_augment(operations: int, magnitude: int, mean: Sequence[float]) -> v2.Transform:
    return v2.RandAugment(operations, magnitude, interpolation=BILINEAR, fill=list(average_colour(mean)))


def auto_augment(learned_on: str, mean: Sequence[float]) -> v2.Transform:
    return v2.AutoAugment(AutoAugmentPolicy(learned_on), interpolation=BILINEAR, fill=list(average_colour(mean)))


def trivial_augment(mean: Sequence[float]) -> v2.Transform:
    return v2.TrivialAugmentWide(interpolation=BILINEAR, fill=list(average_colour(mean)))


def aug_mix(severity: int, width: int, depth: int, alpha: float, mean: Sequence[float]) -> v2.Transform:
    return v2.AugMix(severity, width, depth, alpha, interpolation=BILINEAR, fill=list(average_colour(mean)))


def average_colour(mean: Sequence[float]) -> tuple[int, int, int]:
    """What appears beyond the edges of a turned image: the average colour, which normalisation turns into zero."""
    red, green, blue = (round(255 * m) for m in (mean if len(mean) == 3 else [mean[0]] * 3))
    return (red, green, blue)
