"""Which parts of an image are hidden. A function of the sample's own key, so that ranks, workers and batches change nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.random import uniform

UNITS, BLOCKS = 200, 201  # streams of a sample's numbers
_RECTANGLES = 32  # candidates for a block-wise mask; far more than it takes
_AREA = (0.04, 0.3)  # of the image that a rectangle covers
_ASPECT = 0.3  # of a rectangle, up to its inverse (arXiv:2106.08254, alg. 1)


def visible_first(keys: Tensor, grid: tuple[int, int], kind: str) -> Tensor:
    """An order of the units of a grid, int64 [N, H * W], of which the first stay visible and the last are hidden.

    Args:
        keys: int64 [N].
        kind: "random", every unit alike; or "block", rectangles one over the other.
    """
    noise = uniform(keys, UNITS, grid[0] * grid[1])  # [N, L]
    return (noise if kind == "random" else _block_order(keys, noise, grid)).argsort(dim=1, stable=True)


def hidden(order: Tensor, num_visible: int) -> Tensor:
    """bool [N, L]: which units of `order` lie behind the first `num_visible`."""
    mask = torch.ones(order.shape, dtype=torch.bool, device=order.device)
    return mask.scatter_(1, order[:, :num_visible], False)


def enlarged(mask: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """The mask of a grid `factor` times as fine: [N, H * W] -> [N, factor * H, factor * W]."""
    return mask.view(-1, *grid).repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def in_patches(order: Tensor, units: tuple[int, int], factor: int) -> Tensor:
    """The same order, every unit replaced by its factor x factor patches: [N, L] -> [N, L * factor**2]."""
    if factor == 1:
        return order
    row, column = order // units[1], order % units[1]
    step = torch.arange(factor, device=order.device)
    rows, columns = (row.unsqueeze(2) * factor + step).unsqueeze(3), (column.unsqueeze(2) * factor + step).unsqueeze(2)
    return (rows * (units[1] * factor) + columns).flatten(1)


def _block_order(keys: Tensor, noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """A number for each unit: the lower, the later it is hidden. Rectangles are laid down one by one (arXiv:2106.08254, alg. 1) and
    the units of an earlier one are hidden earlier, so that a mask of any exact size is a union of rectangles, the last one cut."""
    height, width = grid
    area, aspect, y, x = uniform(keys, BLOCKS, 4 * _RECTANGLES).view(-1, 4, _RECTANGLES).unbind(1)  # [N, K] each
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * height * width
    ratio = ((2 * aspect - 1) * -math.log(_ASPECT)).exp()
    h = (area * ratio).sqrt().round().clamp(1, height)
    w = (area / ratio).sqrt().round().clamp(1, width)
    rows = _inside(y, h, height).unsqueeze(3)  # [N, K, H, 1]
    columns = _inside(x, w, width).unsqueeze(2)  # [N, K, 1, W]
    covered = (rows & columns).flatten(2)  # [N, K, L]
    first = covered.int().argmax(1).float().where(covered.any(1), float(_RECTANGLES))  # [N, L] the rectangle that hides a unit
    # Within one rectangle by rows; what no rectangle covers goes last, at random.
    place = torch.arange(height * width, device=keys.device) / (height * width)
    return -(first + noise.where(first == _RECTANGLES, place))


def _inside(start: Tensor, extent: Tensor, length: int) -> Tensor:
    """bool [N, K, length]: the places of a stretch of `extent` at a fraction `start` of where it fits."""
    begin = (start * (length - extent + 1)).floor().unsqueeze(2)
    place = torch.arange(length, device=start.device)
    return (place >= begin) & (place < begin + extent.unsqueeze(2))
