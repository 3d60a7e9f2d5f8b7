"""What a dataset is to everything that reads one: samples by number. It knows no torch, no workers and no order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

Sample = dict[str, Any]
"""One sample, by these names; a format gives those that its config's `offers` lists, pixels in the image's own frame:

image     PIL.Image in mode RGB, or ndarray [H, W, C] where there are other than three channels
label     int, place in `Source.classes`
boxes     float32 [M, 4], (x1, y1, x2, y2) in pixels; M may be 0. With it `labels` int64 [M] and `crowd` bool [M]
          (regions of many objects, in validation only), `area` float32 [M] in pixels, `image_id` int
truth     float64 [M', 7], in validation, what found boxes are scored against: x, y, width and height as the file has them, in
          pixels, label, crowd (0 or 1) and area; also of objects that `boxes` has mended or left out. Without it: of `boxes`
box       float32 [4], the one object of a fine-grained photo, in pixels
parts     float32 [P, 3], (x, y, visible) of each named part, in pixels; visible is 0 or 1
mask      uint8 [H, W], 0 = background; what other values mean is the format's
real      uint8 [C], every class that is right, where `python -m trainer evaluate` was given such labels
group     int, which subpopulation: the metric val/worst_group_top1 is the least over groups
"""


class BadSample(Exception):
    """A sample that cannot be read: truncated, empty, not an image, too large. The loader draws another instead."""

    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = name, why
        super().__init__(name, why)  # both in args: it is pickled on its way out of a worker

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


class LayoutError(OSError):
    """Files are not laid out, or not written, as their format has it; the message says what is wrong, to follow a path."""


@runtime_checkable
class Source(Protocol):
    """Samples by number. Pickles small, survives fork and spawn, and reads the same bytes whoever asks."""

    @property
    def classes(self) -> Sequence[str]: ...  # index = label; () where there are none

    @property
    def channels(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...  # hash of the index (which files, sizes): changes when the data change

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...  # raises BadSample

    def name(self, index: int) -> str: ...  # path or key, for messages

    def labels(self) -> np.ndarray | None: ...  # int64 [len], without decoding; None if not known

    # Sources that read image files have more, for those who look for them with getattr():
    #   encoded(index) -> (bytes, ".jpg")   the file as it is, not decoded
    #   decode_hint(least: int | None)      JPEGs may come smaller, as long as the shorter side keeps `least` pixels; ignored
    #                                       where samples hold boxes, parts or masks. Without a hint, images come whole.
    #   aspect_ratios() -> float64 [len]    width over height of each image, where the index knows
    #   lazy: bool                          True: "image" comes with its header read and its pixels not, for a reader that
    #                                       knows the crop first: trainer.data.images.decode(image, name, least=...)


class Subset:
    """Some rows of another source, in the order given."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        import numpy as np

        self.source = source
        self.rows = np.ascontiguousarray(rows, dtype=np.int32 if len(source) < 2**31 else np.int64)
        self.classes, self.channels = source.classes, source.channels
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + self.rows.astype("<i8").tobytes()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.rows[index])]

    def name(self, index: int) -> str:
        return self.source.name(int(self.rows[index]))

    def labels(self) -> np.ndarray | None:
        labels = self.source.labels()
        return None if labels is None else labels[self.rows]

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        return encoded(self.source, int(self.rows[index]))

    def aspect_ratios(self) -> np.ndarray | None:
        ratios = aspect_ratios(self.source)
        return None if ratios is None else ratios[self.rows]

    def decode_hint(self, least: int | None) -> None:
        hint = getattr(self.source, "decode_hint", None)
        if hint is not None:
            hint(least)

    @property
    def lazy(self) -> bool:
        return getattr(self.source, "lazy", False)

    @lazy.setter
    def lazy(self, value: bool) -> None:
        if hasattr(self.source, "lazy"):
            self.source.lazy = value  # pyright: ignore[reportAttributeAccessIssue]


def fingerprints(**splits: Source | None) -> dict[str, str]:
    """What each split is made of, to see later whether it still is: for environment.json."""
    return {name: source.fingerprint for name, source in splits.items() if source is not None}


def encoded(source: Source, index: int) -> tuple[bytes, str] | None:
    """The image file of a sample as it lies on disk, and its extension (".jpg"); None where there is no such file."""
    own = getattr(source, "encoded", None)
    return own(index) if own is not None else None


def aspect_ratios(source: Source) -> np.ndarray | None:
    """Width over height of each image, float64 [len]; None where that is not known before it is read."""
    own = getattr(source, "aspect_ratios", None)
    return own() if own is not None else None


def split_rows(labels: np.ndarray, fraction: float, seed: int, names: Sequence[bytes] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to validate on, class by class: of every class, `fraction` of its samples, rounded.

    Which ones follows from the seed and each sample's name (its row number where there are no names), so a file that is
    added later moves at most one other between the two. A class of two or more samples gets at least one on each side.
    """
    import numpy as np

    ranks = [
        hashlib.blake2b(b"%d:" % seed + (names[i] if names is not None else b"%d" % i), digest_size=8).digest() for i in range(len(labels))
    ]
    rank = np.frombuffer(b"".join(ranks), dtype=">u8")
    held_out = np.zeros(len(labels), dtype=bool)
    order = np.lexsort((rank, labels))
    starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) != 0]) if len(labels) else np.zeros(0, dtype=np.int64)
    for start, stop in zip(starts, np.r_[starts[1:], len(labels)], strict=True):
        count = round((stop - start) * fraction)
        if stop - start >= 2:
            count = min(max(count, 1), stop - start - 1)
        held_out[order[start : start + count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
