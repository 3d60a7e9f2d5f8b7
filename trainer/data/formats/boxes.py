"""Boxes of objects: what every detection format turns its files into, and what becomes of boxes that cannot be right."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.files import FileSource
from trainer.data.source import BadSample, Sample
from trainer.data.table import Column, Ragged, Strings, Table
from trainer.errors import DataError

logger = logging.getLogger(__name__)

ROUNDING = 1.0  # pixels: boxes reach this far over the edge in every data set that was ever rounded; clipped without a word
NAMED = 10  # images named per kind of defect; the count is of all

MEANING = {
    "not_finite": "have NaN or infinite corners",
    "no_area": "have no area",
    "outside": "lie outside their image",
    "over_the_edge": "reach over the edge of their image",
    "unknown_category": "are of a category that is not listed",
    "unknown_image": "belong to an image that is not listed",
    "missing_image": "images are listed but not there",
    "unreadable_image": "images cannot be read",
    "odd_channels": "arrays have another number of channels than the others, and are replaced when their turn comes",
    "crowd": "mark crowds (left out of training, ignored in validation)",
    "empty": "images show no object",
}
HARMLESS = ("crowd", "empty")  # said, and no reason to refuse the data


@dataclass
class Annotations:
    """What a format has read, image by image, before anyone has judged it."""

    classes: Sequence[str]
    paths: list[str] = field(default_factory=list)  # relative to the source's root
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) in pixels
    image_ids: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # boxes of each image
    boxes: list[Sequence[float]] = field(default_factory=list)  # (x1, y1, x2, y2) in pixels, all images end to end
    labels: list[int] = field(default_factory=list)  # place in classes; -1: unknown
    crowd: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)  # pixels; NaN: that of the box
    defects: dict[str, list[str]] = field(default_factory=dict)  # kind -> names of images, once per case, found while reading

    def image(self, path: str, size: tuple[int, int], image_id: int) -> None:
        """Begin an image; `box` adds to the one begun last."""
        self.paths.append(path)
        self.sizes.append(size)
        self.image_ids.append(image_id)
        self.counts.append(0)

    def box(self, corners: Sequence[float], label: int, crowd: bool = False, area: float = float("nan")) -> None:
        self.counts[-1] += 1
        self.boxes.append(corners)
        self.labels.append(label)
        self.crowd.append(crowd)
        self.areas.append(area)

    def defect(self, kind: str, image: str) -> None:
        self.defects.setdefault(kind, []).append(image)


def settle(read: Annotations, policy: str, keep_empty: bool, where: str) -> tuple[dict[str, Column], dict[str, Any]]:
    """Columns of a table, with every box inside its image and of positive area; meta holds what was mended.

    Args:
        policy: "clip" mends boxes that reach over the edge and drops what cannot be mended; "drop" drops every box with a
            defect; "raise" refuses the data.
        keep_empty: keep images without a (remaining) box, as examples of nothing.
        where: the file or folder, for messages.
    """
    boxes = np.array(read.boxes, dtype=np.float64).reshape(-1, 4)
    labels, crowd = np.array(read.labels, dtype=np.int64), np.array(read.crowd, dtype=bool)
    sizes, counts = np.array(read.sizes, dtype=np.int64).reshape(-1, 2), np.array(read.counts, dtype=np.int64)
    image_of = np.repeat(np.arange(len(counts)), counts)  # [M]
    kinds = _judge(boxes, labels, sizes[image_of])
    defects = {kind: [_image(read, i) for i in image_of[bad]] for kind, bad in kinds.items() if bad.any()}
    for kind, images in read.defects.items():
        defects.setdefault(kind, []).extend(images)
    if policy == "raise" and set(defects) - set(HARMLESS):
        raise DataError(
            "\n".join(
                [f"{where} has annotations that cannot be right:", *report(_summary(defects)), "dataset.bad_boxes=clip mends or drops them"]
            )
        )
    fatal = np.zeros(len(boxes), dtype=bool)
    for kind, bad in kinds.items():
        fatal |= bad & ((policy == "drop") | (kind != "over_the_edge"))
    limits = np.tile(sizes[image_of], 2)[~fatal]  # [M', 4] (width, height, width, height)
    boxes, labels, crowd, image_of = np.clip(boxes[~fatal], 0, limits), labels[~fatal], crowd[~fatal], image_of[~fatal]
    areas = np.array(read.areas, dtype=np.float64)[~fatal]
    areas = np.where(np.isnan(areas), (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), areas)
    counts = np.bincount(image_of, minlength=len(counts))
    if crowd.any():
        defects["crowd"] = [_image(read, i) for i in image_of[crowd]]
    if (counts == 0).any():
        defects["empty"] = [_image(read, int(i)) for i in np.flatnonzero(counts == 0)]
    kept = np.arange(len(counts)) if keep_empty else np.flatnonzero(counts)
    columns: dict[str, Column] = {
        "path": Strings.pack(read.paths[i] for i in kept),
        "dimensions": sizes[kept].astype(np.int32),
        "image_id": np.array(read.image_ids, dtype=np.int64)[kept],
        "boxes": Ragged.pack(counts[kept], boxes.astype(np.float32)),
        "labels": Ragged.pack(counts[kept], labels.astype(np.int32)),
        "crowd": Ragged.pack(counts[kept], crowd),
        "area": Ragged.pack(counts[kept], areas.astype(np.float32)),
    }
    return columns, {"classes": list(read.classes), "defects": _summary(defects), "policy": policy, "keep_empty": keep_empty}


def _judge(boxes: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Which boxes have which defect, [M] bool each; a box has at most one."""
    with np.errstate(invalid="ignore", over="ignore"):
        x1, y1, x2, y2 = boxes.astype(np.float32).T  # as they will be stored: what is 1e-7 pixels wide has no width then
        width, height = sizes.T
        finite = np.isfinite(boxes).all(axis=1)
        known = finite & (labels >= 0)
        area = known & (x2 > x1) & (y2 > y1)
        # What is left of a box inside its image must be more than the rounding of its edge.
        inside = area & (np.minimum(x2, width) > np.maximum(x1, 0)) & (np.minimum(y2, height) > np.maximum(y1, 0))
        over = inside & ((x1 < -ROUNDING) | (y1 < -ROUNDING) | (x2 > width + ROUNDING) | (y2 > height + ROUNDING))
    found = {
        "not_finite": ~finite,
        "unknown_category": finite & ~known,
        "no_area": known & ~area,
        "outside": area & ~inside,
        "over_the_edge": over,
    }
    return {kind: np.asarray(bad) for kind, bad in found.items()}


