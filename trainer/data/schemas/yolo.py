"""Schemas of the datasets in YOLO's layout: photographs and multispectral arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trainer.config.fields import setting
from trainer.config.schemas import schema
from trainer.data.schemas.detection import SPLIT_NAMES, DetectionConfig
from trainer.data.schemas.paths import read_class_file, why
from trainer.data.source import LayoutError, Source
from trainer.errors import Problem

if TYPE_CHECKING:
    from trainer.data.formats.boxes import DetectionSource
    from trainer.data.table import Table


@schema("dataset", "yolo")
@dataclass
class YoloConfig(DetectionConfig):
    """YOLO: images, and beside them one text file of boxes for each."""

    KIND: ClassVar[str] = "yolo"

    class_file: str | None = setting(
        None,
        "class names: a YOLO data file (.yaml with `names`) or a text file with one a line; null = data.yaml, classes.txt or obj.names in dataset.path",
    )
    val_fraction: float | None = setting(
        None, "validate on this fraction of the training images, instead of a folder of its own", gt=0, lt=1
    )
    split_seed: int = setting(0, "which images dataset.val_fraction takes follows from it", ge=0)

    def names_file(self) -> Path | None:
        if self.class_file:
            return Path(self.class_file).expanduser()
        root = self.root("train")
        return next((root / name for name in ("data.yaml", "dataset.yaml", "classes.txt", "obj.names") if (root / name).is_file()), None)

    def classes(self) -> list[str]:
        from trainer.data.formats.yolo import read_names

        path = self.names_file()
        if path is None:
            raise LayoutError("has no class names")
        return read_names(path)["names"] if path.suffix in (".yaml", ".yml") else read_class_file(path)

    def folders(self, split: str) -> tuple[Path, Path] | None:
        """Images and labels of a split."""
        names = "train" if self.val_fraction is not None else split
        root = self.root(names)
        pairs = []
        for name in SPLIT_NAMES[names]:
            pairs += [(root / "images" / name, root / "labels" / name), (root / name / "images", root / name / "labels")]
        if self.val_fraction is not None or self.val_path:  # each folder is a whole
            pairs.append((root / "images", root / "labels"))
        return next(((images, labels) for images, labels in pairs if images.is_dir() and labels.is_dir()), None)

    def source(self, split: str) -> Source:
        from trainer.data.formats.yolo import divide, scan_yolo

        folders = self.folders(split)
        if folders is None:
            raise LayoutError("has no images/ and labels/")
        table = scan_yolo(*folders, self.classes(), self.KIND, self.bad_boxes, self.keep_empty)
        source = self.open(folders[0], table, split)
        return source if self.val_fraction is None else divide(source, split, self.val_fraction, self.split_seed)

    def open(self, images: Path, table: Table, split: str) -> DetectionSource:
        from trainer.data.formats.boxes import DetectionSource

        return DetectionSource(images, table, split)

    def layout_problems(self) -> Iterator[Problem]:

        root = self.root("train")
        if self.val_path and self.val_fraction is not None:
            yield Problem(
                "dataset.val_fraction",
                self.val_fraction,
                f"dataset.val_path={self.val_path} is set too: validation data come from one place",
                "dataset.val_fraction=null",
            )
        for split in self.splits:
            if self.folders(split) is None:
                name = SPLIT_NAMES[split][0]
                flat = (root / "images").is_dir() and (root / "labels").is_dir()
                fix = "dataset.val_fraction=0.2 to divide images/" if flat else "dataset.path=<the folder that holds images/ and labels/>"
                yield Problem(
                    "dataset.path",
                    self.path,
                    f"no {split} split: neither images/{name}/ with labels/{name}/ nor {name}/images/ with {name}/labels/ is in {self.root(split)}",
                    fix,
                )
                return
        try:
            if self.names_file() is None:
                yield Problem(
                    "dataset.class_file",
                    None,
                    f"no class names: {root} has no data.yaml, classes.txt or obj.names",
                    "dataset.class_file=/path/to/classes.txt",
                )
            else:
                self.classes()
        except OSError as error:
            yield Problem("dataset.class_file", str(self.names_file()), why(error))


@schema("dataset", "multispectral")
@dataclass
class MultispectralConfig(YoloConfig):
    """Multispectral: arrays [height, width, channels] in .npy files, laid out and labelled as for YOLO."""

    KIND: ClassVar[str] = "multispectral"

    channels: int = setting(help="channels of every array", ge=1)

    def open(self, images: Path, table: Table, split: str) -> DetectionSource:
        from trainer.data.formats.yolo import ArraySource

        return ArraySource(images, table, split, self.channels)

    def problems(self) -> Iterator[Problem]:
        if len(self.mean) != self.channels:
            yield Problem(
                "dataset.mean",
                self.mean,
                f"needs one value for each of dataset.channels={self.channels}",
                f"dataset.mean=[{','.join(['0.5'] * self.channels)}]",
            )
        yield from super().problems()

    def content_problems(self) -> Iterator[Problem]:
        from trainer.data.formats.yolo import array_channels

        found = [*super().content_problems()]
        yield from found
        if not found:
            source = self.source(self.splits[0])
            there = array_channels(source.name(0))
            if there != self.channels:
                yield Problem("dataset.channels", self.channels, f"{source.name(0)} has {there}", f"dataset.channels={there}")
