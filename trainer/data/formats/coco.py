"""COCO's JSON: one file a split, with images, annotations and categories."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.formats.boxes import Annotations, DetectionSource, settle
from trainer.data.images import header_size
from trainer.data.index import Watch, cached
from trainer.data.source import LayoutError
from trainer.data.table import Table


def scan_coco(annotations: Path, images: Path | None, split: str, policy: str, keep_empty: bool) -> Table:
    """The index of one annotation file; meta `images` is the folder of the images, relative to the file's.

    Args:
        images: the folder that file names are relative to; None looks for it around the annotation file.

    Raises:
        LayoutError: it is not COCO's JSON, or no image can be found.
        DataError: boxes are bad and the policy is "raise".
    """

    def scan(watch: Watch):
        watch.add(annotations)
        document = load(annotations)
        folder = images or _find_images(annotations, document, split)
        for directory in _folders(folder):
            watch.add(directory)
        columns, meta = settle(read_coco(document, folder), policy, keep_empty, str(annotations))
        return columns, {**meta, "images": os.path.relpath(folder, annotations.parent)}

    where = os.path.relpath(images, annotations.parent) if images else None
    return cached(annotations, "coco", {"images": where, "split": split, "policy": policy, "keep_empty": keep_empty}, scan)


def load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LayoutError(f"is not JSON: {error}") from None
    missing = [
        key for key in ("images", "annotations", "categories") if not isinstance(document, dict) or not isinstance(document.get(key), list)
    ]
    if missing:
        raise LayoutError(f"is not a COCO detection file: it has no list of {', '.join(missing)}")
    if not document["categories"]:
        raise LayoutError("lists no categories")
    return document


def read_coco(document: dict[str, Any], root: Path) -> Annotations:
    """Annotations of every image that is there. Labels follow the categories' ids in ascending order."""
    categories = sorted(_entries(document, "categories", "id", "name"), key=lambda c: c["id"])
    label_of = {category["id"]: i for i, category in enumerate(categories)}
    read = Annotations(classes=[str(category["name"]) for category in categories])
    of_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in _entries(document, "images", "id", "file_name")}
    if len(of_image) != len(document["images"]):
        raise LayoutError("lists two images under one id")
    for annotation in _entries(document, "annotations", "image_id", "category_id", "bbox"):
        if annotation["image_id"] in of_image:
            of_image[annotation["image_id"]].append(annotation)
        else:
            read.defect("unknown_image", f"id {annotation['image_id']}")
    for number, image in enumerate(document["images"]):
        path, size = image["file_name"], (image.get("width"), image.get("height"))
        where = root / path
        if not where.is_file():
            read.defect("missing_image", f"{path} (id {image['id']})")
            continue
        if not all(isinstance(side, int) and side > 0 for side in size):
            size = header_size(str(where))
            if size is None:
                read.defect("unreadable_image", f"{path} (id {image['id']})")
                continue
        read.image(path, size, image["id"] if isinstance(image["id"], int) else number)
        for annotation in of_image[image["id"]]:
            read.box(
                _corners(annotation["bbox"]),
                label_of.get(annotation["category_id"], -1),
                bool(annotation.get("iscrowd", 0)),
                _number(annotation.get("area")),
                _sides(annotation["bbox"]),
            )
    return read


def _corners(bbox: Any) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) from (x, y, width, height); NaN where these are not four numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return math.nan, math.nan, math.nan, math.nan
    x, y, width, height = (_number(n) for n in bbox)
    return x, y, x + width, y + height


def _sides(bbox: Any) -> tuple[float, float]:
    return (_number(bbox[2]), _number(bbox[3])) if isinstance(bbox, list) and len(bbox) == 4 else (math.nan, math.nan)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _entries(document: dict[str, Any], key: str, *fields: str) -> list[dict[str, Any]]:
    for i, entry in enumerate(document[key]):
        missing = [f for f in fields if not isinstance(entry, dict) or f not in entry]
        if missing:
            raise LayoutError(f"{key}[{i}] has no {', '.join(missing)}")
    return document[key]


def _folders(images: Path) -> Iterator[Path]:
    """The folders images lie in, so that one that comes or goes is noticed."""
    for directory, below, _ in os.walk(images):
        below[:] = [name for name in below if not name.startswith(".")]
        yield Path(directory)


def find_annotations(root: Path, split: str) -> list[Path]:
    """Annotation files of a split, in the places where people put them."""
    names = ("train",) if split == "train" else ("val", "valid", "validation")
    found: list[Path] = []
    for name in names:
        for pattern in (
            f"annotations/instances_{name}*.json",
            f"instances_{name}*.json",
            f"annotations/{name}*.json",
            f"{name}*.json",
            f"{name}/*.json",
        ):
            found = found or sorted(root.glob(pattern))
    return found


def _find_images(annotations: Path, document: dict[str, Any], split: str) -> Path:
    """The folder that the first listed images are found in."""
    first = [image["file_name"] for image in _entries(document, "images", "file_name")[:20]]
    stem = annotations.stem.removeprefix("instances_")
    names = [stem, "train"] if split == "train" else [stem, "val", "valid", "validation"]
    folders = [annotations.parent]
    for root in (annotations.parent, annotations.parent.parent):
        folders += [f for name in names for f in (root / name, root / "images" / name, root / name / "images")]
        folders += [root / "images", root]
    for folder in folders:
        if any((folder / name).is_file() for name in first):
            return folder
    example = f"{first[0]!r} is in none of {', '.join(str(f) for f in folders if f.is_dir())}" if first else "it lists none"
    raise LayoutError(f"its images cannot be found: {example}")


def coco_source(annotations: Path, images: Path | None, split: str, policy: str, keep_empty: bool) -> DetectionSource:
    table = scan_coco(annotations, images, split, policy, keep_empty)
    return DetectionSource(annotations.parent / table.meta["images"], table, split)
