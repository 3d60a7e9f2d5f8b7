"""Images in folders, one folder a class: <root>/<class>/**/<image>."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trainer.data.files import FileSource
from trainer.data.index import Watch, cached
from trainer.data.source import Sample, Source, Subset, split_rows
from trainer.data.table import Ragged, Strings, Table


def scan_folder(root: Path, extensions: Sequence[str]) -> Table:
    """Every image below each class folder, sorted by class and path: columns path, size (bytes), label; meta classes.

    Hidden files and folders are passed over; links are followed, each directory once.
    """

    def scan(watch: Watch):
        paths: list[bytes] = []
        sizes: list[int] = []
        labels: list[int] = []
        classes = class_folders(root)
        watch.add(root)
        for label, name in enumerate(classes):
            found = sorted(images_below(os.fsencode(root / name), os.fsencode(name), tuple(e.lower().encode() for e in extensions), watch))
            paths += [path for path, _ in found]
            sizes += [size for _, size in found]
            labels += [label] * len(found)
        columns = {"path": Strings.pack(paths), "size": np.array(sizes, np.int64), "label": np.array(labels, np.int32)}
        return columns, {"classes": classes}

    return cached(root, "image_folder", {"extensions": sorted(extensions)}, scan, outside=True)


def class_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def images_below(directory: bytes, relative: bytes, extensions: tuple[bytes, ...], watch: Watch) -> Iterator[tuple[bytes, int]]:
    """(relative path, size in bytes) of every image in a directory and those below it. Bytes, because names may be any."""
    seen: set[tuple[int, int]] = set()
    waiting = [(directory, relative)]
    while waiting:
        here, prefix = waiting.pop()
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above
            continue
        seen.add((status.st_dev, status.st_ino))
        watch.add(os.fsdecode(here))
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.name.lower().endswith(extensions):
                    try:
                        yield prefix + b"/" + entry.name, entry.stat().st_size
                    except FileNotFoundError:  # a dangling link: listed, so that reading it is reported as a bad sample
                        yield prefix + b"/" + entry.name, 0
                elif entry.is_dir():
                    waiting.append((entry.path, prefix + b"/" + entry.name))


class FolderSource(FileSource):
    """The images of a scanned folder. Labels are places in `classes`, whatever the folders' own order."""

    def __init__(self, root: Path, table: Table, classes: Sequence[str], grouped: bool) -> None:
        super().__init__(root, table, classes)
        self.grouped = grouped
        place = {name: i for i, name in enumerate(classes)}
        self.place = np.array([place.get(name, -1) for name in table.meta["classes"]], dtype=np.int64)  # -1: not a class

    def fields(self, index: int, name: str, size: tuple[int, int]) -> Sample:
        label = int(self.place[self.table["label"][index]])
        return {"label": label, "group": label} if self.grouped else {"label": label}

    def labels(self) -> np.ndarray:
        return self.place[np.asarray(self.table["label"])]


def folder_source(
    root: Path,
    extensions: Sequence[str],
    classes: Sequence[str] | None,
    part: tuple[str, float, int] | None = None,
    *,
    grouped: bool = False,
) -> Source:
    """The images below `root`.

    Args:
        classes: class names, index = label; folders that are not among them are left out. None = the folders' own names.
        part: (split, fraction, seed): only one side of a folder that holds both, divided class by class by path.
        grouped: give each sample its class as `group` too, so that the worst class is reported.
    """
    table = scan_folder(root, extensions)
    source = FolderSource(root, table, table.meta["classes"] if classes is None else classes, grouped)
    if part is not None:
        split, fraction, seed = part
        return Subset(source, np.asarray(_divided(root, source, fraction, seed)[split]))
    rows = np.flatnonzero(source.labels() >= 0)
    return source if len(rows) == len(source) else Subset(source, rows)


def _divided(root: Path, source: FolderSource, fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Rows of both splits. Cached by content, because hashing a million paths takes seconds."""

    def scan(_: Watch):  # nothing to watch: the options hold all that it depends on
        labels, names = source.labels(), source.table["path"].all()
        rows = np.flatnonzero(labels >= 0)
        train, val = split_rows(labels[rows], fraction, seed, [names[row] for row in rows])
        return {"rows": Ragged.pack([len(train), len(val)], np.concatenate([rows[train], rows[val]]).astype(np.int32))}, {}

    options = {"of": source.fingerprint, "fraction": fraction, "seed": seed, "place": source.place.tolist()}
    rows = cached(root, "split", options, scan, outside=True)["rows"]
    return {"train": rows[0], "val": rows[1]}
