"""Augmentation that keeps every image whole, or what it cuts off accounted for: for boxes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trainer.config.augmentation import AugmentationConfig, ascending
from trainer.config.fields import setting
from trainer.config.schemas import schema
from trainer.errors import Problem

if TYPE_CHECKING:
    from trainer.config.dataset import DatasetConfig
    from trainer.data.augment import Augmentation


@schema("augmentation", "letterbox")
@dataclass
class Letterbox(AugmentationConfig):
    """The image at its own aspect ratio in the upper left corner of a square of the mean colour; boxes follow every move and
    are clipped to what can be seen. Validation shows the whole image."""

    keeps_whole: ClassVar[bool] = True

    shorter_side: list[int] | None = setting(
        None,
        "length of the shorter side in pixels, as long as the longer one fits into dataset.image_size; of several one is drawn per training image (multi-scale), and the last is validation's; null = the longer side fits exactly",
        ge=1,
    )
    jitter: list[float] | None = setting(
        None,
        "training: resize by a factor from [smallest, largest] besides; what is larger than the square then is cut at random (scale jitter, arXiv:2012.07177); null = none",
        gt=0,
        length=2,
    )
    mosaic: float = setting(
        0.0,
        "training: probability that an image becomes one of four around a random point (mosaic, arXiv:2004.10934, sec. 3.3); shorter_side, jitter and crop_scale are for the others",
        ge=0,
        le=1,
    )
    mosaic_scale: list[float] = setting(
        [0.5, 1.5], "longer side of the images in a mosaic, as [smallest, largest] fraction of dataset.image_size", gt=0, length=2
    )
    mosaic_epochs: int | None = setting(
        None, "mosaics in this many epochs from the beginning, none in those that come last; null = in all", ge=0
    )
    distortion: float = setting(
        0.0,
        "training: probability of each step of SSD's photometric distortion, brightness, contrast, saturation, hue and the order of channels (torchvision's RandomPhotometricDistort, which has 0.5; arXiv:1512.02325, sec. 2.2)",
        ge=0,
        le=1,
    )
    min_visible: float = setting(0.25, "an object of which a crop leaves less than this fraction of its area is dropped", ge=0, le=1)

    @property
    def changes_colour(self) -> bool:
        return super().changes_colour or self.distortion > 0

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from ascending("augmentation.jitter", self.jitter)
        yield from ascending("augmentation.mosaic_scale", self.mosaic_scale)
        if self.mosaic_epochs is not None and not self.mosaic:
            yield Problem("augmentation.mosaic_epochs", self.mosaic_epochs, "there are no mosaics", "augmentation.mosaic=1.0")
        if not self.keep_aspect and (self.jitter or self.shorter_side):
            key = "jitter" if self.jitter else "shorter_side"
            reason = "sizes a picture that keeps its aspect ratio, and augmentation.keep_aspect=false squeezes it into the square"
            yield Problem(f"augmentation.{key}", getattr(self, key), reason, f"augmentation.{key}=null")
        if self.shorter_side == []:
            yield Problem("augmentation.shorter_side", [], "lists no length", "augmentation.shorter_side=null")
        if self.val_crop != 1:
            yield Problem("augmentation.val_crop", self.val_crop, "this augmentation shows the whole image", "augmentation.val_crop=1")

    def build(self, dataset: DatasetConfig, *, train: bool) -> Augmentation:
        from trainer.data.augment.letterbox import Boxed

        return Boxed(self, dataset, train=train)
