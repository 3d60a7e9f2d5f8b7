"""Schemas of the datasets whose folders are their classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from trainer.config.dataset import DatasetConfig, Facts
from trainer.config.fields import setting
from trainer.config.names import nearest
from trainer.config.schemas import schema
from trainer.data.schemas.paths import class_file_problems, directory_problem, listed, read_class_file
from trainer.data.source import Source
from trainer.errors import Problem

if TYPE_CHECKING:
    from trainer.data.table import Table


@schema("dataset", "image_folder")
@dataclass
class ImageFolderConfig(DatasetConfig):
    """Images in one folder per class: <path>/train/<class>/… and <path>/val/<class>/…, or one folder and a fraction of it."""

    GROUPED: ClassVar[bool] = False  # give each sample its class as `group` too

    train_folder: str = setting(
        "train",
        "folder of the training images in dataset.path; where it is missing, dataset.path itself, if val_path or val_fraction is set",
    )
    val_folder: str = setting("val", "folder of the validation images in dataset.path")
    val_fraction: float | None = setting(
        None, "validate on this fraction of the training folder, class by class, instead of a folder of its own", gt=0, lt=1
    )
    split_seed: int = setting(0, "which images dataset.val_fraction takes follows from it", ge=0)
    class_file: str | None = setting(
        None, "text file of class names, one a line, index = line; null = the folders' names in alphabetical order"
    )
    extensions: list[str] = setting(
        [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"], "file name endings of images, in any case"
    )

    def roots(self) -> tuple[Path, Path]:
        """Where the classes of the training and of the validation split lie."""
        root = Path(self.path or "").expanduser()
        train = root / self.train_folder
        if self.val_fraction is not None:
            train = train if train.is_dir() else root
            return train, train
        if self.val_path:
            return (train if train.is_dir() else root), Path(self.val_path).expanduser()
        return train, root / self.val_folder

    def classes(self) -> list[str]:
        if self.class_file:
            return read_class_file(self.class_file)
        return self._scan(self.roots()[0]).meta["classes"]

    def build(self, split: str) -> Source:
        from trainer.data.formats.image_folder import folder_source

        train, val = self.roots()
        part = None if self.val_fraction is None else (split, self.val_fraction, self.split_seed)
        return folder_source(train if split == "train" else val, self.extensions, self.classes(), part, grouped=self.GROUPED)

    def alone(self, split: str) -> Self:
        root, one = Path(self.path or "").expanduser(), super().alone(split)
        own, other = (self.train_folder, self.val_folder) if split == "train" else (self.val_folder, self.train_folder)
        if not self.val_path and self.val_fraction is None and not (split == "val" and (root / other).is_dir()):
            folder = own if (root / own).is_dir() or (root / other).is_dir() else "."  # the classes themselves lie in it
            one.train_folder = one.val_folder = folder
        return one

    def facts(self) -> Facts:
        return self.facts_of(self.build)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not self.path:
            return
        found = [*self._path_problems(), *class_file_problems(self.class_file)]
        yield from found or self._folder_problems()

    def _scan(self, root: Path) -> Table:
        from trainer.data.formats.image_folder import scan_folder

        return scan_folder(root, self.extensions)

    def _path_problems(self) -> Iterator[Problem]:
        if self.val_path and self.val_fraction is not None:
            yield Problem(
                "dataset.val_fraction",
                self.val_fraction,
                f"dataset.val_path={self.val_path} is set too: validation data come from one place",
                "dataset.val_fraction=null",
            )
            return
        if not self.extensions:
            yield Problem("dataset.extensions", self.extensions, "is empty, so no file is an image", "dataset.extensions=[.jpg,.png]")
        wrong = directory_problem("dataset.path", str(self.path))
        if wrong:
            yield wrong
            return
        train, val = self.roots()
        if not train.is_dir():
            here = sorted(e.name for e in os.scandir(str(self.path)) if e.is_dir() and not e.name.startswith("."))
            holds = f"holds {', '.join(here[:6])}{' …' if len(here) > 6 else ''}" if here else "holds no folders"
            fix = f"dataset.train_folder={nearest(self.train_folder, here) or '<one of them>'}, or dataset.val_fraction=0.1 if these are the classes"
            yield Problem(
                "dataset.path",
                self.path,
                f"there is no {self.train_folder}/ in it; it {holds}",
                fix if here else "dataset.path=/path/to/data",
            )
        elif not val.is_dir():
            elsewhere = directory_problem("dataset.val_path", self.val_path) if self.val_path else None
            if elsewhere:
                yield elsewhere
                return
            names = [n for n in ("validation", "valid", "val", "test") if (Path(str(self.path)).expanduser() / n).is_dir()]
            fix = f"dataset.val_folder={names[0]}" if names else "dataset.val_fraction=0.1 to hold out a tenth of the training images"
            yield Problem("dataset.val_folder", self.val_folder, f"no such directory: {val}", fix)

    def _folder_problems(self) -> Iterator[Problem]:
        import numpy as np

        train, val = self.roots()
        key = "dataset.path"
        table = self._scan(train)
        folders = table.meta["classes"]
        if not len(table):
            what = f"none of the {len(folders)} folders in it holds" if folders else "it has no class folders and"
            yield Problem(
                key,
                str(train),
                f"{what} no image ({' '.join(self.extensions)})" if not folders else f"{what} an image ({' '.join(self.extensions)})",
                "put images into <class>/<image>.jpg, or set dataset.extensions",
            )
            return
        classes = self.classes()
        misnamed = [*self._names_problems(folders, classes, train)] if self.class_file else []
        yield from misnamed
        counts = np.bincount(np.asarray(table["label"]), minlength=len(folders))
        empty = [name for name, count in zip(folders, counts, strict=True) if not count]
        if empty:
            yield Problem(key, str(train), f"these class folders hold no image: {listed(empty)}", "remove them or fill them")
        if val != train and not misnamed:
            yield from self._val_problems(val, folders, classes)

    def _names_problems(self, folders: list[str], classes: list[str], where: Path) -> Iterator[Problem]:
        unknown = [name for name in folders if name not in set(classes)]
        if len(classes) < len(folders):
            yield Problem(
                "dataset.class_file",
                self.class_file,
                f"names {len(classes)} classes, but {where} holds {len(folders)} folders; missing: {listed(unknown)}",
                "add them at the end, one a line",
            )
        elif unknown:
            close = nearest(unknown[0], classes)
            hint = f" (did you mean {close!r}?)" if close else ""
            yield Problem(
                "dataset.class_file",
                self.class_file,
                f"does not name these folders of {where}: {listed(unknown)}{hint}",
                "correct the names, or add them at the end, one a line",
            )

    def _val_problems(self, val: Path, folders: list[str], classes: list[str]) -> Iterator[Problem]:
        table = self._scan(val)
        key, value = ("dataset.val_path", self.val_path) if self.val_path else ("dataset.val_folder", self.val_folder)
        there = table.meta["classes"]
        if not len(table):
            yield Problem(
                key, value, f"{val} holds no image in class folders", "dataset.val_fraction=0.1 to hold out a tenth of the training images"
            )
            return
        extra = [name for name in there if name not in set(classes)]
        missing = [] if self.class_file else [name for name in folders if name not in set(there)]
        if extra or missing:
            parts = [f"only in {val}: {listed(extra)}"] if extra else []
            parts += [f"missing in {val}: {listed(missing)}"] if missing else []
            yield Problem(
                key,
                value,
                f"the class folders differ between training and validation; {'; '.join(parts)}",
                "rename the folders, or list all classes in dataset.class_file (folders it names may be missing)",
            )
