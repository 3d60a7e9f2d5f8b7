"""Pictures composed of handwritten digits, of which every box, part and mask is known exactly."""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
from PIL import Image

from trainer.data.formats.embedded import digit_split, load_digits
from trainer.data.source import Sample

INK = 48  # of 255: a digit's pixels from here on are drawn, the others stay background, so boxes and masks are exact


class Composed:
    """Base of composed pictures. Every sample follows from (seed, split, index) alone; training and validation draw
    from different handwritten digits."""

    channels = 3
    classes: tuple[str, ...] = ()

    def __init__(self, split: str, *, num_samples: int, size: int, noise: float, seed: int) -> None:
        self.split, self.num_samples, self.size, self.noise, self.seed = split, num_samples, size, noise, seed
        key = f"{type(self).__name__}-1 {split} {num_samples} {size} {noise} {seed}"
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return self.num_samples

    def name(self, index: int) -> str:
        return f"{type(self).__name__}/{self.split}/{index}"

    def random(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        return np.random.default_rng((self.seed, self.split == "val", index))

    def digit(self, random: np.random.Generator, digit: int | None = None) -> tuple[np.ndarray, int]:
        """A handwritten digit of this split, uint8 [8, 8], and which one it is."""
        images, labels = load_digits()
        rows = _rows(self.split, digit)
        row = rows[random.integers(len(rows))]
        return images[row], int(labels[row])

    def background(self, random: np.random.Generator) -> np.ndarray:
        """Blurred blobs of dark colours and some grain, uint8 [H, W, 3]."""
        blobs = random.integers(0, 1 + int(80 * self.noise), (5, 5, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(blobs).resize((self.size, self.size), Image.Resampling.BILINEAR))
        return smooth + random.integers(0, 1 + int(40 * self.noise), smooth.shape, dtype=np.uint8)


@functools.cache
def _rows(split: str, digit: int | None) -> np.ndarray:
    rows = digit_split(split)
    return rows if digit is None else rows[load_digits()[1][rows] == digit]


def draw(canvas: np.ndarray, glyph: np.ndarray, side: int, left: int, top: int, colour: np.ndarray) -> np.ndarray:
    """Draw a glyph as a square of `side` pixels. Returns where its ink went, bool [H, W] of the canvas."""
    cell = np.arange(side) * len(glyph) // side
    large = glyph[cell][:, cell]  # [side, side]
    drawn = large >= INK
    shade = (0.5 + large[drawn] / 510)[:, None]  # [pixels, 1]
    canvas[top : top + side, left : left + side][drawn] = (shade * colour).astype(np.uint8)
    ink = np.zeros(canvas.shape[:2], dtype=bool)
    ink[top : top + side, left : left + side] = drawn
    return ink


def box_around(ink: np.ndarray) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2): the least box that holds every pixel of the ink; right and bottom are exclusive."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class DigitScenes(Composed):
    """One to `max_objects` digits of different sizes and colours, none over another, on a blurred background."""

    classes = tuple("0123456789")

    def __init__(self, split: str, *, num_samples: int, size: int, max_objects: int, noise: float, seed: int) -> None:
        super().__init__(split, num_samples=num_samples, size=size, noise=noise, seed=seed)
        self.max_objects = max_objects
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {max_objects}".encode()).hexdigest()[:32]

    def __getitem__(self, index: int) -> Sample:
        random = self.random(index)
        canvas = self.background(random)
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        taken = np.zeros(canvas.shape[:2], dtype=bool)
        for _ in range(int(random.integers(1, self.max_objects + 1))):
            glyph, label = self.digit(random)
            side = max(8, round(self.size * random.uniform(0.2, 0.45)))
            colour = random.uniform(140, 255, 3)
            for _ in range(20):  # places to try; a crowded scene gets fewer digits
                left, top = (int(n) for n in random.integers(0, self.size - side + 1, 2))
                if not taken[top : top + side, left : left + side].any():
                    taken[top : top + side, left : left + side] = True
                    boxes.append(box_around(draw(canvas, glyph, side, left, top, colour)))
                    labels.append(label)
                    break
        corners = np.array(boxes, dtype=np.float32)  # [M, 4], M >= 1
        return {
            "image": Image.fromarray(canvas), "boxes": corners, "labels": np.array(labels, dtype=np.int64),
            "crowd": np.zeros(len(boxes), dtype=bool), "area": (corners[:, 2:] - corners[:, :2]).prod(axis=1), "image_id": index,
        }  # fmt: skip

    def labels(self) -> None:
        return None


class DigitParts(Composed):
    """A figure of four digits: top, right, bottom and left. Each part shows one of two digits that no other part shows.

    The class says which; its four bits have even parity, so any two classes differ in two parts, and a figure with one part
    hidden still tells its class. `parts` are the digits' centres, `mask` holds 1 + the part's number where its ink is.
    """

    PARTS = ("top", "right", "bottom", "left")
    BITS = tuple(b for b in np.ndindex(2, 2, 2, 2) if sum(b) % 2 == 0)  # 8 classes
    classes = tuple("".join(str(2 * part + bit) for part, bit in enumerate(bits)) for bits in BITS)
    part_names = PARTS

    def __init__(self, split: str, *, num_samples: int, size: int, hidden: float, noise: float, seed: int) -> None:
        super().__init__(split, num_samples=num_samples, size=size, noise=noise, seed=seed)
        self.hidden = hidden
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {hidden}".encode()).hexdigest()[:32]

    def __getitem__(self, index: int) -> Sample:
        random = self.random(index)
        canvas = self.background(random)
        label = index % len(self.classes)
        side = max(8, round(self.size * random.uniform(0.2, 0.26)))
        reach = self.size * random.uniform(0.22, 0.28)  # from the middle of the figure to the middle of a part, in pixels
        middle = self.size / 2 + random.uniform(-0.08, 0.08, 2) * self.size
        turn = math.radians(random.uniform(-20, 20))
        hidden = int(random.integers(4)) if random.random() < self.hidden else None
        parts = np.zeros((4, 3), dtype=np.float32)  # (x, y, visible)
        mask = np.zeros(canvas.shape[:2], dtype=np.uint8)
        for part, bit in enumerate(self.BITS[label]):
            glyph, _ = self.digit(random, 2 * part + bit)
            colour = random.uniform(140, 255, 3)
            angle = turn + math.pi / 2 * (part - 1)  # 0 is up, then clockwise; y points down
            x, y = middle + reach * np.array([math.cos(angle), math.sin(angle)])
            left, top = (int(np.clip(round(c - side / 2), 0, self.size - side)) for c in (x, y))
            if part != hidden:
                mask[draw(canvas, glyph, side, left, top, colour)] = part + 1
                parts[part] = (left + side / 2, top + side / 2, 1)
        return {
            "image": Image.fromarray(canvas),
            "label": label,
            "parts": parts,
            "box": np.array(box_around(mask > 0), np.float32),
            "mask": mask,
        }

    def labels(self) -> np.ndarray:
        return np.arange(self.num_samples, dtype=np.int64) % len(self.classes)
