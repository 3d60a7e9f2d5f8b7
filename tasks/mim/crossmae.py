"""CrossMAE (arXiv:2401.14391): MAE's encoder, and a decoder in which each hidden patch asks the visible ones and no other.

As no hidden patch hears of another, only some of them need to be predicted in a step (its sec. 3.3), which makes the decoder cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tasks.mim.config import MimConfig
from tasks.mim.mae import Mae, like_mae
from tasks.mim.positions import sine_cosine


class CrossMae(Mae):
    def __init__(self, model: nn.Module, cfg: MimConfig, *, patch: int, image_size: int, channels: int, fresh: bool = True) -> None:
        super().__init__(model, cfg, patch=patch, image_size=image_size, channels=channels, fresh=fresh)
        num_patches = self.grid[0] * self.grid[1]
        self.num_hidden = num_patches - self.num_visible * self.factor**2
        self.num_predicted = cfg.num_predicted(num_patches, self.num_hidden)
        # The decoder looks at every block's output through a norm of its own, so the encoder's last norm has no part in this.
        vit: Any = model
        vit.norm.requires_grad_(False)

    def _decoder(self, dim: int, depth: int, heads: int, outputs: int) -> nn.Module:
        vit: Any = self.model
        return CrossDecoder(int(vit.embed_dim), len(vit.blocks) + 1, dim, depth, heads, self.grid, outputs)

    def losses(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Over some hidden patches in training, over all of them in validation."""
        order, shown = self._in_patches(order)
        count = self.num_predicted if self.training else self.num_hidden
        # Spread over the order: where masks are rectangles, its beginning is the last of them.
        picked = order[:, shown:][:, torch.arange(count, device=order.device) * self.num_hidden // count]  # [N, P]
        predicted = self.decoder(self.maps(images, order[:, :shown]), picked)
        target = self.target(images).take_along_dim(picked.unsqueeze(2), 1)
        return (predicted.float() - target).square().mean((1, 2)), predicted

    def maps(self, images: Tensor, visible: Tensor) -> list[Tensor]:
        """The tokens of the prefix and of the visible patches before the first block and after each, [N, prefix + V, D] each."""
        vit: Any = self.model
        maps = [self.embed(images, visible)]
        for block in vit.blocks:
            if vit.grad_checkpointing:
                from timm.models import checkpoint_seq

                maps.append(checkpoint_seq([block], maps[-1]))
            else:
                maps.append(block(maps[-1]))
        return maps


class CrossDecoder(nn.Module):
    """Blocks of cross-attention, each over a mixture of its own of the encoder's maps (CrossMAE, sec. 3.4)."""

    positions: Tensor

    def __init__(self, width: int, num_maps: int, dim: int, depth: int, heads: int, grid: tuple[int, int], outputs: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sine_cosine(dim, grid, prefix=0), persistent=False)  # [1, L, dim]
        self.mixture = nn.Parameter(torch.empty(depth, num_maps))
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=1e-6) for _ in range(depth)])
        self.blocks = nn.ModuleList([CrossBlock(width, dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, outputs)
        self.apply(like_mae)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.mixture, std=num_maps**-0.5)

    def forward(self, maps: Sequence[Tensor], asked: Tensor) -> Tensor:
        """Predictions for the patches `asked`, int64 [N, P]: [N, P, outputs]."""
        seen = torch.tensordot(self.mixture, torch.stack(list(maps)), dims=1)  # [depth, N, prefix + V, width]
        tokens = self.mask_token + self.positions.expand(len(asked), -1, -1).take_along_dim(asked.unsqueeze(2), 1)
        for block, norm, part in zip(self.blocks, self.norms, seen, strict=True):
            tokens = block(tokens, norm(part))
        return self.predict(self.norm(tokens))


class CrossBlock(nn.Module):
    """A transformer's block whose tokens attend to other tokens than themselves."""

    def __init__(self, width: int, dim: int, heads: int) -> None:
        from timm.layers import Mlp

        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.MultiheadAttention(dim, heads, kdim=width, vdim=width, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """`tokens`: [N, P, dim]; `seen`: [N, T, width]."""
        tokens = tokens + self.attn(self.norm1(tokens), seen, seen, need_weights=False)[0]
        return tokens + self.mlp(self.norm2(tokens))
