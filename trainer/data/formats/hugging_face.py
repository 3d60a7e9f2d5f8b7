"""Hugging Face datasets: tables in Arrow files, each row an encoded image and a label."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.images import decode, open_image, read_file
from trainer.data.source import BadSample, LayoutError, Sample, Source, Subset, split_rows


def _library() -> Any:
    """The package of the extra `hf`, by name: type checkers need not have it."""
    return importlib.import_module("datasets")


def load_splits(path: str, subset: str | None) -> dict[str, Any]:
    """The splits of a dataset: saved with save_to_disk(), or whatever datasets.load_dataset() understands.

    Raises:
        LayoutError: the library cannot load it, with its own words.
    """
    found = _loaded(path, subset)
    if isinstance(found, LayoutError):
        raise found
    return found


@functools.lru_cache(maxsize=8)
def _loaded(path: str, subset: str | None) -> dict[str, Any] | LayoutError:
    """Once a process, failures too: every split asks anew, and out of reach of the hub each answer takes half a minute."""
    datasets = _library()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    where = str(Path(path).expanduser()) if Path(path).expanduser().exists() else path
    try:
        saved = any(os.path.exists(os.path.join(where, name)) for name in ("dataset_dict.json", "state.json"))
        found = datasets.load_from_disk(where) if saved else datasets.load_dataset(where, subset)
    except Exception as error:  # the library raises its own, the hub's and its file formats' errors
        return LayoutError(f"cannot be loaded by the datasets library: {type(error).__name__}: {error}")
    return dict(found) if isinstance(found, dict) else {"train": found}


class ArrowSource:
    """One split. Images stay encoded until a sample is asked for, so a broken one is a BadSample and not a crash."""

    channels = 3

    def __init__(self, name: str, dataset: Any, image_column: str, label_column: str | None) -> None:
        datasets = _library()
        missing = [column for column in (image_column, label_column) if column and column not in dataset.column_names]
        if missing:
            raise LayoutError(f"has no column {missing[0]!r}; it has {', '.join(dataset.column_names)}")
        if not isinstance(dataset.features[image_column], datasets.Image):
            raise LayoutError(f"its column {image_column!r} holds no images but {dataset.features[image_column]}")
        self.where, self.image_column, self.label_column = name, image_column, label_column
        self.classes: Sequence[str] = ()
        if label_column:
            feature = dataset.features[label_column]
            if not isinstance(feature, datasets.ClassLabel):
                raise LayoutError(f"its column {label_column!r} has no class names (ClassLabel): it is {feature}")
            self.classes = tuple(feature.names)
        self.dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self.fingerprint = hashlib.sha256(f"{dataset._fingerprint} {len(dataset)} {image_column} {label_column}".encode()).hexdigest()[:32]
        self.split = ""  # its name, where it is one of several
        self.lazy = False
        self.least: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.dataset[index]
        name = self.name(index)
        image = open_image(self._bytes(row[self.image_column], name), name)
        sample: Sample = {"image": image if self.lazy else decode(image, name, least=self.least)}
        if self.label_column:
            label = row[self.label_column]
            if label is None or label < 0:
                raise BadSample(name, "has no label")
            sample["label"] = int(label)
        return sample

    def _bytes(self, cell: dict[str, Any] | None, name: str) -> bytes:
        if not cell or (cell.get("bytes") is None and not cell.get("path")):
            raise BadSample(name, "has no image")
        return cell["bytes"] if cell.get("bytes") is not None else read_file(cell["path"])

    def name(self, index: int) -> str:
        return f"{self.where}[{index}]"

    def labels(self) -> np.ndarray | None:
        return np.array(self.dataset[self.label_column][:], dtype=np.int64) if self.label_column else None

    def encoded(self, index: int) -> tuple[bytes, str]:
        cell, name = self.dataset[index][self.image_column], self.name(index)
        data = self._bytes(cell, name)
        known = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
        return data, known.get(open_image(data, name).format or "", os.path.splitext(cell.get("path") or "")[1].lower() or ".png")

    def decode_hint(self, least: int | None) -> None:
        self.least = least


def arrow_source(
    path: str,
    subset: str | None,
    split: str,
    names: Sequence[str],
    image_column: str,
    label_column: str | None,
    part: tuple[str, float, int] | None,
) -> Source:
    """The first of the splits `names` that is there; with `part` (split, fraction, seed), one side of it, class by class."""
    splits = load_splits(path, subset)
    name = next((n for n in names if n in splits), None)
    if name is None:
        raise LayoutError(f"has no split {' or '.join(names)}; it has {', '.join(splits)}")
    source = ArrowSource(f"{path}:{name}", splits[name], image_column, label_column)
    source.split = name
    if part is None:
        return source
    labels = source.labels()
    sides = split_rows(np.zeros(len(source), dtype=np.int64) if labels is None else labels, part[1], part[2])
    return Subset(source, sides[part[0] == "val"])
