"""From a config to a task: a backbone that takes every size of view, and the views themselves."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from tasks.dino.config import DinoConfig
from tasks.dino.masks import Masking
from tasks.dino.task import Dino
from trainer.config import RunConfig
from trainer.errors import ConfigError, Problem

if TYPE_CHECKING:
    from trainer.task import DataInfo


def build(cfg: DinoConfig, run: RunConfig, data: DataInfo) -> Dino:
    """The task with fresh weights.

    Raises:
        ConfigError: the network cannot take the views, or has no patches where some are to be hidden.
    """
    backbone, width = build_backbone(run, data.channels)
    # The task's own, as `debug=overfit` would take away the run's: the first batch over and over, but still in several views.
    views = run.augmentation.build(run.dataset, train=True)
    if cfg.parts.patch_weight:
        views = Masking(views, _grid(cfg, run, backbone), probability=cfg.mask_probability, ratio=cfg.mask_ratio)
    labelled = "label" in run.dataset.offers
    return Dino(backbone, width, cfg, num_classes=len(data.classes) * labelled, mean=run.dataset.mean, std=run.dataset.std, views=views)


def build_backbone(run: RunConfig, channels: int) -> tuple[nn.Module, int]:
    """A network that ends in pooled features [N, D] for each size of view, and D."""
    large = run.dataset.image_size
    small = getattr(run.augmentation, "local_size", large) if getattr(run.augmentation, "local_crops", 0) else large
    backbone = _network(run, large, channels)
    # A transformer's position embedding is for one size, unless it is told that there are several: then it is resampled.
    if small != large and getattr(backbone, "dynamic_img_size", None) is False:
        backbone = _network(run, large, channels, dynamic_img_size=True)
    in_channels = run.model.in_channels or channels
    width = _width(backbone, in_channels, large)
    try:
        _width(backbone, in_channels, small)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = f"model.name={run.model.name} cannot take views of {small} beside {large} pixels: {str(error).splitlines()[0]}"
        fix = f"augmentation.local_size={large}, or a ViT or a convnet, which can"
        raise ConfigError(Problem("augmentation.local_size", small, reason, fix)) from error
    return backbone, width


def _network(run: RunConfig, size: int, channels: int, **arguments: bool) -> nn.Module:
    cfg = dataclasses.replace(run.model, args={**run.model.args, **arguments})
    return cfg.build(num_classes=0, image_size=size, in_channels=channels)


@torch.no_grad()
def _width(backbone: nn.Module, channels: int, size: int) -> int:
    """Features of an image of that size."""
    backbone.eval()
    width = backbone(torch.zeros(1, channels, size, size)).shape[-1]
    backbone.train()
    return width


def _grid(cfg: DinoConfig, run: RunConfig, backbone: nn.Module) -> tuple[int, int]:
    """Patches of a large view, in height and width."""
    from timm.layers import PatchEmbed

    embed = getattr(backbone, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or not hasattr(backbone, "num_prefix_tokens"):
        reason = f"task.method={cfg.method} hides patches, and {type(backbone).__name__} does not tell its own apart: it takes a ViT"
        raise ConfigError(Problem("model.name", run.model.name, reason, "model=vit_s, or task.method=dino"))
    assert embed.grid_size is not None
    return embed.grid_size
