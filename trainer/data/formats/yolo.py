"""YOLO's layout: a text file an image, one line an object: class, centre x, centre y, width, height, as fractions of the image.

The images are photographs, or, for `multispectral`, arrays [H, W, C] in .npy files.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.formats.boxes import Annotations, DetectionSource, settle
from trainer.data.images import EXTENSIONS, MAX_PIXELS, header_size, read_file
from trainer.data.index import Watch, cached
from trainer.data.source import BadSample, LayoutError, Sample, Source, Subset, split_rows
from trainer.data.table import Table

Measure = Callable[[str], tuple[int, int] | None]


def scan_yolo(
    images: Path, labels: Path, classes: Sequence[str], kind: str, policy: str, keep_empty: bool, channels: int | None = None
) -> Table:
    """The index of one folder of images (and those below it) beside one of labels.

    Args:
        channels: that every array should have; None = these are photographs. Meta `channels` is how many arrays have which.

    Raises:
        LayoutError: a label file is not YOLO's.
        DataError: boxes are bad and the policy is "raise".
    """
    extensions, measure = (EXTENSIONS, header_size) if kind == "yolo" else ((".npy",), array_size)

    def scan(watch: Watch):
        read = Annotations(classes=classes)
        number, labelled = 0, _label_files(labels)
        for directory, below, files in os.walk(images, followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith("."))
            relative = os.path.relpath(directory, images)
            watch.add(directory)
            watch.add(labels / relative)
            watch.add_files(labels / relative)
            for name in sorted(f for f in files if f.lower().endswith(extensions) and not f.startswith(".")):
                path = os.path.normpath(os.path.join(relative, name))
                _read_image(read, images, path, labels / (os.path.splitext(path)[0] + ".txt"), measure, number)
                number += 1
                labelled.discard(os.path.splitext(path)[0])
        for stem in sorted(labelled):
            read.defect("unknown_image", f"{stem}.txt")
        depths = {} if channels is None else _depths(read, images, channels)
        columns, meta = settle(read, policy, keep_empty, str(labels))
        return columns, {**meta, "channels": depths}

    options = {
        "images": os.path.relpath(images, labels), "classes": list(classes), "kind": kind, "policy": policy, "keep_empty": keep_empty,
        "channels": channels,
    }  # fmt: skip
    return cached(labels, kind, options, scan)


def _label_files(labels: Path) -> set[str]:
    """Label files that hold anything, without their extension, relative to the folder."""
    found = (path for path in labels.rglob("*.txt") if path.name != "classes.txt" and path.stat().st_size)
    return {os.path.splitext(os.path.relpath(path, labels))[0] for path in found}


def _depths(read: Annotations, images: Path, channels: int) -> dict[str, int]:
    """How many arrays have which number of channels. Those of another than they should would be bad samples in the middle of
    an epoch: they are named."""
    found = [array_channels(str(images / path)) for path in read.paths]
    for path, count in zip(read.paths, found):
        if count != channels:
            read.defect("odd_channels", f"{path} ({count} instead of {channels})")
    return {str(count): found.count(count) for count in set(found)}


def _read_image(read: Annotations, root: Path, path: str, label_file: Path, measure: Measure, number: int) -> None:
    size = measure(str(root / path))
    if size is None:
        read.defect("unreadable_image", path)
        return
    read.image(path, size, number)
    try:
        text = label_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        read.defect("unlabelled", path)  # by convention an image of nothing, and often a mistake
        return
    except UnicodeDecodeError:
        raise LayoutError(f"{label_file} is not a text file") from None
    for i, line in enumerate(text.splitlines()):
        if line.strip():
            label, *rest = _numbers(line, f"{label_file}, line {i + 1}")
            read.box(_corners(rest, size), int(label) if 0 <= label < len(read.classes) else -1)


def _numbers(line: str, where: str) -> list[float]:
    """Class and box of a line; a polygon (class and three points or more) is read as the box around it."""
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        raise LayoutError(f"{where}: {line.strip()[:60]!r} is not a row of numbers") from None
    if len(values) >= 7 and len(values) % 2:
        xs, ys = values[1::2], values[2::2]
        return [values[0], (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)]
    if len(values) != 5 or not math.isfinite(values[0]) or values[0] != int(values[0]):
        raise LayoutError(f"{where}: {line.strip()[:60]!r} is not `class x y width height`")
    return values


def _corners(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    (x, y, w, h), (width, height) = box, size
    return (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height


def array_header(file: io.BufferedReader | io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype] | None:
    """Shape, order and type of a .npy file, of which nothing else is read; None where it is not an [H, W, C] array of numbers."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, OSError, EOFError):
        return None
    plain = len(shape) == 3 and min(shape) > 0 and dtype.kind in "uif"
    return (shape, fortran, dtype) if plain else None


def array_size(path: str) -> tuple[int, int] | None:
    """Width and height of an [H, W, C] array, from the header of its .npy file."""
    try:
        with open(path, "rb") as file:
            header = array_header(file)
    except OSError:
        return None
    return None if header is None else (header[0][1], header[0][0])


def array_channels(path: str) -> int | None:
    with open(path, "rb") as file:
        header = array_header(file)
    return None if header is None else header[0][2]


def read_array(data: bytes, name: str, channels: int) -> np.ndarray:
    """The [H, W, C] array of a .npy file. Nothing is allocated before its header has been checked against the file."""
    file = io.BytesIO(data)
    header = array_header(file)
    if header is None:
        raise BadSample(name, "is empty (0 bytes)" if not data else "is not an [H, W, C] array of numbers in .npy format")
    shape, fortran, dtype = header
    if shape[0] * shape[1] > MAX_PIXELS:
        raise BadSample(name, f"refused before reading: {shape[1]} x {shape[0]} pixels, more than {MAX_PIXELS:,}")
    expected, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if there < expected:
        raise BadSample(name, f"is cut short: {there:,} of {expected:,} bytes")
    if shape[2] != channels:
        raise BadSample(name, f"has {shape[2]} channels, the others {channels}")
    array = np.frombuffer(data, dtype, math.prod(shape), file.tell()).reshape(shape, order="F" if fortran else "C")
    array = array.astype(dtype.newbyteorder("="), order="C")  # a copy that may be written to
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadSample(name, "holds NaN or infinite values")
    return array


class ArraySource(DetectionSource):
    """Multispectral images: arrays of any number of channels, with boxes."""

    def __init__(self, root: Path, table: Table, split: str, channels: int) -> None:
        super().__init__(root, table, split)
        self.channels = channels

    def __getitem__(self, index: int) -> Sample:
        name = self.name(index)
        image = read_array(read_file(name), name, self.channels)
        return {"image": image, **self.fields(index, name, (image.shape[1], image.shape[0]))}


def divide(source: DetectionSource, split: str, fraction: float, seed: int) -> Source:
    """One side of a folder that holds both splits, by the hash of each image's path."""
    paths = source.table["path"].all()
    train, val = split_rows(np.zeros(len(paths), dtype=np.int64), fraction, seed, paths)
    return Subset(source, train if split == "train" else val)


def read_names(path: Path) -> dict[str, Any]:
    """YOLO's data file: at least `names`, a list or a mapping from class numbers."""
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LayoutError(f"is not YAML: {str(error).splitlines()[0]}") from None
    names = document.get("names") if isinstance(document, dict) else None
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise LayoutError(f"`names` must number the classes from 0 to {len(names) - 1}")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise LayoutError("has no `names`: a list of class names, index = class number")
    return {**document, "names": [str(name) for name in names]}
