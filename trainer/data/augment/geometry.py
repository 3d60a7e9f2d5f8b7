"""Where to cut an image, and cutting it: pixels, boxes, points and masks alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.images import load_down_to, to_rgb
from trainer.data.source import BadSample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from trainer.data.source import Sample
    from trainer.random import SampleRandom

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are outside
SPATIAL = frozenset({"boxes", "labels", "crowd", "area", "box", "parts", "mask"})  # what of a sample lies in its image's frame
CLIPPED = frozenset({"boxes", "labels", "crowd", "area"})  # one row per object
SCALES = (8, 4, 2)  # a JPEG can be decoded at 1/8, 1/4 and 1/2 of its size, for a fraction of the time


def size_of(image: Image | np.ndarray) -> tuple[int, int]:
    """Width and height."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def random_crop(width: int, height: int, scale: Sequence[float], ratio: Sequence[float], random: SampleRandom) -> Box:
    """A box of random area and aspect ratio (arXiv:1409.4842, sec. 6), drawn like torchvision's RandomResizedCrop."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * random.uniform(scale[0], scale[1])
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.integer(width - w + 1), random.integer(height - h + 1)
            return (left, top, left + w, top + h)
    # The image is too narrow: the largest central box of an allowed aspect ratio.
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return _central(width, height, max(w, 1), max(h, 1))


def centre_crop(width: int, height: int, fraction: float) -> Box:
    """The central square that is left when the shorter side is resized to size / fraction and size x size is cut out."""
    side = max(1, round(min(width, height) * fraction))
    return _central(width, height, side, side)


def _central(width: int, height: int, w: int, h: int) -> Box:
    left, top = (width - w) // 2, (height - h) // 2
    return (left, top, left + w, top + h)


@dataclass(frozen=True)
class Cut:
    """A box of an image resized to `size` x `size` pixels, mirrored or not."""

    box: Box
    size: int
    flip: bool = False

    @property
    def magnification(self) -> float:
        """Pixels of the box per pixel of the result, on the side that has fewer."""
        left, top, right, bottom = self.box
        return min(right - left, bottom - top) / self.size

    def at(self, scale: int) -> Cut:
        """The same cut of an image that was read at 1 / `scale` of its size."""
        left, top, right, bottom = self.box
        return Cut((left // scale, top // scale, -(-right // scale), -(-bottom // scale)), self.size, self.flip)

    def pixels(self, image: Image | np.ndarray, *, gap: float, bicubic: bool = False) -> Tensor:
        """[C, size, size], uint8, or float32 from arrays of any other type.

        Args:
            gap: a JPEG that has been opened but not read is decoded at 1/2, 1/4 or 1/8 of its size, as long as the box
                keeps `gap` times as many pixels a side as the result has.
        """
        image, scale = decoded(image, self.magnification / gap, bottom=self.box[3])
        return self.at(scale).resized(image, bicubic=bicubic)

    def resized(self, image: Image | np.ndarray, *, bicubic: bool = False) -> Tensor:
        """[C, size, size] out of a decoded image."""
        left, top, right, bottom = self.box
        part = image[top:bottom, left:right] if isinstance(image, np.ndarray) else np.array(image.crop(self.box))
        cut = resize(torch.from_numpy(np.require(part, requirements=["W"])).permute(2, 0, 1), (self.size, self.size), bicubic=bicubic)
        return cut.flip(-1) if self.flip else cut

    def points(self, xy: np.ndarray) -> np.ndarray:
        """float32 [..., 2] (x, y) in pixels of the cut."""
        left, top, right, bottom = self.box
        moved = (xy - (left, top)) * (self.size / (right - left), self.size / (bottom - top))
        if self.flip:
            moved = moved * (-1, 1) + (self.size, 0)
        return moved.astype(np.float32)

    def boxes(self, xyxy: np.ndarray) -> np.ndarray:
        """float32 [..., 4], not clipped to the cut."""
        corners = self.points(xyxy.reshape(*xyxy.shape[:-1], 2, 2))  # [..., 2, 2]
        if self.flip:  # the right edge is the left one now
            corners[..., 0] = corners[..., ::-1, 0].copy()
        return corners.reshape(xyxy.shape)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """[size, size], each pixel the nearest one of the mask."""
        left, top, right, bottom = self.box
        centres = (np.arange(self.size) + 0.5) / self.size
        rows, columns = top + (centres * (bottom - top)).astype(int), left + (centres * (right - left)).astype(int)
        return mask[np.ix_(rows, columns[::-1] if self.flip else columns)]

    def rest(self, sample: Sample) -> dict[str, Any]:
        """Everything of a sample but its image, moved along with it."""
        rest = {name: value for name, value in sample.items() if name != "image"}
        for name in {"boxes", "box"} & rest.keys():
            rest[name] = self.boxes(rest[name])
        if "parts" in rest:
            xy = self.points(rest["parts"][:, :2])
            inside = ((xy >= 0) & (xy < self.size)).all(axis=1)
            rest["parts"] = np.column_stack([xy, rest["parts"][:, 2] * inside]).astype(np.float32)
        if "mask" in rest:
            rest["mask"] = self.mask(rest["mask"])
        return rest


def resize(pixels: Tensor, size: tuple[int, int], *, bicubic: bool = False) -> Tensor:
    """[C, *size] out of [C, H, W]. On uint8 this is several times as fast as PIL's filter, and clamps bicubic's overshoot."""
    if pixels.shape[1:] == size:
        return pixels
    return F.interpolate(pixels.unsqueeze(0), size=size, mode="bicubic" if bicubic else "bilinear", antialias=True).squeeze(0)


def resize_shorter(image: Image | np.ndarray, size: int, *, gap: float, bicubic: bool = False) -> Tensor:
    """The whole image with a shorter side of `size` pixels, [C, H, W]."""
    width, height = size_of(image)
    image, _ = decoded(image, min(width, height) / size / gap)
    pixels = torch.from_numpy(image if isinstance(image, np.ndarray) else np.array(image))  # [H, W, C]
    factor = size / min(width, height)
    return resize(pixels.permute(2, 0, 1), (max(size, round(height * factor)), max(size, round(width * factor))), bicubic=bicubic)


def decoded(image: Image | np.ndarray, shrinks: float, *, bottom: int | None = None) -> tuple[Image | np.ndarray, int]:
    """An image with its pixels read, RGB or an array of uint8 or float32, and n: it is 1/n of its size now.

    Args:
        shrinks: how many times smaller the image may come. Only a JPEG that has been opened and not read does.
        bottom: rows of such a JPEG, counted at its full size, from which on none is needed; they may be missing then.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            image = image.astype(np.float32) / (65535 if image.dtype == np.uint16 else 1)
        return image, 1
    scale = 1
    try:
        if image.format == "JPEG" and getattr(image, "tile", None):  # opened, not read
            fits = next((s for s in SCALES if s <= shrinks), 1)
            if fits > 1 and image.draft(None, (image.width // fits, image.height // fits)) is not None:
                scale = fits
            load_down_to(image, image.height if bottom is None else -(-bottom // scale))
        image.load()
        return to_rgb(image), scale
    except Exception as error:  # decoders raise anything on malformed data; MemoryError among them
        raise BadSample("", f"cannot be decoded: {error}") from None
