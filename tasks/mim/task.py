"""What every method of masked image modelling has: a mask for each image, a loss on what is hidden, judges and pictures.

The methods differ in `fill_in` alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tasks.mim import masks
from tasks.mim.config import MimConfig
from tasks.mim.pixels import scale_of, to_images, to_patches
from trainer.probe import pooled_features
from trainer.task import Batch, Progress, StepOutput, Task

if TYPE_CHECKING:
    from tasks.mim.evaluation import Judge
    from trainer.config import ModelConfig

UNUSED = ("head", "head_dist", "fc_norm", "attn_pool")  # what timm's networks have behind their features


@dataclass
class Filled:
    """Some images with their holes filled."""

    losses: Tensor  # [N] float32, mean over what is hidden of each image
    hidden: Tensor  # bool [N, H, W]
    images: Tensor  # [N, C, H, W] normalised as the input, visible pixels as they were; detached


class Mim(Task):
    """Hide, fill in, compare. Images are square, patches and units of the mask too."""

    def __init__(self, model: nn.Module, cfg: MimConfig, *, patch: int, image_size: int, channels: int, fresh: bool = True) -> None:
        super().__init__()
        self.model = model
        self.cfg = cfg
        self.patch, self.channels = patch, channels
        self.unit = cfg.unit(patch, image_size)  # pixels
        self.units = (image_size // self.unit, image_size // self.unit)
        self.grid = (image_size // patch, image_size // patch)
        self.factor = self.unit // patch  # patches along a unit's side
        self.num_visible = cfg.num_visible(self.units[0] * self.units[1])  # units
        self.mean: Sequence[float] = (0.0,)
        self.std: Sequence[float] = (1.0,)
        self.num_classes = 0  # 0: no labels to judge by
        for name in UNUSED:  # DDP would wait for gradients that never come
            if isinstance(part := getattr(model, name, None), nn.Module):
                part.requires_grad_(False)

    @staticmethod
    @abstractmethod
    def patch_of(model: nn.Module, cfg: ModelConfig) -> int:
        """Side of a patch of this network in pixels. Raises ConfigError where the method cannot use the network."""

    @abstractmethod
    def losses(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Fill in what lies behind the first `num_visible` units of `order` [N, units].

        Returns:
            Loss of each image, float32 [N], and the prediction as the method makes it.
        """

    @abstractmethod
    def laid_out(self, predicted: Tensor, order: Tensor) -> Tensor:
        """The method's prediction as patches, [N, L, P]; what stands where a patch is visible has no meaning."""

    def order(self, keys: Tensor) -> Tensor:
        """[N, units], the visible ones first."""
        return masks.visible_first(keys, self.units, self.cfg.mask)

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        losses, _ = self.losses(batch["image"], self.order(batch["key"]))
        return StepOutput(losses.mean())

    @torch.no_grad()
    def fill_in(self, images: Tensor, keys: Tensor) -> Filled:
        order = self.order(keys)
        losses, predicted = self.losses(images, order)
        hidden = masks.hidden(order, self.num_visible)
        patches, guesses = to_patches(images, self.patch).float(), self.laid_out(predicted, order).float()
        if self.cfg.normalizes:
            mean, std = scale_of(patches)
            guesses = guesses * std + mean
        in_patches = masks.enlarged(hidden, self.units, self.factor).flatten(1).unsqueeze(2)  # [N, L, 1]
        filled = to_images(guesses.where(in_patches, patches), self.patch, self.grid)
        return Filled(losses, masks.enlarged(hidden, self.units, self.unit), filled)

    def target(self, images: Tensor) -> Tensor:
        """What is to be predicted, float32 [N, L, P]."""
        patches = to_patches(images, self.patch).float()
        if self.cfg.normalizes:
            mean, std = scale_of(patches)
            patches = (patches - mean) / std
        return patches

    def features(self, images: Tensor) -> Tensor:
        return pooled_features(self.model, images)

    def evaluator(self) -> Judge:
        from tasks.mim.evaluation import Judge, LabelledJudge

        return LabelledJudge(self) if self.num_classes else Judge(self)

    def compiled_parts(self) -> list[nn.Module]:
        return list(_blocks(self))


def _blocks(task: nn.Module) -> Iterator[nn.Module]:
    """Repeated parts: the network's own forward is never called in training."""
    for network in task.children():
        for name in ("blocks", "layers", "stages"):
            if isinstance(parts := getattr(network, name, None), nn.Sequential | nn.ModuleList):
                yield from parts
