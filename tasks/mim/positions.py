"""Fixed position embeddings of a grid of patches: sines and cosines of both coordinates."""

from __future__ import annotations

import torch
from torch import Tensor


def sine_cosine(dim: int, grid: tuple[int, int], prefix: int) -> Tensor:
    """float32 [1, prefix + H * W, dim]: one half of the width for the column, one for the row, each half sines then cosines of
    place / 10000^(2i / (dim / 2)) (arXiv:1706.03762, sec. 3.5; the order of MAE's weights); zeros for the prefix tokens."""
    assert dim % 4 == 0, f"a width of {dim} is no multiple of 4"
    rate = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    row, column = (axis.flatten().outer(rate) for axis in torch.meshgrid(rows, columns, indexing="ij"))  # [L, dim / 4]
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)  # [L, dim]
    return torch.cat([table.new_zeros(prefix, dim), table]).float().unsqueeze(0)
