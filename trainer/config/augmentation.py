"""Augmentation: what happens to an image between the file and the network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.config.fields import setting
from trainer.config.schemas import schema
from trainer.errors import Problem

if TYPE_CHECKING:
    from trainer.config.dataset import DatasetConfig
    from trainer.data.augment import Augmentation


@dataclass
class AugmentationConfig:
    """What every augmentation has. Decoding, cropping and resizing happen in the loader's workers and end in uint8;
    flips, colour, mixing and normalisation run on the device, a batch at a time, still keyed by sample. Policies of random
    operations, affine maps and mosaics are the workers' too, one image at a time."""

    views: ClassVar[bool] = False  # gives several views of an image, for tasks that ask for them
    moves_pixels: ClassVar[bool] = False  # otherwise than by the crop and the flip, which boxes, parts and masks follow
    needs_rgb: ClassVar[bool] = False
    keeps_whole: ClassVar[bool] = False  # no object is cut off without its box being clipped, and none at all in validation

    hflip: float = setting(help="probability of a horizontal flip", ge=0, le=1)
    crop_scale: list[float] | None = setting(
        help="area of the random crop, as [smallest, largest] fraction; null = cut as in validation", gt=0, le=1, length=2
    )
    crop_ratio: list[float] = setting([0.75, 4 / 3], "aspect ratio of the random crop, [smallest, largest]", gt=0, length=2)
    val_crop: float = setting(
        help="validation: the shorter side is resized to image_size / val_crop, then the centre is cut out", gt=0, le=1
    )
    shift: float = setting(
        0.0,
        "largest shift of the image either way, as a fraction of its side, the gap filled by reflection; the padded crop of CIFAR's recipes is 0.125",
        ge=0,
        lt=0.5,
    )
    keep_aspect: bool = setting(True, "false: where there is no random crop, the whole image is squeezed into the square")
    interpolation: str = setting("bilinear", "filter that images are resized with", choices=["bilinear", "bicubic"])
    color_jitter: list[float] | None = setting(
        None,
        "largest relative change of brightness, contrast and saturation, and of hue in turns of its circle; null = none",
        ge=0,
        length=4,
    )
    color_jitter_probability: float = setting(1.0, "probability of color_jitter", ge=0, le=1)
    grayscale: float = setting(0.0, "probability that an image loses its colour", ge=0, le=1)
    mixup: float = setting(0.0, "mixup alpha (arXiv:1710.09412); 0 = off", ge=0)
    cutmix: float = setting(0.0, "cutmix alpha (arXiv:1905.04899); 0 = off", ge=0)
    mix_probability: float = setting(1.0, "probability that an image is mixed at all", ge=0, le=1)
    switch_probability: float = setting(0.5, "probability of cutmix where both are on", ge=0, le=1)
    erasing: float = setting(0.0, "probability of random erasing (arXiv:1708.04896)", ge=0, le=1)

    @abstractmethod
    def build(self, dataset: DatasetConfig, *, train: bool) -> Augmentation:
        """The transform of one split."""

    def problems(self) -> Iterator[Problem]:
        for name in ("crop_scale", "crop_ratio"):
            yield from ascending(f"augmentation.{name}", getattr(self, name))
        if self.color_jitter and len(self.color_jitter) == 4 and self.color_jitter[3] > 0.5:
            yield Problem("augmentation.color_jitter[3]", self.color_jitter[3], "half a turn, 0.5, reaches every hue")

    @property
    def changes_colour(self) -> bool:
        return self.needs_rgb or bool(self.color_jitter) or self.grayscale > 0


def ascending(key: str, pair: list[float] | None) -> Iterator[Problem]:
    if pair and len(pair) == 2 and pair[0] > pair[1]:
        yield Problem(key, pair, "goes from the smallest to the largest", f"{key}=[{pair[1]},{pair[0]}]")


@schema("augmentation", "basic")
@dataclass
class Basic(AugmentationConfig):
    """A random crop and a flip; colour, mixup, cutmix and random erasing where asked for."""

    def build(self, dataset: DatasetConfig, *, train: bool) -> Augmentation:
        from trainer.data.augment.standard import Standard

        return Standard(self, dataset, train=train)


@dataclass
class PolicyConfig(AugmentationConfig):
    """Random operations of torchvision's, one image at a time, between the crop and the flip."""

    moves_pixels: ClassVar[bool] = True
    needs_rgb: ClassVar[bool] = True

    @abstractmethod
    def policy(self, dataset: DatasetConfig) -> Callable[[Any], Any]:
        """A torchvision transform from PIL image to PIL image."""

    def build(self, dataset: DatasetConfig, *, train: bool) -> Augmentation:
        from trainer.data.augment.policies import Policy
        from trainer.data.augment.standard import Standard

        return Standard(self, dataset, train=train, policy=Policy(self.policy(dataset)) if train else None)


@schema("augmentation", "randaugment")
@dataclass
class RandAugment(PolicyConfig):
    """RandAugment (arXiv:1909.13719)."""

    operations: int = setting(2, "operations per image", ge=1)
    magnitude: int = setting(9, "strength of every operation, of 30", ge=0, le=30)

    def policy(self, dataset: DatasetConfig) -> Callable[[Any], Any]:
        from trainer.data.augment import policies

        return policies.rand_augment(self.operations, self.magnitude, dataset.mean)