def _image(read: Annotations, i: int) -> str:
    return f"{read.paths[i]} (id {read.image_ids[i]})"


def _summary(defects: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    return {kind: {"count": len(images), "images": list(dict.fromkeys(images))[:NAMED]} for kind, images in defects.items() if images}


def report(defects: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each kind of defect."""
    lines = []
    for kind, found in defects.items():
        what = MEANING[kind] if kind in ("missing_image", "unreadable_image", "odd_channels", "empty") else f"boxes {MEANING[kind]}"
        names = ", ".join(found["images"])
        lines.append(f"  {found['count']} {what}: {names}{' …' if found['count'] > len(found['images']) else ''}")
    return lines


class DetectionSource(FileSource):
    """Images with boxes. In training, crowds are left out; in validation they come with `crowd` set."""

    def __init__(self, root: Path, table: Table, split: str) -> None:
        super().__init__(root, table, table.meta["classes"])
        self.train = split == "train"

    def announce(self, where: str) -> None:
        """Say once what was wrong with the annotations and what became of it."""
        defects = {k: v for k, v in self.table.meta["defects"].items() if k not in HARMLESS}
        if defects:
            done = "clipped to the image or, where nothing is left, dropped" if self.table.meta["policy"] == "clip" else "dropped"
            logger.warning("%s: annotations that cannot be right were %s (dataset.bad_boxes):\n%s", where, done, "\n".join(report(defects)))

    def fields(self, index: int, name: str, size: tuple[int, int]) -> Sample:
        width, height = (int(n) for n in self.table["dimensions"][index])
        if size != (width, height):
            raise BadSample(name, f"is {size[0]} x {size[1]} pixels, but its annotations are for {width} x {height}")
        return self.objects(index)

    def objects(self, index: int) -> Sample:
        crowd = self.table["crowd"][index]
        found = {
            "boxes": self.table["boxes"][index],  # float32 [M, 4]
            "labels": self.table["labels"][index].astype(np.int64),
            "crowd": crowd,
            "area": self.table["area"][index],
        }
        if self.train:
            found = {key: value[~crowd] for key, value in found.items()}
        return {**found, "image_id": int(self.table["image_id"][index])}

    def labels(self) -> None:
        return None  # an image has as many as it shows objects

    def aspect_ratios(self) -> np.ndarray:
        width, height = np.asarray(self.table["dimensions"]).T
        return width / height

    def object_counts(self) -> np.ndarray:
        """Objects of each class, int64 [classes]."""
        return np.bincount(np.asarray(self.table["labels"].values), minlength=len(self.classes))

    def decode_hint(self, least: int | None) -> None:
        """Ignored: boxes are in the pixels of the whole image."""
