"""Residual networks for small images: a stem that keeps their size, and stages that halve it. Know nothing of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions around a shortcut (arXiv:1512.03385, fig. 5); where it halves the image, the shortcut is averaged
    (arXiv:1812.01187, sec. 4.2, ResNet-D)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            pool = [nn.AvgPool2d(stride, ceil_mode=True)] if stride > 1 else []
            self.shortcut = nn.Sequential(*pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(y)) + self.shortcut(x))


class Staged(nn.Module):
    """Logits [N, num_classes] of images [N, C, H, W] of any size; pooled features [N, D] with `num_classes=0`."""

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], fc: nn.Module, num_features: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.num_features = num_features
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, [N, D, h, w]."""
        return self.stages(self.stem(x))

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the last map; with `pre_logits` what they are made of, [N, D]. Both as timm's networks have them."""
        features = torch.mean(maps, dim=(2, 3))
        return features if pre_logits else self.fc(features)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer decay, or stages, as timm's networks tell them."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}


class SmallResNet(Staged):
    """Stages of residual blocks; the first block of each halves the image."""

    def __init__(self, *, num_classes: int, in_channels: int, stem: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        first = convolution(in_channels, stem)
        stages: list[nn.Module] = []
        inputs = stem
        for width, count in zip(widths, blocks, strict=True):
            parts = [Block(inputs if i == 0 else width, width, 2 if i == 0 else 1) for i in range(count)]
            stages.append(nn.Sequential(*parts))
            inputs = width
        super().__init__(first, stages, nn.Linear(inputs, num_classes) if num_classes else nn.Identity(), inputs)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(part, Block):
                nn.init.zeros_(part.norm2.weight)  # each block begins as its shortcut (arXiv:1706.02677, sec. 5.1)


class Residual(nn.Module):
    """x and what two convolutions make of it; nothing follows the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = convolution(width, width), convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class ResNet9(Staged):
    """The nine-layer network that learned CIFAR-10 fastest in DAWNBench (D. Page, "How to train your ResNet", 2018), at any width.

    Each stage is a convolution, a maximum over 2 x 2 pixels and, by `blocks`, residual pairs of convolutions. Features are the
    maximum over the last map, and logits an eighth of what the classifier makes of them, as there.
    """

    def __init__(self, *, num_classes: int, in_channels: int, stem: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        inputs = [stem, *widths]
        stages = [
            nn.Sequential(convolution(inputs[i], width, pool=True), *(Residual(width) for _ in range(count)))
            for i, (width, count) in enumerate(zip(widths, blocks, strict=True))
        ]
        fc = nn.Linear(inputs[-1], num_classes, bias=False) if num_classes else nn.Identity()
        super().__init__(convolution(in_channels, stem), stages, fc, inputs[-1])

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """As of every `Staged`."""
        features = torch.amax(maps, dim=(2, 3))
        return features if pre_logits or isinstance(self.fc, nn.Identity) else 0.125 * self.fc(features)


def convolution(inputs: int, outputs: int, *, pool: bool = False) -> nn.Sequential:
    """3 x 3, normalised and cut off at zero; with `pool` half as large, the odd row and column kept."""
    pooled = [nn.MaxPool2d(2, ceil_mode=True)] if pool else []
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), *pooled, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
