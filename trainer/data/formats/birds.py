"""CUB-200-2011 and Waterbirds: photographs of birds with boxes, named parts and outlines, as far as they lie on disk."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.data.files import FileSource
from trainer.data.images import open_image, read_file
from trainer.data.index import Watch, cached
from trainer.data.source import BadSample, LayoutError, Sample, Source, Subset, split_rows
from trainer.data.table import Column, Strings, Table

TRAIN, VAL, TEST = 0, 1, 2


class BirdSource(FileSource):
    """Rows with a column `label` and, where known, `box`, `parts`, `mask` (a path, empty where there is none) and `group`."""

    def fields(self, index: int, name: str, size: tuple[int, int]) -> Sample:
        row: Sample = {"label": int(self.table["label"][index])}
        for key in ("box", "parts"):
            if key in self.table:
                row[key] = self.table[key][index]
        if "group" in self.table:
            row["group"] = int(self.table["group"][index])
        if "mask" in self.table:
            row["mask"] = read_mask(os.path.join(self.root, self.table["mask"][index]), size)
        return row

    @property
    def part_names(self) -> Sequence[str]:
        return self.table.meta.get("parts", ())

    def decode_hint(self, least: int | None) -> None:
        if not {"box", "parts", "mask"} & set(self.table.columns):  # those are in the pixels of the whole image
            super().decode_hint(least)


def read_mask(path: str, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W], 1 where most annotators saw the bird. CUB's outlines are greys: how many of five drew there."""
    image = open_image(read_file(path), path)
    if image.size != size:
        raise BadSample(path, f"is {image.size[0]} x {image.size[1]} pixels, its photograph {size[0]} x {size[1]}")
    try:
        return (np.asarray(image.convert("L")) > 127).astype(np.uint8)
    except Exception as error:  # decoders raise anything on malformed data
        raise BadSample(path, f"cannot be decoded: {error}") from None


def scan_cub(root: Path) -> Table:
    """The index of CUB's folder. Labels are places among the classes that are there, so a part of CUB counts from 0 too.

    Raises:
        LayoutError: a file is missing or its lines do not fit the others'.
    """

    def scan(watch: Watch):
        for name in (
            "",
            "images.txt",
            "image_class_labels.txt",
            "train_test_split.txt",
            "classes.txt",
            "bounding_boxes.txt",
            "parts/parts.txt",
            "parts/part_locs.txt",
        ):
            watch.add(root / name)
        images = _rows(root / "images.txt", 2)
        ids = {row[0]: i for i, row in enumerate(images)}
        classes = dict(_rows(root / "classes.txt", 2))
        class_ids = _by_image(root / "image_class_labels.txt", 2, ids)
        present = sorted({row[1] for row in class_ids}, key=int)
        unknown = [c for c in present if c not in classes]
        if unknown:
            raise LayoutError(f"{root / 'classes.txt'} has no class {unknown[0]}, but image_class_labels.txt does")
        label_of = {class_id: i for i, class_id in enumerate(present)}
        is_training = _by_image(root / "train_test_split.txt", 2, ids)
        paths = [f"images/{row[1]}" for row in images]
        columns: dict[str, Column] = {
            "path": Strings.pack(paths),
            "label": np.array([label_of[row[1]] for row in class_ids], dtype=np.int32),
            "part": np.array([TRAIN if row[1] == "1" else TEST for row in is_training], dtype=np.int8),
        }
        if (root / "bounding_boxes.txt").is_file():
            boxes = np.array([row[1:] for row in _by_image(root / "bounding_boxes.txt", 5, ids)], dtype=np.float32)
            columns["box"] = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)  # x y w h -> corners
        meta = {"classes": [classes[c] for c in present]}
        if (root / "parts" / "part_locs.txt").is_file():
            columns["parts"], meta["parts"] = _parts(root / "parts", ids)
        masks = _masks(root, paths, watch)
        if masks is not None:
            columns["mask"] = masks
        return columns, meta

    return cached(root, "cub", {}, scan)


def _parts(folder: Path, ids: dict[str, int]) -> tuple[np.ndarray, list[str]]:
    """float32 [N, P, 3] (x, y, visible) and the names of the P parts."""
    names = [" ".join(row[1:]) for row in _rows(folder / "parts.txt", 2, more=True)]
    parts = np.zeros((len(ids), len(names), 3), dtype=np.float32)
    for image_id, part_id, x, y, visible in _rows(folder / "part_locs.txt", 5):
        if image_id not in ids or not 1 <= int(part_id) <= len(names):
            raise LayoutError(f"{folder / 'part_locs.txt'} has part {part_id} of image {image_id}, which is not listed")
        parts[ids[image_id], int(part_id) - 1] = (float(x), float(y), float(visible))
    parts[parts[..., 2] == 0] = 0
    return parts, names


