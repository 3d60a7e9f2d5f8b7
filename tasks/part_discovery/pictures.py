"""Part maps drawn over their images."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OPACITY = 0.5
LARGEST, SMALLEST = 256, 128  # pixels a side of one image in the picture


def colours(count: int) -> Tensor:
    """A colour for each part, far from one another, [count, 3] in [0, 1]; the background, last, has none: [count + 1, 3]."""
    golden = 0.618034  # of the circle of hues: every new one falls into the widest gap
    rows = [colorsys.hsv_to_rgb((i * golden) % 1, 0.9 - 0.3 * (i % 2), 1.0) for i in range(count)]
    return torch.tensor([*rows, (0.0, 0.0, 0.0)])


def overlay(images: Tensor, maps: Tensor) -> Tensor:
    """Images [N, 3, S, S] in [0, 1], each place in the colour of its likeliest part; the background stays as it is."""
    parts = maps.shape[1] - 1
    owner = F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False).argmax(1)  # [N, S, S]
    painted = colours(parts).to(images)[owner].permute(0, 3, 1, 2)
    return torch.where((owner == parts).unsqueeze(1), images, (1 - OPACITY) * images + OPACITY * painted)


def sheet(images: Tensor, maps: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Every image beside itself with its parts, in a grid, uint8 [3, H, W]. `images` [N, C, S, S] are normalised."""
    channels = images.shape[1]
    centre, scale = (torch.tensor(v, dtype=torch.float32).expand(channels).view(1, -1, 1, 1) for v in (mean, std))
    shown = (images.float() * scale + centre).clamp(0, 1)
    shown = shown[:, :3] if channels >= 3 else shown[:, :1].expand(-1, 3, -1, -1)
    side = min(max(images.shape[-1], SMALLEST), LARGEST)
    shown = F.interpolate(shown, size=(side, side), mode="bilinear", antialias=True)
    pairs = torch.cat([shown, overlay(shown, maps.float())], dim=3)  # [N, 3, side, 2 side]
    columns = math.ceil(math.sqrt(len(pairs) / 2))
    blank = pairs.new_zeros(-len(pairs) % columns, *pairs.shape[1:])
    rows = torch.cat([pairs, blank]).unflatten(0, (-1, columns))  # [rows, columns, 3, side, 2 side]
    return (rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2) * 255).round().to(torch.uint8)
