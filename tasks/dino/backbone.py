"""timm's networks as backbones for views of several sizes. Knows networks, not what they learn."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from trainer.config import ModelConfig, RunConfig
from trainer.errors import ConfigError, Problem


def build_backbone(run: RunConfig, channels: int) -> tuple[nn.Module, int]:
    """A network that ends in pooled features [N, D] for each size of view, and D."""
    large = run.dataset.image_size
    small = getattr(run.augmentation, "local_size", large) if getattr(run.augmentation, "local_crops", 0) else large
    backbone = _build(run.model, large, channels)
    # A transformer's position embedding is for one size, unless it is told that there are several: then it is resampled.
    if small != large and getattr(backbone, "dynamic_img_size", None) is False:
        args = {**run.model.args, "dynamic_img_size": True}
        backbone = _build(dataclasses.replace(run.model, args=args), large, channels)
    in_channels = run.model.in_channels or channels
    width = _width(backbone, in_channels, large)
    try:
        _width(backbone, in_channels, small)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = f"model.name={run.model.name} cannot take views of {small} beside {large} pixels: {str(error).splitlines()[0]}"
        fix = f"augmentation.local_size={large}, or a ViT or a convnet, which can"
        raise ConfigError(Problem("augmentation.local_size", small, reason, fix)) from error
    return backbone, width


def _build(cfg: ModelConfig, size: int, channels: int) -> nn.Module:
    return cfg.build(num_classes=0, image_size=size, in_channels=channels)


@torch.no_grad()
def _width(backbone: nn.Module, channels: int, size: int) -> int:
    """Features of an image of that size."""
    backbone.eval()
    width = backbone(torch.zeros(1, channels, size, size)).shape[-1]
    backbone.train()
    return width
