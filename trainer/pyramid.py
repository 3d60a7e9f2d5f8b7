"""Networks as maps of falling resolution, for tasks that look at places in an image. Knows nothing of those tasks.

A network keeps the parameter names of its library, below `net` (torchvision's: bare), so weights of a classifier, or of a
network that learned without labels, fit.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from trainer import models
from trainer.dilation import PROBE, parts_in_order, probed
from trainer.errors import ConfigError, Problem
from trainer.pretrained import timm_metadata

if TYPE_CHECKING:
    from trainer.config.model import ModelConfig, TimmModel, TorchvisionModel


class Pyramid(nn.Module):
    """A network that ends in maps.

    Attributes:
        channels, strides: of each map.
        plain: all maps would have the stride of the one there is, `strides[0]`: a network of patches.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    plain = False

    def forward(self, images: Tensor) -> list[Tensor]:
        """[N, C, H, W] -> maps [N, channels[i], H / strides[i], W / strides[i]], of images whose sides are multiples of the coarsest stride."""
        raise NotImplementedError

    def depths(self) -> dict[str, int]:
        """How far up each parameter and buffer is: 0 for the stem, then stage by stage (a network of patches: block by block)."""
        raise NotImplementedError

    def layers(self) -> dict[str, int]:
        """The same of the parameters, as finely as the network tells it: timm's networks block by block, torchvision's by stages."""
        depths = self.depths()
        return {name: depths[name] for name, _ in self.named_parameters()}


