"""Turning, moving and scaling images, and undoing it on their maps: what equivariance is measured with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.random import fold, uniform

STREAM = 0x70B1


@dataclass(frozen=True, slots=True)
class Turn:
    """One similarity for a whole batch: x -> zoom * R(angle) x + shift, about the middle, in units of half the image's side."""

    angle: float  # radians
    shift: tuple[float, float]  # (x, y)
    zoom: float

    def apply(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] turned, bilinear; what comes from outside is 0, the mean of normalised images."""
        cos, sin = math.cos(self.angle) / self.zoom, math.sin(self.angle) / self.zoom
        x, y = self.shift
        backwards = ((cos, sin, -cos * x - sin * y), (-sin, cos, sin * x - cos * y))
        return _resample(images, backwards, "bilinear")

    def undo(self, maps: Tensor) -> Tensor:
        """Maps [N, K, h, w] of turned images back in the place of the images as they were; each takes the nearest."""
        cos, sin = math.cos(self.angle) * self.zoom, math.sin(self.angle) * self.zoom
        return _resample(maps, ((cos, -sin, self.shift[0]), (sin, cos, self.shift[1])), "nearest")


def _resample(x: Tensor, theta: tuple[tuple[float, ...], ...], mode: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        matrix = torch.tensor(theta, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
        grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode=mode, padding_mode="zeros", align_corners=False)


def draw_turn(seed: int, step: int, size: int, *, rotation: float, translation: float, zoom: list[float]) -> Turn:
    """The turn of an optimizer step, the same on every rank and for every micro-batch of it.

    Args:
        size: side of the images in pixels; shifts are whole pixels.
        rotation: largest angle either way, in degrees. translation: largest shift, as a fraction of the side.
    """
    key = torch.tensor([fold(seed, step)])
    angle, right, down, scale = uniform(key, STREAM, 4)[0].tolist()
    shift = tuple(round((2 * u - 1) * translation * size) * 2 / size for u in (right, down))
    return Turn(math.radians((2 * angle - 1) * rotation), (shift[0], shift[1]), zoom[0] + scale * (zoom[1] - zoom[0]))
