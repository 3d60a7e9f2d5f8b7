"""A residual network for small images: a stem that keeps their size, and stages that halve it. Knows nothing of training."""

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


class SmallResNet(nn.Module):
    """Logits [N, num_classes] of images [N, C, H, W] of any size; pooled features [N, D] with `num_classes=0`."""

    def __init__(self, *, num_classes: int, in_channels: int, stem: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True))
        stages: list[nn.Module] = []
        inputs = stem
        for width, count in zip(widths, blocks, strict=True):
            parts = [Block(inputs if i == 0 else width, width, 2 if i == 0 else 1) for i in range(count)]
            stages.append(nn.Sequential(*parts))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.num_features = inputs
        self.fc: nn.Module = nn.Linear(inputs, num_classes) if num_classes else nn.Identity()
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(part, Block):
                nn.init.zeros_(part.norm2.weight)  # each block begins as its shortcut (arXiv:1706.02677, sec. 5.1)

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
