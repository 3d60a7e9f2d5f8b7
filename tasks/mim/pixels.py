"""Images as patches and back, and what a person wants to see of a reconstruction. Knows no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 96  # side in pixels below which a picture is magnified


def to_patches(images: Tensor, patch: int) -> Tensor:
    """[N, C, H, W] -> [N, L, patch * patch * C], each patch row by row with its channels last, as MAE lays them out."""
    n, c, h, w = images.shape
    cut = images.view(n, c, h // patch, patch, w // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch * patch * c)


def to_images(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `to_patches`."""
    h, w = grid
    cut = patches.view(patches.shape[0], h, w, patch, patch, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, h * patch, w * patch)


def scale_of(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, [..., 1] each (arXiv:2111.06377, sec. 3, "reconstruction target")."""
    mean = patches.mean(-1, keepdim=True)
    return mean, (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def triptych(image: Tensor, mask: Tensor, filled: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Input, what the network saw of it, and what it made of that, side by side, a row for each image.

    Args:
        image, filled: normalised [N, C, H, W].
        mask: bool [N, H, W], True where hidden.

    Returns:
        uint8 [3, rows, columns].
    """
    seen = image.masked_fill(mask.unsqueeze(1), 0.0)
    pictures = torch.stack([image, seen, filled], dim=1).float()  # [N, 3, C, H, W]
    channels = pictures.shape[2]
    m, s = (pictures.new_tensor([v[c % len(v)] for c in range(channels)]).view(-1, 1, 1) for v in (mean, std))
    pictures = (pictures * s + m).clamp(0, 1)
    pictures[:, 1] = pictures[:, 1].where(~mask.unsqueeze(1), 0.5)
    pictures = pictures[:, :, :3] if channels >= 3 else pictures[:, :, :1].expand(-1, -1, 3, -1, -1)
    zoom = max(1, LEAST // pictures.shape[-1])  # by a whole number: pixels stay square
    pictures = pictures.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)
    pictures = torch.nn.functional.pad(pictures, (1, 1, 1, 1), value=1.0)
    page = pictures.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # [3, N * (H + 2), 3 * (W + 2)]
    return (page * 255).round().to(torch.uint8)
