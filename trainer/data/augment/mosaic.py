"""Four images around a point of one canvas (mosaic, arXiv:2004.10934, sec. 3.3): where each goes, and what of it is seen.

It knows no files; which three images come along is the reader's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from trainer.data.augment.geometry import CLIPPED, Box

if TYPE_CHECKING:
    from trainer.random import SampleRandom

TILES = 4
MARGIN = 0.25  # of the canvas: the point lies at least this far from every edge, as in YOLOv4's successors


@dataclass(frozen=True)
class Plan:
    """Where the four meet and how large they are.

    Args:
        scale: an image's longer side, as a fraction of the canvas's.
    """

    size: int
    centre: tuple[int, int]  # (x, y) in pixels of the canvas
    scale: float

    @staticmethod
    def draw(size: int, scale: tuple[float, float], random: SampleRandom) -> Plan:
        x, y = (round(random.uniform(MARGIN, 1 - MARGIN) * size) for _ in range(2))
        return Plan(size, (x, y), random.uniform(*scale))

    def place(self, number: int, width: int, height: int) -> tuple[Box, Box]:
        """(region of the image, box on the canvas) of tile `number`: upper left, upper right, lower left, lower right.

        One corner of the image lies at the centre; of a larger image than there is room for, the part around it is seen.
        """
        (x, y), (right, low) = self.centre, (number % 2, number // 2)
        factor = self.size * self.scale / max(width, height)
        w, seen_w = _seen(width, self.size - x if right else x, factor)
        h, seen_h = _seen(height, self.size - y if low else y, factor)
        left, top = 0 if right else width - seen_w, 0 if low else height - seen_h
        x, y = x if right else x - w, y if low else y - h
        return (left, top, left + seen_w, top + seen_h), (x, y, x + w, y + h)


def _seen(side: int, room: int, factor: float) -> tuple[int, int]:
    """(pixels of the canvas, pixels of the image) along one axis."""
    length = min(room, max(1, round(side * factor)))
    return length, min(side, max(1, round(length / factor)))


@dataclass(frozen=True)
class Tile:
    """A part of an image as it lies on the canvas."""

    box: Box
    pixels: Tensor  # [C, height, width]
    objects: dict[str, np.ndarray]  # one row an object, `boxes` in pixels of the canvas


def objects_of(tiles: list[Tile]) -> dict[str, Any]:
    """The objects of all tiles, each field as one array."""
    return {name: np.concatenate([tile.objects[name] for tile in tiles]) for name in CLIPPED & tiles[0].objects.keys()}