def _masks(root: Path, paths: Sequence[str], watch: Watch) -> Strings | None:
    """Outlines beside the images, `segmentations/` for `images/`, with the ending .png; None where there are none.

    Which there are is watched, folder by folder; what is in them is read when it is asked for.

    Raises:
        LayoutError: only some images have one.
    """
    watch.add(root / "segmentations")
    if not (root / "segmentations").is_dir():
        return None
    masks = [f"segmentations/{os.path.splitext(path.split('/', 1)[1])[0]}.png" for path in paths]
    for folder in sorted({os.path.dirname(mask) for mask in masks}):
        watch.add(root / folder)
    missing = [mask for mask in masks if not (root / mask).is_file()]
    if missing:
        raise LayoutError(f"{len(missing)} of {len(masks)} images have no outline in segmentations/, the first: {missing[0]}")
    return Strings.pack(masks)


def _rows(path: Path, columns: int, *, more: bool = False) -> list[list[str]]:
    """The lines of a table without a header, split at white space."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise LayoutError(f"has no {path.name}") from None
    except UnicodeDecodeError:
        raise LayoutError(f"{path} is not a text file") from None
    rows = [line.split() for line in lines if line.strip()]
    for i, row in enumerate(rows):
        if len(row) != columns and not (more and len(row) > columns):
            raise LayoutError(f"{path}, line {i + 1}: expected {columns} columns, got {' '.join(row)!r}")
    if not rows:
        raise LayoutError(f"{path} is empty")
    return rows


def _by_image(path: Path, columns: int, ids: dict[str, int]) -> list[list[str]]:
    """Rows in the order of images.txt, exactly one for each image."""
    rows = {row[0]: row for row in _rows(path, columns)}
    missing = [image_id for image_id in ids if image_id not in rows]
    if missing or len(rows) != len(ids):
        raise LayoutError(
            f"{path} and images.txt list different images: {len(rows)} and {len(ids)}"
            + (f", no line for image {missing[0]}" if missing else "")
        )
    return [rows[image_id] for image_id in ids]


WATERBIRD_CLASSES = ("landbird", "waterbird")
WATERBIRD_PLACES = ("land", "water")


def scan_waterbirds(root: Path, outlines: Path | None) -> Table:
    """The index of a folder with metadata.csv (arXiv:1911.08731, sec. 5.1). A group is one kind of bird in one kind of place.

    Args:
        outlines: CUB's folder, whose segmentations/ fit these photographs too; None = no masks.
    """

    def scan(watch: Watch):
        watch.add(root)
        watch.add(root / "metadata.csv")
        with open(root / "metadata.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        missing = [c for c in ("img_filename", "y", "split", "place") if not rows or c not in rows[0]]
        if missing:
            raise LayoutError(f"{root / 'metadata.csv'} has no {'rows' if not rows else 'column ' + ', '.join(missing)}")
        y, part, place = (_numbers(rows, column, limit, root) for column, limit in (("y", 2), ("split", 3), ("place", 2)))
        paths = [row["img_filename"] for row in rows]
        columns: dict[str, Column] = {
            "path": Strings.pack(paths), "label": y.astype(np.int32), "part": part.astype(np.int8), "group": (y * 2 + place).astype(np.int32),
        }  # fmt: skip
        masks = _masks(outlines, [f"images/{path}" for path in paths], watch) if outlines else None
        if masks is not None:
            assert outlines is not None
            up = os.path.relpath(outlines, root)
            columns["mask"] = Strings.pack(os.path.join(up, os.fsdecode(mask)) for mask in masks.all())
        groups = [f"{bird} on {ground}" for bird in WATERBIRD_CLASSES for ground in WATERBIRD_PLACES]
        return columns, {"classes": list(WATERBIRD_CLASSES), "groups": groups}

    return cached(root, "waterbirds", {"outlines": os.path.relpath(outlines, root) if outlines else None}, scan)


def _numbers(rows: list[dict[str, str]], column: str, limit: int, root: Path) -> np.ndarray:
    """A column of whole numbers in 0 .. limit - 1."""
    try:
        values = np.array([int(row[column]) for row in rows], dtype=np.int64)
    except (TypeError, ValueError):
        raise LayoutError(f"{root / 'metadata.csv'}: the column {column} must hold whole numbers") from None
    wrong = np.flatnonzero((values < 0) | (values >= limit))
    if len(wrong):
        raise LayoutError(f"{root / 'metadata.csv'}, line {wrong[0] + 2}: {column}={values[wrong[0]]} is not in 0 .. {limit - 1}")
    return values


def bird_source(root: Path, table: Table, part: int) -> Source:
    """One part of a bird table: TRAIN, VAL or TEST."""
    return Subset(BirdSource(root, table, table.meta["classes"]), np.flatnonzero(np.asarray(table["part"]) == part))


def hold_out(root: Path, table: Table, split: str, fraction: float, seed: int) -> Source:
    """One side of the training part, divided class by class by the hash of each path."""
    rows = np.flatnonzero(np.asarray(table["part"]) == TRAIN)
    paths = table["path"].all()
    train, val = split_rows(np.asarray(table["label"])[rows], fraction, seed, [paths[row] for row in rows])
    return Subset(BirdSource(root, table, table.meta["classes"]), rows[train if split == "train" else val])
