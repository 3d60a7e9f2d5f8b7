"""The augmentation that every classifier starts from: cut, flip, colour, erase, mix, normalise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.data.augment import colour as colours
from trainer.data.augment import mixing
from trainer.data.augment.geometry import SPATIAL, Cut, centre_crop, random_crop, size_of

if TYPE_CHECKING:
    from trainer.config import AugmentationConfig, DatasetConfig
    from trainer.data.source import Sample
    from trainer.random import SampleRandom
    from trainer.task import Batch

CROP = 1  # stream of a sample's numbers


class Standard:
    """Cut and resize in the worker; everything else a batch at a time on the device.

    Args:
        policy: what else the worker does to a training image, uint8 [3, S, S].
        colour: what else the device does to training images, float [N, 3, S, S] in [0, 1], given their keys [N].
    """

    lazy = True  # images come with their pixels unread: how they are read depends on the cut

    def __init__(
        self,
        cfg: AugmentationConfig,
        dataset: DatasetConfig,
        *,
        train: bool,
        policy: Callable[[Tensor, SampleRandom], Tensor] | None = None,
        colour: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.cfg, self.train, self.policy, self.colour = cfg, train, policy, colour
        self.size, self.bicubic = dataset.image_size, cfg.interpolation == "bicubic"
        self.num_classes: int | None = None
        self.mean, self.std = dataset.mean, dataset.std
        # What lies in the image's own frame has to turn with it, so these samples are mirrored in the worker.
        self.flips_early = train and bool(dataset.offers & SPATIAL)

    def sample(self, sample: Sample, random: SampleRandom) -> dict[str, Any]:
        image = sample["image"]
        cut = Cut(self._box(*size_of(image), random), self.size, self.flips_early and mixing.flips(random, self.cfg.hflip))
        # Twice the pixels make a scaled decode indistinguishable, which matters where accuracy is measured.
        pixels = cut.pixels(image, gap=1.0 if self.train else 2.0, bicubic=self.bicubic)
        rest = cut.rest(sample)
        if self.policy is not None:
            pixels = self.policy(pixels, random)
            rest = {name: value for name, value in rest.items() if name not in SPATIAL}
        return {"image": pixels, **rest}

    def _box(self, width: int, height: int, random: SampleRandom) -> tuple[int, int, int, int]:
        if self.train and self.cfg.crop_scale:
            return random_crop(width, height, self.cfg.crop_scale, self.cfg.crop_ratio, random.stream(CROP))
        return centre_crop(width, height, self.cfg.val_crop) if self.cfg.keep_aspect else (0, 0, width, height)

    def batch(self, batch: Batch) -> Batch:
        cfg, keys = self.cfg, batch["key"]
        images: Tensor = batch["image"]  # [N, C, S, S] uint8
        if not self.train:
            batch["image"] = mixing.normalise(images, self.mean, self.std)
            return batch
        if not self.flips_early:
            images = mixing.flip(images, keys, cfg.hflip)
        if cfg.shift:
            images = mixing.shift(images, keys, cfg.shift)
        images = mixing.normalise(self._coloured(images, keys), self.mean, self.std)
        images = mixing.erase(images, keys, cfg.erasing)
        if (cfg.mixup or cfg.cutmix) and "label" in batch:
            assert self.num_classes, "mixing needs the number of classes"
            images, batch["target"] = mixing.mix(
                images, batch["label"], keys, self.num_classes,
                mixup=cfg.mixup, cutmix=cfg.cutmix, probability=cfg.mix_probability, switch=cfg.switch_probability,
            )  # fmt: skip
        batch["image"] = images
        return batch

    def _coloured(self, images: Tensor, keys: Tensor) -> Tensor:
        cfg = self.cfg
        if not (self.colour or cfg.color_jitter or cfg.grayscale):
            return images
        images = images.float() / 255
        if self.colour is not None:
            images = self.colour(images, keys)
        if cfg.color_jitter:
            images = colours.jitter(images, keys, cfg.color_jitter, cfg.color_jitter_probability)
        return colours.grey(images, keys, cfg.grayscale) if cfg.grayscale else images