@schema("augmentation", "autoaugment")
@dataclass
class AutoAugment(PolicyConfig):
    """AutoAugment (arXiv:1805.09501)."""

    learned_on: str = setting("imagenet", "data that the policy was searched on", choices=["imagenet", "cifar10", "svhn"])

    def policy(self, dataset: DatasetConfig) -> Callable[[Any], Any]:
        from trainer.data.augment import policies

        return policies.auto_augment(self.learned_on, dataset.mean)


@schema("augmentation", "trivialaugment")
@dataclass
class TrivialAugment(PolicyConfig):
    """TrivialAugment, wide (arXiv:2103.10158): one operation of any strength."""

    def policy(self, dataset: DatasetConfig) -> Callable[[Any], Any]:
        from trainer.data.augment import policies

        return policies.trivial_augment(dataset.mean)


@schema("augmentation", "augmix")
@dataclass
class AugMix(PolicyConfig):
    """AugMix (arXiv:1912.02781), without its consistency loss. The slowest of all: several chains of operations per image."""

    severity: int = setting(3, "strength of the operations, of 10", ge=1, le=10)
    width: int = setting(3, "chains that are mixed", ge=1)
    depth: int = setting(-1, "operations per chain; -1 = one to three", ge=-1)
    alpha: float = setting(1.0, "parameter of the distributions that the mixing weights come from", gt=0)

    def policy(self, dataset: DatasetConfig) -> Callable[[Any], Any]:
        from trainer.data.augment import policies

        return policies.aug_mix(self.severity, self.width, self.depth, self.alpha, dataset.mean)


@schema("augmentation", "three_augment")
@dataclass
class ThreeAugment(AugmentationConfig):
    """3-Augment (arXiv:2204.07118, sec. 3): each image turns grey, is solarised or is blurred; then colour jitter."""

    needs_rgb: ClassVar[bool] = True

    def build(self, dataset: DatasetConfig, *, train: bool) -> Augmentation:
        from trainer.data.augment.colour import one_of_three
        from trainer.data.augment.standard import Standard

        return Standard(self, dataset, train=train, colour=one_of_three)


@schema("augmentation", "cub")
@dataclass
class Cub(AugmentationConfig):
    """For birds in any pose: the shorter side resized, light of another colour, turned, moved and scaled, a random square cut."""

    moves_pixels: ClassVar[bool] = True
    needs_rgb: ClassVar[bool] = True

    rotation: float = setting(90.0, "largest rotation either way, in degrees", ge=0, le=180)
    translation: float = setting(0.2, "largest shift, as a fraction of width and height", ge=0, le=1)
    zoom: list[float] = setting([0.8, 1.2], "scale, [smallest, largest]", gt=0, length=2)
    planckian: float = setting(0.8, "probability of another colour of light (Planckian jitter, arXiv:2202.07993)", ge=0, le=1)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from ascending("augmentation.zoom", self.zoom)
        if self.shift:
            yield Problem("augmentation.shift", self.shift, "this one shifts by its own rule", "augmentation.translation=0.2")

    def build(self, dataset: DatasetConfig, *, train: bool) -> Augmentation:
        from trainer.data.augment.turned import Turned

        return Turned(self, dataset, train=train)


@schema("augmentation", "dino")
@dataclass
class Dino(AugmentationConfig):
    """Multi-crop (arXiv:2006.09882) as in DINO (arXiv:2104.14294): two large views and several small ones.

    `crop_scale` is that of the large ones. The three blur and solarise probabilities are for the first and the second large
    view and for the small ones.
    """

    views: ClassVar[bool] = True
    moves_pixels: ClassVar[bool] = True  # no view shows the whole image
    needs_rgb: ClassVar[bool] = True

    local_crops: int = setting(8, "small views of an image", ge=0)
    local_size: int = setting(96, "side of a small view in pixels", ge=1)
    local_scale: list[float] = setting([0.05, 0.4], "area of a small view, as [smallest, largest] fraction", gt=0, le=1, length=2)
    blur: list[float] = setting([1.0, 0.1, 0.5], "probability of Gaussian blur", ge=0, le=1, length=3)
    solarize: list[float] = setting([0.0, 0.2, 0.0], "probability of solarisation", ge=0, le=1, length=3)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from ascending("augmentation.local_scale", self.local_scale)
        if self.crop_scale is None:
            yield Problem("augmentation.crop_scale", None, "views are random crops", "augmentation.crop_scale=[0.4,1.0]")
        for name in ("mixup", "cutmix", "erasing", "shift"):
            if getattr(self, name):
                yield Problem(f"augmentation.{name}", getattr(self, name), "does not go with several views", f"augmentation.{name}=0")

    def build(self, dataset: DatasetConfig, *, train: bool) -> Augmentation:
        from trainer.data.augment.multicrop import MultiCrop
        from trainer.data.augment.standard import Standard

        return MultiCrop(self, dataset) if train else Standard(self, dataset, train=False)
