"""The pyramid of a plain vision transformer: maps of every stride out of its last one (ViTDet, arXiv:2203.16527, sec. 3)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock


class SimplePyramid(nn.Module):
    """Deconvolutions for finer maps, pooling for coarser ones; then 1 x 1 and 3 x 3 convolutions, each with a layer norm.

    Args:
        stride: of the one map there is.
        strides: of the maps to be made, powers of two apart from it.
    """

    def __init__(self, channels: int, stride: int, strides: Sequence[int], width: int, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.scales = nn.ModuleList(scale(channels, stride / s, width) for s in strides)
        self.extra = extra

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        last = next(iter(maps.values()))  # [N, C, H / stride, W / stride]
        results = [s(last) for s in self.scales]
        names = [str(i) for i in range(len(results))]
        results, names = self.extra(results, [last], names)
        return OrderedDict(zip(names, results))


def scale(channels: int, factor: float, width: int) -> nn.Sequential:
    """[N, channels, H, W] -> [N, width, H * factor, W * factor]."""
    layers: list[nn.Module] = []
    times = round(math.log2(factor))
    for i in range(times):  # each doubles the map and halves its channels
        layers += [nn.ConvTranspose2d(channels, channels // 2, 2, 2)]
        channels //= 2
        if i < times - 1:
            layers += [LayerNorm2d(channels), nn.GELU()]
    if times < 0:
        layers.append(nn.MaxPool2d(2**-times, 2**-times))
    layers += [
        nn.Conv2d(channels, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    ]
    return nn.Sequential(*layers)
