"""Several views of one image, for tasks that learn by comparing them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.data.augment import colour, mixing
from trainer.data.augment.geometry import SPATIAL, Cut, decoded, random_crop, size_of
from trainer.data.augment.standard import CROP
from trainer.random import child_keys

if TYPE_CHECKING:
    from trainer.config import DatasetConfig
    from trainer.config.augmentation import Dino
    from trainer.data.source import Sample
    from trainer.random import SampleRandom
    from trainer.task import Batch

LARGE, SMALL = 120, 121  # streams of a sample's numbers: one key a view


class MultiCrop:
    """Gives `image` [N, 2, 3, S, S], the two large views, and `local` [N, V, 3, s, s], the small ones, where there are any."""

    lazy = True
    num_classes: int | None = None

    def __init__(self, cfg: Dino, dataset: DatasetConfig) -> None:
        self.cfg, self.size = cfg, dataset.image_size
        self.mean, self.std = dataset.mean, dataset.std

    def sample(self, sample: Sample, random: SampleRandom) -> dict[str, Any]:
        cfg, draw = self.cfg, random.stream(CROP)
        assert cfg.crop_scale is not None
        width, height = size_of(sample["image"])
        large = [Cut(random_crop(width, height, cfg.crop_scale, cfg.crop_ratio, draw), self.size) for _ in range(2)]
        small = [Cut(random_crop(width, height, cfg.local_scale, cfg.crop_ratio, draw), cfg.local_size) for _ in range(cfg.local_crops)]
        # Decoded once, at the smallest scale that leaves every view its pixels.
        image, scale = decoded(sample["image"], min(cut.magnification for cut in (*large, *small)))
        views = {name: value for name, value in sample.items() if name not in SPATIAL}
        for name, cuts in (("image", large), ("local", small)):
            if cuts:
                views[name] = torch.stack([cut.at(scale).resized(image, bicubic=cfg.interpolation == "bicubic") for cut in cuts])
        return views

    def batch(self, batch: Batch) -> Batch:
        cfg, keys = self.cfg, batch["key"]
        first = torch.arange(2, device=keys.device).expand(len(keys), 2) == 0  # [N, 2]: the first large view, the second
        blur, solarise = (torch.where(first, p[0], p[1]) for p in (cfg.blur, cfg.solarize))
        batch["image"] = self._changed(batch["image"], child_keys(keys, LARGE, 2), blur, solarise)
        if "local" in batch:
            small = child_keys(keys, SMALL, cfg.local_crops)
            blur, solarise = (torch.full(small.shape, p[2], device=keys.device) for p in (cfg.blur, cfg.solarize))
            batch["local"] = self._changed(batch["local"], small, blur, solarise)
        return batch

    def _changed(self, views: Tensor, keys: Tensor, blur: Tensor, solarise: Tensor) -> Tensor:
        """Flip, colour and normalise views [N, V, 3, S, S], each by its own key and probabilities, [N, V] all three."""
        cfg = self.cfg
        keys, blur, solarise = keys.flatten(), blur.flatten(), solarise.flatten()
        images = mixing.flip(views.flatten(0, 1), keys, cfg.hflip).float() / 255
        if cfg.color_jitter:
            images = colour.jitter(images, keys, cfg.color_jitter, cfg.color_jitter_probability)
        images = colour.grey(images, keys, cfg.grayscale)
        images = colour.random_blur(images, keys, blur)
        images = colour.random_solarise(images, keys, solarise)
        return mixing.normalise(images, self.mean, self.std).view_as(views)
