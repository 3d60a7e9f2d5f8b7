"""Schemas of the datasets that need no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trainer.config.dataset import DatasetConfig, Facts
from trainer.config.fields import setting
from trainer.config.schemas import schema
from trainer.data.source import Source


@schema("dataset", "digits")
@dataclass
class DigitsConfig(DatasetConfig):
    """1,797 handwritten digits of 8 x 8 pixels, from scikit-learn; a fixed fifth of each class validates."""

    on_disk: ClassVar[bool] = False
    tiny: ClassVar[bool] = True

    def build(self, split: str) -> Source:
        from trainer.data.formats.embedded import Digits

        return Digits(split)

    def facts(self) -> Facts:
        return Facts(num_classes=10, num_train=1438, num_val=359)


@schema("dataset", "synthetic")
@dataclass
class SyntheticConfig(DatasetConfig):
    """A pattern per class in noise, made on the fly: for tests and benchmarks. Easily learned."""

    on_disk: ClassVar[bool] = False
    tiny: ClassVar[bool] = True

    num_classes: int = setting(10, "classes", ge=1)
    num_train: int = setting(2000, "training samples", ge=1)
    num_val: int = setting(400, "validation samples", ge=1)
    channels: int = setting(3, "channels of an image", ge=1)
    source_size: int | None = setting(None, "side of the square images before augmentation, in pixels; null = dataset.image_size", ge=1)
    seed: int = setting(0, "the patterns and the noise follow from it", ge=0)

    def build(self, split: str) -> Source:
        from trainer.data.formats.embedded import Synthetic

        count = self.num_train if split == "train" else self.num_val
        size = self.source_size or self.image_size
        return Synthetic(split, num_samples=count, num_classes=self.num_classes, size=size, channels=self.channels, seed=self.seed)

    def facts(self) -> Facts:
        return Facts(num_classes=self.num_classes, num_train=self.num_train, num_val=self.num_val, channels=self.channels)


@dataclass
class ComposedConfig(DatasetConfig):
    """What pictures composed of digits have in common."""

    on_disk: ClassVar[bool] = False
    tiny: ClassVar[bool] = True

    num_train: int = setting(2000, "training samples", ge=1)
    num_val: int = setting(400, "validation samples", ge=1)
    source_size: int = setting(help="side of the square pictures before augmentation, in pixels", ge=32)
    noise: float = setting(1.0, "strength of the background; 0 = black", ge=0, le=1)
    seed: int = setting(0, "the pictures follow from it", ge=0)

    def count(self, split: str) -> int:
        return self.num_train if split == "train" else self.num_val

    def facts(self) -> Facts:
        return Facts(num_classes=len(self.build("train").classes), num_train=self.num_train, num_val=self.num_val)


@schema("dataset", "digit_scenes")
@dataclass
class DigitScenesConfig(ComposedConfig):
    """Handwritten digits scattered over a background, with exact boxes: for detection."""

    offers: ClassVar[frozenset[str]] = frozenset({"image", "boxes"})

    max_objects: int = setting(4, "digits in a picture at most; at least one", ge=1)

    def build(self, split: str) -> Source:
        from trainer.data.formats.scenes import DigitScenes

        return DigitScenes(
            split, num_samples=self.count(split), size=self.source_size, max_objects=self.max_objects, noise=self.noise, seed=self.seed
        )


@schema("dataset", "digit_parts")
@dataclass
class DigitPartsConfig(ComposedConfig):
    """Figures of four handwritten digits, with the place and outline of each: for discovering parts. Eight classes."""

    offers: ClassVar[frozenset[str]] = frozenset({"image", "label", "box", "parts", "mask"})

    num_train: int = setting(8000, "training samples", ge=1)
    hidden: float = setting(0.1, "share of figures that lack one of their digits", ge=0, le=1)

    def build(self, split: str) -> Source:
        from trainer.data.formats.scenes import DigitParts

        return DigitParts(split, num_samples=self.count(split), size=self.source_size, hidden=self.hidden, noise=self.noise, seed=self.seed)
