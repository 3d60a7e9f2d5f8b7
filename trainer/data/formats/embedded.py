"""Datasets that need no files: scikit-learn's handwritten digits, and patterns in noise of any size and number."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from trainer.data.source import Sample, split_rows

if TYPE_CHECKING:
    from collections.abc import Sequence


@functools.cache
def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 handwritten digits, uint8 [1797, 8, 8], and what they are, int64 [1797].

    Read straight from scikit-learn's files: importing sklearn.datasets costs a second, this a twentieth of one.
    """
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.submodule_search_locations, "scikit-learn is a dependency"
    packed = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz").read_bytes()
    values = gzip.decompress(packed).replace(b"\n", b",").rstrip(b",").split(b",")
    table = np.array(values, dtype=np.float64).reshape(-1, 65)  # 64 pixels of 0 .. 16, then the digit
    return np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8), table[:, 64].astype(np.int64)


@functools.cache
def digit_split(split: str) -> np.ndarray:
    """Rows of a split: a fixed fifth of each digit validates."""
    train, val = split_rows(load_digits()[1], 0.2, seed=0)
    return train if split == "train" else val


class Digits:
    """The digits as RGB images of 8 x 8 pixels."""

    classes = tuple("0123456789")
    channels = 3

    def __init__(self, split: str) -> None:
        self.split = split
        self._open()

    def _open(self) -> None:
        images, labels = load_digits()
        rows = digit_split(self.split)
        self._rows, self._images, self._labels = rows, images[rows], labels[rows]
        self.fingerprint = hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()[:32]

    def __reduce__(self) -> tuple[type[Digits], tuple[str]]:
        return Digits, (self.split,)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return {"image": Image.fromarray(self._images[index]).convert("RGB"), "label": int(self._labels[index])}

    def name(self, index: int) -> str:
        return f"digits/{self._rows[index]}"

    def labels(self) -> np.ndarray:
        return self._labels


class Synthetic:
    """A coarse pattern of colours per class under as much noise. Every sample follows from (seed, split, index) alone."""

    GRID = 4  # cells along a side: survives cropping and resizing, and is learned within a few steps

    def __init__(self, split: str, *, num_samples: int, num_classes: int, size: int, channels: int, seed: int) -> None:
        self.split, self.num_samples, self.size, self.channels, self.seed = split, num_samples, size, channels, seed
        self.classes: Sequence[str] = tuple(f"class_{i}" for i in range(num_classes))
        key = f"synthetic-1 {split} {num_samples} {num_classes} {size} {channels} {seed}"
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
        self._cell = np.arange(size) * self.GRID // size  # [size] which cell of the grid a pixel lies in

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        label = index % len(self.classes)
        grid = np.random.default_rng((self.seed, label)).integers(0, 256, (self.GRID, self.GRID, self.channels), dtype=np.uint8)
        noise = np.random.default_rng((self.seed, self.split == "val", index, 1)).bytes(self.size * self.size * self.channels)
        image = (grid[self._cell][:, self._cell] >> 1) + (np.frombuffer(noise, np.uint8).reshape(self.size, self.size, -1) >> 1)
        return {"image": Image.fromarray(image) if self.channels == 3 else image, "label": label}

    def name(self, index: int) -> str:
        return f"synthetic/{self.split}/{index}"

    def labels(self) -> np.ndarray:
        return np.arange(self.num_samples, dtype=np.int64) % len(self.classes)
