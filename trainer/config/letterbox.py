"""Augmentation that keeps every image whole, or what it cuts off accounted for: for boxes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trainer.config.augmentation import AugmentationConfig, ascending
from trainer.config.fields import schema, setting
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
    min_visible: float = setting(0.25, "an object of which a crop leaves less than this fraction of its area is dropped", ge=0, le=1)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from ascending("augmentation.jitter", self.jitter)
        if self.shorter_side == []:
            yield Problem("augmentation.shorter_side", [], "lists no length", "augmentation.shorter_side=null")
        if self.val_crop != 1:
            yield Problem("augmentation.val_crop", self.val_crop, "this augmentation shows the whole image", "augmentation.val_crop=1")

    def build(self, dataset: DatasetConfig, *, train: bool) -> Augmentation:
        from trainer.data.augment.letterbox import Boxed

        return Boxed(self, dataset, train=train)
