"""The augmentation of part discovery on birds: images turned, moved and scaled before the square is cut out."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from trainer.data.augment import colour
from trainer.data.augment.geometry import SPATIAL, resize_shorter
from trainer.data.augment.policies import average_colour
from trainer.data.augment.standard import CROP, Standard

if TYPE_CHECKING:
    from trainer.config import DatasetConfig
    from trainer.config.augmentation import Cub
    from trainer.data.source import Sample
    from trainer.random import SampleRandom

Affine = tuple[float, float, float, float, float, float]
"""Where a pixel of the result comes from: (a, b, c, d, e, f) with x' = a x + b y + c, y' = d x + e y + f."""


class Turned(Standard):
    """`Standard` with another way to its training images."""

    cfg: Cub

    def __init__(self, cfg: Cub, dataset: DatasetConfig, *, train: bool) -> None:
        super().__init__(cfg, dataset, train=train, colour=partial(colour.illuminate, probability=cfg.planckian))
        self.fill = average_colour(dataset.mean)

    def sample(self, sample: Sample, random: SampleRandom) -> dict[str, Any]:
        if not self.train:
            return super().sample(sample, random)
        pixels = resize_shorter(sample["image"], self.size, gap=1.0, bicubic=self.bicubic)  # [3, H, W]
        height, width = pixels.shape[1:]
        draw = random.stream(CROP)
        angle = draw.uniform(-self.cfg.rotation, self.cfg.rotation)
        shift = [round(draw.uniform(-self.cfg.translation, self.cfg.translation) * side) for side in (width, height)]
        zoom = draw.uniform(*self.cfg.zoom)
        corner = (draw.integer(width - self.size + 1), draw.integer(height - self.size + 1))
        affine = cut_out_of_turned((width, height), angle, (shift[0], shift[1]), zoom, corner)
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        image = image.transform((self.size, self.size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR, fillcolor=self.fill)
        rest = {name: value for name, value in sample.items() if name not in SPATIAL}
        return {**rest, "image": torch.from_numpy(np.array(image)).permute(2, 0, 1)}


def cut_out_of_turned(size: tuple[int, int], angle: float, shift: tuple[int, int], zoom: float, corner: tuple[int, int]) -> Affine:
    """Turning an image (in degrees, clockwise), moving and scaling it about its centre, and cutting a box out at `corner`, in one."""
    centre = (size[0] / 2, size[1] / 2)
    cos, sin = math.cos(math.radians(angle)) / zoom, math.sin(math.radians(angle)) / zoom
    x, y = corner[0] - centre[0] - shift[0], corner[1] - centre[1] - shift[1]
    return (cos, sin, cos * x + sin * y + centre[0], -sin, cos, -sin * x + cos * y + centre[1])
