"""Schemas of fine-grained and medical datasets, and of those made to tell objects from backgrounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trainer.config.dataset import DatasetConfig, Facts
from trainer.config.fields import setting
from trainer.config.schemas import schema
from trainer.data.schemas.folders import ImageFolderConfig
from trainer.data.schemas.paths import directory_problem
from trainer.data.source import LayoutError, Source
from trainer.errors import Problem

if TYPE_CHECKING:
    from trainer.data.table import Table


@dataclass
class ListedConfig(DatasetConfig):
    """Base of datasets whose own lists say what is where."""

    def root(self) -> Path:
        return Path(self.path or "").expanduser()

    def facts(self) -> Facts:
        return self.facts_of(self.build)

    def problems(self) -> Iterator[Problem]:

        yield from super().problems()
        if self.val_path:
            yield Problem("dataset.val_path", self.val_path, "this dataset's own lists say what validates", "dataset.val_path=null")
        wrong = directory_problem("dataset.path", self.path) if self.path else None
        if wrong:
            yield wrong
        if wrong or not self.path:
            return
        try:
            for split in self.splits:
                source = self.build(split)
                if not len(source):
                    yield Problem("dataset.path", self.path, f"its lists put no image into the {split} split")
                elif not Path(source.name(0)).is_file():
                    yield Problem("dataset.path", self.path, f"its lists name {source.name(0)}, which is not there")
        except LayoutError as error:
            yield Problem("dataset.path", self.path, str(error), "dataset.path=<the folder that holds these files>")
        except OSError as error:
            yield Problem("dataset.path", self.path, f"{error.filename}: {error.strerror}")


@schema("dataset", "cub")
@dataclass
class CubConfig(ListedConfig):
    """CUB-200-2011: images.txt and its sister files; boxes, parts and segmentations/ are used where they are there."""

    offers: ClassVar[frozenset[str]] = frozenset({"image", "label", "box", "parts", "mask"})

    val_fraction: float | None = setting(
        None, "validate on this fraction of the training images, class by class, instead of the test images", gt=0, lt=1
    )
    split_seed: int = setting(0, "which images dataset.val_fraction takes follows from it", ge=0)

    def table(self) -> Table:
        from trainer.data.formats.birds import scan_cub

        return scan_cub(self.root())

    def build(self, split: str) -> Source:
        from trainer.data.formats.birds import TEST, TRAIN, bird_source, hold_out

        if self.val_fraction is not None:
            return hold_out(self.root(), self.table(), split, self.val_fraction, self.split_seed)
        return bird_source(self.root(), self.table(), TRAIN if split == "train" else TEST)


@schema("dataset", "waterbirds")
@dataclass
class WaterbirdsConfig(ListedConfig):
    """Waterbirds: metadata.csv and its images, in dataset.path or in the usual folder below it. The group is bird and place."""

    offers: ClassVar[frozenset[str]] = frozenset({"image", "label", "group", "mask"})

    folder: str = setting(
        "waterbird_complete95_forest2water2", "folder with metadata.csv inside dataset.path; where it is missing, dataset.path itself"
    )
    validate_on: str = setting("val", "which part validates: val, or test, as in the papers", choices=["val", "test"])

    def birds(self) -> Path:
        below = self.root() / self.folder
        return below if below.is_dir() else self.root()

    def table(self) -> Table:
        from trainer.data.formats.birds import scan_waterbirds

        outlines = next((p for p in (self.root(), self.birds().parent) if (p / "segmentations").is_dir()), None)
        return scan_waterbirds(self.birds(), outlines)

    def build(self, split: str) -> Source:
        from trainer.data.formats.birds import TEST, TRAIN, VAL, bird_source

        val = TEST if self.validate_on == "test" else VAL
        return bird_source(self.birds(), self.table(), TRAIN if split == "train" else val)


@schema("dataset", "siim_acr")
@dataclass
class SiimAcrConfig(ListedConfig):
    """SIIM-ACR: <path>/train_set/{0,1}, <path>/full_test_set/{0,1} and masks, as PNG or DICOM. Two classes."""

    offers: ClassVar[frozenset[str]] = frozenset({"image", "label", "mask"})

    train_folder: str = setting("train_set", "folder of the training X-rays in dataset.path")
    val_folder: str = setting(
        "full_test_set", "folder of the validation X-rays in dataset.path; robust_test_set and non_robust_test_set are beside it"
    )
    mask_folder: str | None = setting(
        "all_masks", "folder of the masks in dataset.path, named as the X-rays; null = none. Without it samples have no mask"
    )
    extensions: list[str] = setting([".dcm", ".dicom", ".png", ".jpg", ".jpeg"], "file name endings of X-rays, in any case")

    def build(self, split: str) -> Source:
        from trainer.data.formats.siim_acr import xray_source

        masks = self.root() / self.mask_folder if self.mask_folder else None
        folder = self.root() / (self.train_folder if split == "train" else self.val_folder)
        return xray_source(folder, masks if masks and masks.is_dir() else None, self.extensions)


@schema("dataset", "meta_shift")
@dataclass
class MetaShiftConfig(ImageFolderConfig):
    """MetaShift's cats and dogs: train/{cat,dog}/ and test/{cat,dog}/, taken in other places. A group is a class."""

    offers: ClassVar[frozenset[str]] = frozenset({"image", "label", "group"})
    GROUPED: ClassVar[bool] = True
