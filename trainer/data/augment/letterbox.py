"""Images at their own aspect ratio on a square canvas, with boxes that stay right: flips, crops, scales, several sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.augment import colour as colours
from trainer.data.augment import mixing
from trainer.data.augment.geometry import CLIPPED, Box, decoded, random_crop, resize, size_of
from trainer.data.augment.mosaic import TILES, Plan, Tile, objects_of
from trainer.data.augment.standard import CROP, Standard
from trainer.random import SampleRandom, fold

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainer.config import DatasetConfig
    from trainer.config.letterbox import Letterbox
    from trainer.data.augment import Other
    from trainer.data.source import Sample

SCALE, WINDOW, MOSAIC, CHOSEN = 2, 3, 4, 5  # streams of a sample's numbers
LEAST = 1.0  # pixels: a box that is narrower or lower on the canvas shows nothing


@dataclass(frozen=True)
class Fit:
    """A region of an image, resized to `width` x `height` pixels of the canvas, mirrored or not."""

    region: Box
    width: int
    height: int
    flip: bool = False

    @property
    def factors(self) -> np.ndarray:
        """Canvas pixels per pixel of the image, (x, y)."""
        left, top, right, bottom = self.region
        return np.array([self.width / (right - left), self.height / (bottom - top)])

    def pixels(self, image: Image | np.ndarray, *, gap: float, bicubic: bool) -> Tensor:
        """[C, height, width]. A JPEG may be decoded smaller, with `gap` times as many pixels a side as the result has."""
        image, scale = decoded(image, float(1 / self.factors.max() / gap))
        left, top, right, bottom = self.region
        left, top, right, bottom = left // scale, top // scale, -(-right // scale), -(-bottom // scale)
        part = image[top:bottom, left:right] if isinstance(image, np.ndarray) else np.array(image.crop((left, top, right, bottom)))
        pixels = torch.from_numpy(np.require(part, requirements=["W"])).permute(2, 0, 1)
        resized = resize(pixels, (self.height, self.width), bicubic=bicubic)
        return resized.flip(-1) if self.flip else resized

    def points(self, xy: np.ndarray) -> np.ndarray:
        """float32 [..., 2] (x, y) on the canvas."""
        moved = (xy - np.array(self.region[:2])) * self.factors
        if self.flip:
            moved = moved * (-1, 1) + (self.width, 0)
        return moved.astype(np.float32)

    def boxes(self, xyxy: np.ndarray) -> np.ndarray:
        """float32 [..., 4], not clipped."""
        corners = self.points(xyxy.reshape(*xyxy.shape[:-1], 2, 2))  # [..., 2, 2]
        if self.flip:  # the right edge is the left one now
            corners[..., 0] = corners[..., ::-1, 0].copy()
        return corners.reshape(xyxy.shape)

    def mask(self, mask: np.ndarray, size: int) -> np.ndarray:
        """[size, size], each pixel of the region the nearest one of the mask, 0 beside it."""
        left, top, right, bottom = self.region
        rows = top + ((np.arange(self.height) + 0.5) / self.height * (bottom - top)).astype(int)
        columns = left + ((np.arange(self.width) + 0.5) / self.width * (right - left)).astype(int)
        canvas = np.zeros((size, size), mask.dtype)
        canvas[: self.height, : self.width] = mask[np.ix_(rows, columns[::-1] if self.flip else columns)]
        return canvas


def drop_invisible(sample: dict[str, Any], whole: np.ndarray, min_visible: float) -> None:
    """Drop the objects of which too little is left, given their boxes [M, 4] before clipping."""
    boxes = sample["boxes"]
    sides, before = boxes[:, 2:] - boxes[:, :2], whole[:, 2:] - whole[:, :2]
    kept = (sides.prod(axis=1) >= min_visible * before.prod(axis=1)) & (sides >= LEAST).all(axis=1)
    for name in CLIPPED & sample.keys():
        sample[name] = sample[name][kept]


def truth_of(objects: dict[str, Any]) -> np.ndarray:
    """`truth` of a source whose boxes are what its makers meant (see trainer.data.source)."""
    corners = objects["boxes"].astype(np.float64)
    return np.column_stack([corners[:, :2], corners[:, 2:] - corners[:, :2], objects["labels"], objects["crowd"], objects["area"]])


class Boxed(Standard):
    """Places each image in the upper left corner of the canvas. A sample gets `size`, the (height, width) of its picture
    there; in validation also `truth` and `source_size`, both in the file's own pixels, for scores that no resizing touches."""

    cfg: Letterbox

    def __init__(self, cfg: Letterbox, dataset: DatasetConfig, *, train: bool) -> None:
        # Contrast is about the mean of the square, with what lies beside the picture.
        colour = partial(colours.distort, probability=cfg.distortion) if cfg.distortion else None
        super().__init__(cfg, dataset, train=train, colour=colour)
        self.sides, self.jitter, self.min_visible = cfg.shorter_side, cfg.jitter, cfg.min_visible

    def sample(self, sample: Sample, random: SampleRandom) -> dict[str, Any]:
        width, height = size_of(sample["image"])
        fit = self._fit(width, height, random)
        rest = {name: value for name, value in sample.items() if name != "image"}
        if not self.train:
            rest["source_size"] = (height, width)
        if "boxes" in rest:
            moved = fit.boxes(rest["boxes"])
            if not self.train:
                rest.setdefault("truth", truth_of(rest))
            rest["boxes"] = np.clip(moved, 0, np.array([fit.width, fit.height] * 2, dtype=np.float32))
            if self.train:
                drop_invisible(rest, moved, self.min_visible)
        if "box" in rest:
            rest["box"] = fit.boxes(rest["box"])
        if "parts" in rest:
            xy = fit.points(rest["parts"][:, :2])
            inside = ((xy >= 0) & (xy < (fit.width, fit.height))).all(axis=1)
            rest["parts"] = np.column_stack([xy, rest["parts"][:, 2] * inside]).astype(np.float32)
        if "mask" in rest:
            rest["mask"] = fit.mask(rest["mask"], self.size)
        pixels = fit.pixels(sample["image"], gap=1.0 if self.train else 2.0, bicubic=self.bicubic)
        return {"image": self._canvas(pixels), "size": (fit.height, fit.width), **rest}

    def others(self, random: SampleRandom, epoch: int) -> int:
        """How many images come beside a sample: three, where it becomes a mosaic."""
        cfg, here = self.cfg, self.train and self.cfg.mosaic > 0 and (self.cfg.mosaic_epochs is None or epoch < self.cfg.mosaic_epochs)
        return TILES - 1 if here and random.stream(CHOSEN).uniform() < cfg.mosaic else 0

    def together(self, sample: Sample, other: Other, random: SampleRandom) -> dict[str, Any]:
        """A mosaic of a sample and three others. All it has beside image and objects is the sample's."""
        low, high = self.cfg.mosaic_scale
        plan = Plan.draw(self.size, (low, high), random.stream(MOSAIC))

        def tile(number: int, sample: Sample) -> Tile:
            return self._tile(sample, plan, number, SampleRandom(fold(random.key, MOSAIC, number), restores=random.restores))

        tiles = [tile(0, sample), *(other(n, partial(tile, n)) for n in range(1, TILES))]
        canvas = self._blank(tiles[0].pixels)
        for part in tiles:
            left, top, right, bottom = part.box
            canvas[:, top:bottom, left:right] = part.pixels
        rest = {name: value for name, value in sample.items() if name != "image"}
        return {"image": canvas, "size": (self.size, self.size), **rest, **objects_of(tiles)}

    def _tile(self, sample: Sample, plan: Plan, number: int, random: SampleRandom) -> Tile:
        region, box = plan.place(number, *size_of(sample["image"]))
        left, top, right, bottom = box
        fit = Fit(region, right - left, bottom - top, flip=mixing.flips(random, self.cfg.hflip))
        objects = {name: sample[name] for name in CLIPPED & sample.keys()}
        moved = fit.boxes(objects["boxes"])
        objects["boxes"] = np.clip(moved, 0, np.array([fit.width, fit.height] * 2, dtype=np.float32))
        drop_invisible(objects, moved, self.min_visible)
        objects["boxes"] = objects["boxes"] + np.array([left, top] * 2, dtype=np.float32)
        return Tile(box, fit.pixels(sample["image"], gap=1.0, bicubic=self.bicubic), objects)

    def _canvas(self, pixels: Tensor) -> Tensor:
        """[C, size, size], the picture in the upper left corner."""
        _, height, width = pixels.shape
        if (height, width) == (self.size, self.size):
            return pixels
        canvas = self._blank(pixels)
        canvas[:, :height, :width] = pixels
        return canvas

    def _blank(self, pixels: Tensor) -> Tensor:
        """[C, size, size] of the mean colour, which is zero once it is normalised."""
        channels = pixels.shape[0]
        mean = torch.tensor([self.mean[c % len(self.mean)] for c in range(channels)])
        colour = (mean * 255).round().to(torch.uint8) if pixels.dtype == torch.uint8 else mean
        return colour.view(-1, 1, 1).repeat(1, self.size, self.size)

    def _fit(self, width: int, height: int, random: SampleRandom) -> Fit:
        flip = self.flips_early and mixing.flips(random, self.cfg.hflip)
        region: Box = (0, 0, width, height)
        if self.train and self.cfg.crop_scale:
            region = random_crop(width, height, self.cfg.crop_scale, self.cfg.crop_ratio, random.stream(CROP))
        w, h = region[2] - region[0], region[3] - region[1]
        factor = self.size / max(w, h)
        if self.sides:
            side = random.stream(SCALE).choice(self.sides) if self.train else self.sides[-1]
            factor = min(side / min(w, h), factor)
        if self.train and self.jitter:
            factor *= random.stream(SCALE + 10).uniform(*self.jitter)
            region = self._window(region, factor, random.stream(WINDOW))
            w, h = region[2] - region[0], region[3] - region[1]
        if not self.cfg.keep_aspect:
            return Fit(region, self.size, self.size, flip=flip)
        return Fit(region, *(min(self.size, max(1, round(side * factor))) for side in (w, h)), flip=flip)

    def _window(self, region: Box, factor: float, random: SampleRandom) -> Box:
        """As much of the region as the canvas holds at this scale, anywhere in it."""
        left, top, right, bottom = region
        most = max(1, int(self.size / factor))  # pixels of the image
        w, h = min(right - left, most), min(bottom - top, most)
        left, top = left + random.integer(right - left - w + 1), top + random.integer(bottom - top - h + 1)
        return (left, top, left + w, top + h)
