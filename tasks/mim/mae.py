"""MAE (arXiv:2111.06377): the encoder sees the visible patches alone, a light decoder the tokens of all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tasks.mim import masks
from tasks.mim.config import MimConfig, no_transformer
from tasks.mim.positions import sine_cosine
from tasks.mim.task import Mim
from trainer.errors import ConfigError, Problem

if TYPE_CHECKING:
    from trainer.config import ModelConfig


class Mae(Mim):
    def __init__(self, model: nn.Module, cfg: MimConfig, *, patch: int, image_size: int, channels: int, fresh: bool = True) -> None:
        super().__init__(model, cfg, patch=patch, image_size=image_size, channels=channels, fresh=fresh)
        vit: Any = model
        width = int(vit.embed_dim)
        self.prefix = int(vit.num_prefix_tokens)  # class token, registers
        dim, depth, heads = cfg.decoder_size(width, len(vit.blocks))
        if dim % heads or dim % 4:
            reason = f"a width of {dim} is to be a multiple of 4 and of {heads} heads"
            raise ConfigError(
                Problem("task.decoder_dim", dim, reason, f"task.decoder_dim={-(-dim // math.lcm(4, heads)) * math.lcm(4, heads)}")
            )
        self.decoder = self._decoder(dim, depth, heads, outputs=patch * patch * channels)
        if fresh:
            _initialise(vit, self.grid)

    def _decoder(self, dim: int, depth: int, heads: int, outputs: int) -> nn.Module:
        return Decoder(int(self.model.embed_dim), dim, depth, heads, self.grid, self.prefix, outputs)  # type: ignore[arg-type]  # an nn.Module's attribute to the checker

    @staticmethod
    def patch_of(model: nn.Module, cfg: ModelConfig) -> int:
        from timm.models.vision_transformer import VisionTransformer

        # A network that goes another way through its blocks than a plain ViT would not be shown what is meant here.
        if not isinstance(model, VisionTransformer) or type(model).forward_features is not VisionTransformer.forward_features:
            raise ConfigError(no_transformer(cfg.name, patches=hasattr(model, "patch_embed")))
        return int(model.patch_embed.patch_size[0])

    def losses(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        order, shown = self._in_patches(order)
        predicted = self.decoder(self.encode(images, order[:, :shown]), order, shown)  # [N, L - V, P]
        target = self.target(images).take_along_dim(order[:, shown:].unsqueeze(2), 1)
        # Every image hides as many patches, so a mean of means is the mean over all hidden patches.
        return (predicted.float() - target).square().mean((1, 2)), predicted

    def laid_out(self, predicted: Tensor, order: Tensor) -> Tensor:
        order, shown = self._in_patches(order)
        everywhere = predicted.new_zeros(len(order), order.shape[1], predicted.shape[2])
        return everywhere.scatter(1, order[:, shown:].unsqueeze(2).expand_as(predicted), predicted)

    def _in_patches(self, order: Tensor) -> tuple[Tensor, int]:
        """The order of patches, [N, L], and how many of them are visible."""
        return masks.in_patches(order, self.units, self.factor), self.num_visible * self.factor**2

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Tokens of the prefix and of the visible patches, [N, prefix + V, D]. `visible`: int64 [N, V]."""
        vit: Any = self.model
        tokens = self.embed(images, visible)
        if vit.grad_checkpointing:
            from timm.models import checkpoint_seq

            return vit.norm(checkpoint_seq(vit.blocks, tokens))
        return vit.norm(vit.blocks(tokens))

    def embed(self, images: Tensor, visible: Tensor) -> Tensor:
        """What the encoder's first block is given, [N, prefix + V, D]."""
        vit: Any = self.model
        tokens = vit._pos_embed(vit.patch_embed(images))  # [N, prefix + L, D]
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        return vit.norm_pre(torch.cat([prefix, patches.take_along_dim(visible.unsqueeze(2), 1)], 1))

    def features(self, images: Tensor) -> Tensor:
        """The mean over patches: the class token is trained by nobody (arXiv:2111.06377, app. A.1)."""
        vit: Any = self.model
        return vit.forward_features(images)[:, self.prefix :].mean(1)


class Decoder(nn.Module):
    """A narrow ViT over all tokens, a learned one in the place of each hidden patch."""

    positions: Tensor

    def __init__(self, width: int, dim: int, depth: int, heads: int, grid: tuple[int, int], prefix: int, outputs: int) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        self.prefix = prefix
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sine_cosine(dim, grid, prefix), persistent=False)  # [1, prefix + L, dim]
        norm: Any = lambda dim, **rest: nn.LayerNorm(dim, eps=1e-6, **rest)  # noqa: E731
        self.blocks = nn.ModuleList([Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, outputs)
        self.apply(like_mae)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, order: Tensor, num_visible: int) -> Tensor:
        """Predictions for the hidden patches in the order they have in `order`, [N, L - V, outputs]."""
        tokens = self.embed(encoded)
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        gaps = self.mask_token.to(tokens.dtype).expand(len(tokens), order.shape[1] - num_visible, -1)
        # Attention knows no order: tokens stay as they are shuffled, each with the position it comes from.
        places = self.positions[:, self.prefix :].expand(len(tokens), -1, -1).take_along_dim(order.unsqueeze(2), 1)
        tokens = torch.cat([prefix + self.positions[:, : self.prefix], torch.cat([patches, gaps], 1) + places], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.predict(self.norm(tokens[:, self.prefix + num_visible :]))


def _initialise(vit: Any, grid: tuple[int, int]) -> None:
    """Weights as MAE begins with them (its app. A.1: xavier_uniform), positions fixed."""
    vit.apply(like_mae)
    projection = vit.patch_embed.proj.weight  # [D, C, p, p]
    nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
    for name in ("cls_token", "reg_token"):
        if isinstance(token := getattr(vit, name, None), nn.Parameter):
            nn.init.normal_(token, std=0.02)
    if isinstance(vit.pos_embed, nn.Parameter):
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        vit.pos_embed.data.copy_(sine_cosine(vit.embed_dim, grid, prefix))
        vit.pos_embed.requires_grad_(False)


def like_mae(part: nn.Module) -> None:
    if isinstance(part, nn.Linear):
        nn.init.xavier_uniform_(part.weight)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
