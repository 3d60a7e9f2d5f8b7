"""Finer maps out of torchvision's networks: the last strides become dilations of what follows, so that every weight still sees
what it saw (arXiv:1706.05587, sec. 3.1). timm's networks have an `output_stride` of their own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError, Problem

PROBE = 128  # pixels of the image that is sent through to find where a network halves its maps


def parts_in_order(net: nn.Module) -> OrderedDict[str, nn.Module] | None:
    """What lies between image and last map, part after part; None where the network is no such chain."""
    if isinstance(features := getattr(net, "features", None), nn.Sequential):
        return OrderedDict(features.named_children())
    if hasattr(net, "layer4"):
        return OrderedDict((name, part) for name, part in net.named_children() if name not in ("avgpool", "fc"))
    if hasattr(net, "trunk_output"):  # RegNet
        return OrderedDict([("stem", cast(nn.Module, net.stem)), *cast(nn.Module, net.trunk_output).named_children()])
    return None


@torch.no_grad()
def probed(parts: Iterable[nn.Module], in_channels: int, *, channels_last: bool = False) -> list[tuple[int, int]]:
    """(stride, channels) of the map after each part, found with one small image."""
    found, x = [], torch.zeros(1, in_channels, PROBE, PROBE)
    for part in parts:
        training = part.training
        x = part.eval()(x)
        part.train(training)
        side, channels = (x.shape[1], x.shape[3]) if channels_last else (x.shape[2], x.shape[1])
        found.append((PROBE // side, channels))
    return found


def dilate(net: nn.Module, output_stride: int, *, name: str, in_channels: int) -> None:
    """Make the last map of `net` as fine as `output_stride` pixels a place. Raises ConfigError where it cannot be."""
    parts = list((parts_in_order(net) or {}).values())
    spread = 1  # how far apart the weights of a convolution have to be from here on
    for part, (stride, _) in zip(parts, probed(parts, in_channels), strict=True):
        for conv in (m for m in part.modules() if isinstance(m, nn.Conv2d)):
            step, strided, wide = max(conv.stride), stride > output_stride and max(conv.stride) > 1, max(conv.kernel_size) > 1
            if strided:
                conv.stride = (1, 1)
            if wide and (strided or spread > 1):
                _spread_out(conv, spread)
            if strided and wide:  # a shortcut's 1 x 1 runs beside one that counted already
                spread *= step
    reached = probed(parts, in_channels)[-1][0] if parts else 0
    if reached != output_stride:
        reason = f"{name} cannot have maps of this stride" + (
            f"; it would come to {reached}" if reached else ": it is no chain of convolutions"
        )
        fix = f"+model.args.output_stride={reached}" if reached else "leave model.args.output_stride out"
        raise ConfigError(Problem("model.args.output_stride", output_stride, reason, fix))


def _spread_out(conv: nn.Conv2d, dilation: int) -> None:
    """Weights `dilation` places apart, on a map that keeps its size."""
    conv.dilation = (conv.dilation[0] * dilation, conv.dilation[1] * dilation)
    across = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if all(n % 2 == 0 for n in across):
        conv.padding = (across[0] // 2, across[1] // 2)
    else:  # an even kernel has no middle: one more place to the right and below, as in timm
        y, x = across
        conv.padding = (0, 0)
        conv.register_forward_pre_hook(partial(_padded, pad=(x // 2, x - x // 2, y // 2, y - y // 2)))


def _padded(_: nn.Module, inputs: tuple[Tensor], *, pad: tuple[int, int, int, int]) -> tuple[Tensor]:
    return (F.pad(inputs[0], pad),)


class LastMap(nn.Module):
    """A chain of parts under torchvision's names, as a network that ends in a map.

    Attributes:
        num_features: channels of the map.
    """

    def __init__(self, parts: OrderedDict[str, nn.Module], in_channels: int) -> None:
        super().__init__()
        self.num_features = probed(parts.values(), in_channels)[-1][1]
        for name, part in parts.items():
            self.add_module(name, part)

    def forward_features(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D, h, w]."""
        for part in self.children():
            images = part(images)
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [N, D]."""
        return self.forward_features(images).mean((2, 3))
