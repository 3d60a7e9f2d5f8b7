"""The projection head: from features to scores of prototypes. It knows neither views nor teachers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """A linear layer without bias whose rows are directions times lengths, w = g v / |v| (arXiv:1602.07868, eq. 2).

    Lengths of 1 that are not trained keep any prototype from taking over (arXiv:2104.14294, app. C).
    """

    def __init__(self, in_dim: int, count: int, *, train_lengths: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=train_lengths)  # [K, 1]
        self.weight_v = nn.Parameter(torch.empty(count, in_dim))  # [K, D]
        bound = in_dim**-0.5  # torch's own start of a linear layer, as the original leaves it
        nn.init.uniform_(self.weight_v, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
        return F.linear(x, weight)


class Head(nn.Module):
    """An MLP into a narrow space, its output on the unit sphere, then prototypes (arXiv:2104.14294, app. C)."""

    def __init__(
        self, in_dim: int, out_dim: int, *, hidden_dim: int, bottleneck_dim: int, layers: int, train_lengths: bool, batch_norm: bool = False
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        parts: list[nn.Module] = []
        for i in range(layers):
            linear = nn.Linear(widths[i], widths[i + 1])
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            parts.append(linear)
            if i < layers - 1:
                parts += [nn.BatchNorm1d(widths[i + 1])] * batch_norm + [nn.GELU()]
        self.mlp = nn.Sequential(*parts)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, train_lengths=train_lengths)

    def forward(self, features: Tensor) -> Tensor:
        """Scores [N, K] of features [N, D]."""
        x = F.normalize(self.mlp(features).float(), dim=-1)  # the norm of half-precision numbers may overflow
        return self.last_layer(x)
