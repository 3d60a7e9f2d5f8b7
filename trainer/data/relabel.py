"""Another data set's labels in the terms of a network that was trained on one of its own: classes are matched by their names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.names import nearest
from trainer.data.source import Sample, Source, Subset
from trainer.errors import ConfigError, Problem

LABEL = 4  # its column in `truth`
_SHOWN = 6  # names in a message


class Relabelled:
    """A source whose labels are places in `classes`.

    Args:
        place: the new label of every old one.
        real: of some samples, by number, every class that is right: they get the field `real`, uint8 [C], 0 or 1 each.
    """

    def __init__(self, source: Source, classes: Sequence[str], place: np.ndarray, real: Sequence[Sequence[int]] | None = None) -> None:
        self.source, self.classes, self.place, self.real = source, list(classes), place, real
        self.channels, self.fingerprint = source.channels, source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = dict(self.source[index])
        if "label" in sample:
            sample["label"] = int(self.place[sample["label"]])
        if "labels" in sample:
            sample["labels"] = self.place[sample["labels"]]
        if "truth" in sample:
            sample["truth"] = sample["truth"].copy()
            sample["truth"][:, LABEL] = self.place[sample["truth"][:, LABEL].astype(np.int64)]
        if self.real is not None:
            sample["real"] = np.zeros(len(self.classes), dtype=np.uint8)
            sample["real"][list(self.real[index])] = 1
        return sample

    def labels(self) -> np.ndarray | None:
        labels = self.source.labels()
        return None if labels is None else self.place[labels]

    def name(self, index: int) -> str:
        return self.source.name(index)

    def __getattr__(self, name: str) -> Any:  # decode_hint() and whatever else a source may have
        if name.startswith("__") or name == "source":  # being unpickled
            raise AttributeError(name)
        return getattr(self.source, name)

    @property
    def lazy(self) -> bool:
        return getattr(self.source, "lazy", False)

    @lazy.setter
    def lazy(self, value: bool) -> None:
        if hasattr(self.source, "lazy"):
            self.source.lazy = value  # pyright: ignore[reportAttributeAccessIssue]


def relabelled(source: Source, classes: Sequence[str], real: str | None = None) -> Source:
    """`source` with labels that mean what they meant to a network of these `classes`.

    Raises:
        ConfigError: it has classes that the network does not know, or `real` is no file of labels for it.
    """
    theirs, ours = list(source.classes), list(classes)
    unknown = [name for name in theirs if name not in set(ours)]
    if unknown:
        close = nearest(unknown[0], ours)
        hint = f" (its {close!r}?)" if close else ""
        reason = f"has {len(unknown)} classes that the network does not know: {_listed(unknown)}{hint}; it knows {_listed(ours)}"
        raise ConfigError(
            Problem("dataset", type(source).__name__, reason, "rename the classes, or dataset.class_file where the data have one")
        )
    found = None if real is None else real_labels(real, source, ours)
    if theirs == ours and found is None:
        return source
    place = {name: i for i, name in enumerate(ours)}
    return Relabelled(source, ours, np.array([place[name] for name in theirs], dtype=np.int64), found)


def places_of(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Where the named classes are among a network's."""
    ours = list(classes)
    unknown = [name for name in names if name not in ours]
    if unknown or not names:
        close = nearest(unknown[0], ours) if unknown else None
        reason = f"the network knows no class {_listed(unknown)}; it knows {_listed(ours)}" if unknown else "names no class"
        raise ConfigError(Problem("classes", ",".join(names), reason, f"classes={close}" if close else ""))
    return [ours.index(name) for name in dict.fromkeys(names)]


def only(source: Source, places: Sequence[int], text: str) -> Source:
    """The samples of these classes."""
    labels = source.labels()
    if labels is None:
        raise ConfigError(Problem("classes", text, "the labels of these data are not known before they are read"))
    return Subset(source, np.flatnonzero(np.isin(labels, places)))


def class_names(text: str) -> list[str]:
    """`cat,dog`, or a text file of one name a line."""
    path = Path(text).expanduser()
    if path.is_file():
        from trainer.data.schemas.paths import read_class_file

        return read_class_file(path)
    return [name.strip() for name in text.strip("[]").split(",") if name.strip()]


def real_labels(path: str, source: Source, classes: Sequence[str]) -> list[list[int]]:
    """Every class that is right for each sample of `source`, from a JSON file: {file name: classes}, or a list with an entry
    for each sample in the order of file names (as published for ImageNet, arXiv:2006.07159). Classes are names or places."""
    try:
        content = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("real_labels", path, f"cannot be read as JSON: {error}")) from error
    names = [os.path.basename(source.name(i)) for i in range(len(source))]
    if isinstance(content, list):
        if len(content) != len(names):
            reason = f"has {len(content)} entries, and there are {len(names)} images"
            raise ConfigError(Problem("real_labels", path, reason, "a file {image name: classes} may leave some out"))
        content = dict(zip(sorted(names), content, strict=True))
    if not isinstance(content, Mapping) or not (set(names) & set(content)):
        example = names[0] if names else "photo.jpg"
        raise ConfigError(Problem("real_labels", path, "names none of these images", f'{{"{example}": ["{classes[0]}"]}}'))
    place = {name: i for i, name in enumerate(classes)}
    try:
        return [[_place(entry, place) for entry in content.get(name, ())] for name in names]
    except (KeyError, TypeError) as error:
        raise ConfigError(Problem("real_labels", path, f"names a class that the network does not know: {error}")) from error


def _place(entry: Any, place: Mapping[Any, int]) -> int:
    if isinstance(entry, int) and 0 <= entry < len(place):
        return entry
    return place[entry]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
