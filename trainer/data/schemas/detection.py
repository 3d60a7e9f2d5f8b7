"""Schemas of the datasets with boxes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trainer.config.dataset import DatasetConfig, Facts
from trainer.config.fields import setting
from trainer.config.schemas import schema
from trainer.data.schemas.paths import class_file_problems, directory_problem, listed, read_class_file
from trainer.data.source import LayoutError, Source
from trainer.errors import Problem

if TYPE_CHECKING:
    pass

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}


@dataclass
class DetectionConfig(DatasetConfig):
    """What every dataset with boxes has."""

    offers: ClassVar[frozenset[str]] = frozenset({"image", "boxes"})

    bad_boxes: str = setting(
        "clip",
        "boxes that cannot be right (no area, NaN, outside the image, unknown category): clip to the image and drop what cannot be mended, drop, or raise (exit 3); counted and printed with their images",
        choices=["clip", "drop", "raise"],
    )
    keep_empty: bool = setting(True, "keep images without any box, as examples of nothing")

    @abstractmethod
    def source(self, split: str) -> Source:
        """As `build`, and says nothing. Raises LayoutError where the files are not laid out as the format has it."""

    def build(self, split: str) -> Source:
        from trainer.data.formats.boxes import DetectionSource

        source = self.source(split)
        whole = getattr(source, "source", source)  # that of which it is a part, where it is one
        assert isinstance(whole, DetectionSource)
        whole.announce(f"{self.root(split)} ({split})")
        return source

    def facts(self) -> Facts:
        return self.facts_of(self.source)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not self.path:
            return
        wrong = [directory_problem("dataset.path", self.path)]
        wrong += [directory_problem("dataset.val_path", self.val_path)] if self.val_path else []
        found = [*(w for w in wrong if w), *self.layout_problems()] if not any(wrong) else [w for w in wrong if w]
        yield from found or self.content_problems()

    def layout_problems(self) -> Iterator[Problem]:
        """What is missing, before any annotation is read."""
        yield from ()

    def content_problems(self) -> Iterator[Problem]:

        sources = {}
        for split in self.splits:
            key, value = ("dataset.val_path", self.val_path) if split == "val" and self.val_path else ("dataset.path", self.path)
            try:
                sources[split] = self.source(split)
            except OSError as error:
                yield Problem(
                    key, value, f"{split} split: {error if isinstance(error, LayoutError) else f'{error.filename}: {error.strerror}'}"
                )
                return
            if not len(sources[split]):
                yield Problem(key, value, f"the {split} split holds no image{'' if self.keep_empty else ' with a box'}")
        train, val = (sources[split] for split in (self.splits[0], self.splits[-1]))
        if tuple(train.classes) != tuple(val.classes):
            yield Problem(
                "dataset.path",
                self.path,
                f"the categories of train ({listed(train.classes)}) and val ({listed(val.classes)}) differ",
                "write both splits with the same list of categories",
            )
            return
        for split, source in sources.items():
            counts = getattr(source, "object_counts", None)  # not of a part of a folder
            if len(source) and counts is not None and not counts().any():
                yield Problem("dataset.path", self.path, f"the {split} split shows no object in any of its {len(source)} images")

    def root(self, split: str) -> Path:
        return Path((self.val_path if split == "val" and self.val_path else self.path) or "").expanduser()


@schema("dataset", "coco")
@dataclass
class CocoConfig(DetectionConfig):
    """COCO: images, and one JSON file of boxes for each split."""

    train_annotations: str | None = setting(
        None,
        "JSON file of the training split, relative to dataset.path; null = the one found (instances_train*.json, train/_annotations.coco.json …)",
    )
    val_annotations: str | None = setting(
        None, "JSON file of the validation split, relative to dataset.val_path or dataset.path; null = the one found"
    )
    train_images: str | None = setting(None, "folder that the training images' names are relative to; null = found around the JSON file")
    val_images: str | None = setting(None, "folder that the validation images' names are relative to; null = found around the JSON file")

    def annotations(self, split: str) -> Path | list[Path]:
        """The annotation file, or, where it is not just one, those that could be meant."""
        from trainer.data.formats.coco import find_annotations

        named = self.train_annotations if split == "train" else self.val_annotations
        found = [self.root(split) / named] if named else find_annotations(self.root(split), split)
        return found[0] if len(found) == 1 else found

    def source(self, split: str) -> Source:
        from trainer.data.formats.coco import coco_source

        annotations = self.annotations(split)
        if isinstance(annotations, list):
            raise LayoutError(f"which of {listed([p.name for p in annotations])} are the annotations?")
        named = self.train_images if split == "train" else self.val_images
        return coco_source(annotations, self.root(split) / named if named else None, split, self.bad_boxes, self.keep_empty)

    def layout_problems(self) -> Iterator[Problem]:
        for split in self.splits:
            key = f"dataset.{split}_annotations"
            named = self.train_annotations if split == "train" else self.val_annotations
            found, root = self.annotations(split), self.root(split)
            if isinstance(found, list) and found:
                yield Problem(
                    key,
                    named,
                    f"{root} holds several: {listed([str(p.relative_to(root)) for p in found])}",
                    f"{key}={found[0].relative_to(root)}",
                )
            elif isinstance(found, list):
                there = [str(p.relative_to(root)) for p in sorted(root.glob("*.json")) + sorted(root.glob("*/*.json"))]
                yield Problem(
                    key,
                    named,
                    f"no annotation file of the {split} split found in {root}; it holds {listed(there) or 'no JSON file'}",
                    f"{key}={there[0] if there else 'annotations/instances.json'}",
                )
            elif not found.is_file():
                yield Problem(key, named, f"no such file: {found}", f"{key}=null looks for it")
            images = self.train_images if split == "train" else self.val_images
            wrong = directory_problem(f"dataset.{split}_images", root / images) if images else None
            if wrong:
                yield wrong


@schema("dataset", "voc")
@dataclass
class VocConfig(DetectionConfig):
    """Pascal VOC: images, one XML file of boxes for each, and lists of names for the splits."""

    annotations: str | None = setting(None, "folder of the XML files in dataset.path; null = the one found (Annotations, annotations, voc)")
    images: str | None = setting(None, "folder of the images in dataset.path; null = the one found (JPEGImages, images)")
    train_list: str | None = setting(
        None, "text file of the training images' names, in dataset.path; null = the one found (ImageSets/Main/train.txt, *train.txt)"
    )
    val_list: str | None = setting(None, "text file of the validation images' names; null = the one found")
    class_file: str | None = setting(
        None, "text file of class names, one a line, index = line; null = every name in the XML files, in alphabetical order"
    )
    first_pixel: int = setting(0, "number of the leftmost pixel: 1 in the VOC challenges' own files, 0 in most tools'", ge=0, le=1)

    FOLDERS: ClassVar[dict[str, tuple[str, ...]]] = {
        "annotations": ("Annotations", "annotations", "voc"),
        "images": ("JPEGImages", "images"),
    }

    def place(self, what: str, split: str) -> Path | None:
        """The folder or list that is named or found."""
        root, named = self.root(split), getattr(self, what)
        if named:
            return root / named if (root / named).exists() else None
        if what in self.FOLDERS:
            return next((root / name for name in self.FOLDERS[what] if (root / name).is_dir()), None)
        names = SPLIT_NAMES[split]
        found = [
            p
            for name in names
            for pattern in (f"ImageSets/Main/{name}.txt", f"{name}.txt", f"*_{name}.txt")
            for p in sorted(root.glob(pattern))
        ]
        return found[0] if found else None

    def source(self, split: str) -> Source:
        from trainer.data.formats.boxes import DetectionSource
        from trainer.data.formats.voc import scan_voc

        annotations, images, names = (self.place(what, split) for what in ("annotations", "images", f"{split}_list"))
        if not annotations or not images or not names:
            raise LayoutError("has no folder of XML files, no folder of images or no list of names")
        classes = read_class_file(self.class_file) if self.class_file else None
        return DetectionSource(
            images, scan_voc(annotations, images, names, classes, self.first_pixel, self.bad_boxes, self.keep_empty), split
        )

    def layout_problems(self) -> Iterator[Problem]:
        for split in self.splits:
            for what in ("annotations", "images", f"{split}_list"):
                told = split != self.splits[0] and not self.val_path and what in self.FOLDERS  # of both splits at once
                if self.place(what, split) is None and not told:
                    named = getattr(self, what)
                    looked = " or ".join(self.FOLDERS.get(what, tuple(f"ImageSets/Main/{n}.txt, *_{n}.txt" for n in SPLIT_NAMES[split])))
                    reason = f"not found in {self.root(split)}" if named else f"{self.root(split)} has no {looked}"
                    yield Problem(f"dataset.{what}", named, reason, f"dataset.{what}=<where it is, relative to dataset.path>")
        yield from class_file_problems(self.class_file)
