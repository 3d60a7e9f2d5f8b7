"""Datasets: what every one of them has. The formats are in trainer/data/."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from trainer.config.fields import setting
from trainer.errors import Problem

if TYPE_CHECKING:
    from trainer.data.source import Source


@dataclass(frozen=True)
class Facts:
    """What is known of a dataset from its config and its index, before anything is decoded. None = not known yet."""

    num_classes: int | None = None
    num_train: int | None = None  # samples
    num_val: int | None = None
    channels: int = 3


@dataclass
class DatasetConfig:
    """What every dataset has. `offers` says what a sample holds: image, label, boxes, parts, mask, group …"""

    offers: ClassVar[frozenset[str]] = frozenset({"image", "label"})
    on_disk: ClassVar[bool] = True
    splits = ("train", "val")  # those that have to be there; of whoever needs only one of them, `alone`
    tiny: ClassVar[bool] = False  # a few pixels, and left and right differ, as in digits: no mirror images, no small pieces

    path: str | None = setting(None, "where the data lie; required for every dataset on disk")
    val_path: str | None = setting(None, "where the validation data lie, if elsewhere")
    image_size: int = setting(help="side in pixels of the square images the network sees", ge=1)
    # OmegaConf 2.3 cannot merge a Union into a node that was missing, hence Any and `words`.
    num_workers: Any = setting(
        "auto", "processes that load data, per rank; auto = from the cores this rank may use", ge=0, words=["auto"], identity=False
    )
    prefetch: int = setting(2, "batches each worker keeps ready", ge=1, identity=False)
    keep_mb: int = setting(
        0,
        "memory of each loader process, in MB, for samples that it does not decode again: those that leave it the same each time, so of training "
        "images those that are not cut at random",
        ge=0,
        identity=False,
    )
    mean: list[float] = setting([0.485, 0.456, 0.406], "mean per channel of images in [0, 1], subtracted", identity=True)
    std: list[float] = setting([0.229, 0.224, 0.225], "standard deviation per channel, divided by", gt=0)
    repeats: int = setting(
        1,
        "repeated augmentation: each sample this many times in a row of the epoch's order, each time augmented anew (arXiv:1901.09335); an epoch is that much longer unless loop.samples_per_epoch says otherwise",
        ge=1,
    )
    class_balanced: bool = setting(False, "draw classes with equal probability instead of samples")
    shape_groups: int | None = setting(
        None,
        "batches of images of similar shape, which need less padding: bounds of width over height per factor of two (torchvision's references: 3); 0 = wide and upright ones; null = batches of any",
        ge=0,
    )
    train_fraction: float = setting(1.0, "use this fraction of the training samples, the same for every epoch", gt=0, le=1)
    max_bad_samples: int = setting(
        100,
        "give up (exit 3) after this many samples that cannot be read, all ranks together; each is replaced by another",
        ge=0,
        identity=False,
    )
    worker_timeout: float = setting(
        300.0,
        "give up (exit 3) when no loader worker has finished anything for this many seconds, naming what each is reading",
        gt=0,
        identity=False,
    )

    @abstractmethod
    def build(self, split: str) -> Source:
        """The samples of `split`, "train" or "val". Imports no torch."""

    def facts(self) -> Facts:
        """What is known before reading images. Raises OSError where files are missing."""
        return Facts()

    def alone(self, split: str) -> Self:
        """The same data for whoever needs only one split of them: the other need not be there."""
        one = copy.copy(self)
        one.splits = (split,)
        return one

    def facts_of(self, source: Callable[[str], Source]) -> Facts:
        """What the splits that are needed tell, given how one is opened."""
        found = {split: source(split) for split in self.splits}
        counts = {f"num_{split}": len(of_split) for split, of_split in found.items()}
        one = found[self.splits[0]]
        return Facts(num_classes=len(one.classes), channels=one.channels, **counts)

    def problems(self) -> Iterator[Problem]:
        if self.on_disk and not self.path:
            yield Problem("dataset.path", self.path, "this dataset lies on disk: say where", "dataset.path=/path/to/data")
        if not self.on_disk and (self.path or self.val_path):
            key = "dataset.path" if self.path else "dataset.val_path"
            fix = f"dataset=image_folder dataset.path={self.path}" if self.path else "dataset.val_path=null"
            yield Problem(key, self.path or self.val_path, "this dataset is embedded and reads no files", fix)
        if len(self.mean) != len(self.std):
            yield Problem("dataset.std", self.std, f"needs as many values as dataset.mean ({len(self.mean)})")
