"""Where a ViT looks: how much of its class token's attention in the last block each patch gets. Knows networks and pixels only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def has_attention(network: nn.Module) -> bool:
    """Whether `network` is a ViT of timm's with a class token and plain attention, or ends in attention of the class token alone."""
    return getattr(network, "cls_token", None) is not None and _last(network) is not None


def _last(network: Any) -> Any:
    """The attention of the last block, if it is of a kind that is understood here."""
    from timm.layers import Attention
    from timm.models.cait import ClassAttn  # XCiT's and CaiT's: the class token asks, all tokens answer

    blocks = getattr(network, "cls_attn_blocks", None) or getattr(network, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks) else None
    return attention if isinstance(attention, Attention | ClassAttn) else None


@torch.no_grad()
def attention_maps(network: Any, images: Tensor) -> Tensor:
    """[N, heads, h, w], each summing to at most 1: what is left goes to the class token itself and to registers."""
    seen: list[Tensor] = []
    attention = _last(network)
    handle = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.compiler.set_stance("force_eager"):  # what is compiled does not ask hooks that came later
            network.forward_features(images)
    finally:
        handle.remove()
    x = seen[0]  # [N, T, D], after the block's norm
    if hasattr(attention, "qkv"):
        q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [N, heads, T, d] each
        q, k = attention.q_norm(q), attention.k_norm(k)
    else:
        q, k = (part(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (attention.q, attention.k))
    weights = ((q[:, :, :1] * attention.scale) @ k.transpose(-2, -1)).float().softmax(-1)[:, :, 0]  # [N, heads, T]
    size = network.patch_embed.patch_size
    height = images.shape[-2] // (size if isinstance(size, int) else size[0])
    return weights[:, :, getattr(network, "num_prefix_tokens", 1) :].unflatten(-1, (height, -1))


def sheet(images: Tensor, maps: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A row for each image: itself, the mean of its heads, each head; uint8 [3, N * H, (heads + 2) * W].

    Args:
        images: [N, C, H, W], normalised by `mean` and `std`. maps: [N, heads, h, w].
    """
    size = images.shape[-2:]
    shape = (1, -1, 1, 1)
    pixels = images.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    maps = torch.cat([maps.mean(1, keepdim=True), maps], dim=1).cpu()
    maps = maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-12)  # each at its own scale: heads differ in strength
    maps = F.interpolate(maps, size=tuple(size), mode="nearest")
    rows = torch.cat([pixels.unsqueeze(1), maps.unsqueeze(2).expand(-1, -1, 3, -1, -1)], dim=1)  # [N, heads + 2, 3, H, W]
    return (rows.clamp(0, 1) * 255).round().to(torch.uint8).permute(2, 0, 3, 1, 4).reshape(3, rows.shape[0] * size[0], -1)