class TimmPyramid(Pyramid):
    """A network of timm's, by its intermediate maps.

    Args:
        fixed: side in pixels of the images it was built for, where it takes no others: smaller ones are put into a corner.
    """

    def __init__(
        self, net: nn.Module, places: Sequence[int], channels: Sequence[int], strides: Sequence[int], *, fixed: int | None, plain: bool
    ) -> None:
        super().__init__()
        self.net = net
        self.places, self.channels, self.strides = list(places), tuple(channels), tuple(strides)
        self.fixed, self.plain = fixed, plain

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        if self.fixed is not None and (height, width) != (self.fixed, self.fixed):
            images = F.pad(images, (0, self.fixed - width, 0, self.fixed - height))
        maps = cast(Any, self.net).forward_intermediates(images, indices=self.places, intermediates_only=True, output_fmt="NCHW")
        return [m[:, :, : -(-height // s), : -(-width // s)].contiguous() for m, s in zip(maps, self.strides, strict=True)]

    def depths(self) -> dict[str, int]:
        from timm.models import group_parameters

        layers: Any = group_parameters(self.net, cast(Any, self.net).group_matcher(coarse=True), reverse=True)  # name -> layer
        of_module = {name.rpartition(".")[0]: int(layer) for name, layer in layers.items()}
        found = {f"net.{name}": int(layer) for name, layer in layers.items()}
        # Running statistics go with the weights beside them.
        return found | {f"net.{n}": of_module.get(n.rpartition(".")[0], max(found.values())) for n, _ in self.net.named_buffers()}

    def layers(self) -> dict[str, int]:
        return {f"net.{name}": layer for name, layer in layers_of(self.net).items()}


def layers_of(net: nn.Module) -> dict[str, int]:
    """The layer of each parameter, from 0 on, of a network that tells its layers in timm's form (`group_matcher`)."""
    from timm.models import group_parameters

    layers: Any = group_parameters(net, cast(Any, net).group_matcher(coarse=False), reverse=True)  # name -> layer
    return {name: int(layer) for name, layer in layers.items()}


def timm_pyramid(cfg: TimmModel, strides: Sequence[int], *, image_size: int, in_channels: int) -> Pyramid:
    """Maps of the asked strides; of a network of patches, its one map, of which others are to be made."""
    import timm

    if cfg.input_multiple:
        _check_patches(cfg, cfg.input_multiple)
    if ":" in cfg.name:
        metadata = timm_metadata(cfg.name)
    else:
        metadata = timm.models.get_pretrained_cfg(cfg.name) if timm.is_model(cfg.name.partition(".")[0]) else None
    fixed = None
    if metadata is not None and metadata.fixed_input_size:
        fixed = image_size = -(-image_size // 32) * 32
    net = cast(Any, models.build_timm(cfg, num_classes=0, image_size=image_size, in_channels=in_channels))
    if not hasattr(net, "forward_intermediates") or not hasattr(net, "prune_intermediate_layers"):
        raise ConfigError(Problem("model.name", cfg.name, "timm takes no intermediate maps out of this network", "model=resnet50"))
    info = [
        (int(i["num_chs"]), int(i["reduction"]))
        for i in (net.feature_info if isinstance(net.feature_info, list) else net.feature_info.info)
    ]
    found = {stride: place for place, (_, stride) in enumerate(info)}  # the last map of each stride
    plain = len(found) == 1
    if plain:
        places = [len(info) - 1]
        _check_patches(cfg, info[-1][1])
    else:
        places = _places(cfg, strides, found)
    net.prune_intermediate_layers(places, prune_norm=True, prune_head=True)
    return TimmPyramid(net, places, [info[p][0] for p in places], [info[p][1] for p in places], fixed=fixed, plain=plain)


def _places(cfg: ModelConfig, strides: Sequence[int], found: dict[int, int]) -> list[int]:
    missing = [s for s in strides if s not in found]
    if missing:
        reason = (
            f"has maps of stride {', '.join(map(str, sorted(found)))}, and maps of stride {', '.join(map(str, strides))} are needed: every "
            "one half the size of the one before"
        )
        raise ConfigError(Problem("model.name", cfg.name, reason, "model=resnet50, convnext_tiny, mit_b0, …"))
    return [found[s] for s in strides]


def _check_patches(cfg: ModelConfig, patch: int) -> None:
    if math.log2(patch) % 1:
        reason = f"cuts images into patches of {patch} pixels, and the maps' strides must be powers of two"
        raise ConfigError(Problem("model.patch_size", patch, reason, "model.patch_size=16"))


# --- torchvision --------------------------------------------------------------------------------------------------------


class TorchvisionPyramid(Pyramid):
    """The parts of a network of torchvision's, one after the other, under torchvision's names."""

    def __init__(
        self,
        parts: OrderedDict[str, nn.Module],
        ends: Sequence[str],
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        channels_last: bool,
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.ends, self.channels, self.strides, self.nhwc = list(ends), tuple(channels), tuple(strides), channels_last

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        for name, part in self.named_children():
            images = part(images)
            if name in self.ends:
                maps.append(images.permute(0, 3, 1, 2).contiguous() if self.nhwc else images)
        return maps

    def depths(self) -> dict[str, int]:
        order, depth = {}, 0
        for name, part in self.named_children():
            # ResNets keep what comes before their first stage apart; elsewhere a stage is what ends in a map.
            depth += name.startswith("layer")
            order |= dict.fromkeys((f"{name}.{n}" for n in part.state_dict()), depth)
            depth += name in self.ends and not name.startswith("layer")
        return order


def torchvision_pyramid(cfg: TorchvisionModel, strides: Sequence[int], *, image_size: int, in_channels: int) -> Pyramid:
    """Maps of the asked strides out of any of torchvision's networks that goes from part to part."""
    net = models.build_torchvision(cfg, num_classes=0, image_size=max(image_size, PROBE), in_channels=in_channels)
    parts = parts_in_order(net)
    if parts is None:
        reason = "goes from patches to a class without maps in between, or by branches that cannot be followed"
        raise ConfigError(Problem("model.name", cfg.name, reason, "model=timm model.name=<timm's name of it>, or model=resnet50"))
    nhwc = cfg.name.startswith("swin")
    # stride -> last part that has it, channels
    after = zip(parts, probed(parts.values(), cfg.in_channels or in_channels, channels_last=nhwc), strict=True)
    found = {stride: (name, channels) for name, (stride, channels) in after}
    _places(cfg, strides, dict.fromkeys(found, 0))
    last = list(parts).index(found[strides[-1]][0])
    kept = OrderedDict(list(parts.items())[: last + 1])
    chosen = [found[s] for s in strides]
    return TorchvisionPyramid(kept, [name for name, _ in chosen], [c for _, c in chosen], strides, channels_last=nhwc)
