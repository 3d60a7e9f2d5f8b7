"""What the two stages need of a network: a map of features, and class logits from some of an image's tokens.

Knows timm's vision transformers from inside, and anything that gives a map of features from outside.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.part_discovery.attention import class_token, divisible
from trainer.dilation import LastMap, parts_in_order
from trainer.errors import ConfigError, Problem


def vision_transformer(model: nn.Module, name: str, *, class_token: bool) -> VisionTransformer:
    """`model` as one of timm's vision transformers. Raises ConfigError where it is none, or lacks a token to read out."""
    if not isinstance(model, VisionTransformer):
        reason = "the second stage hides tokens in every block, which timm's vision transformers can; this network is no such"
        raise ConfigError(Problem("model.name", name, reason, "model=vit_s, or task.stages=1"))
    if class_token and model.cls_token is None:
        raise ConfigError(Problem("model.name", name, "the second stage reads its class token, and it has none", "model=vit_s"))
    if not isinstance(model.patch_drop, nn.Identity):
        reason = "dropping patches would leave holes in the part maps"
        raise ConfigError(Problem("model.args.patch_drop_rate", model.patch_drop.prob, reason, "model.args.patch_drop_rate=0"))
    return model


def headless(network: nn.Module, channels: int) -> nn.Module:
    """The same network without what comes after its map of features: weights that never learn have no place in it.

    Args:
        channels: of its images.
    """
    if not hasattr(network, "forward_features"):  # torchvision's
        parts = parts_in_order(network)
        return network if parts is None else LastMap(parts, channels)
    for name in ("head", "fc", "classifier"):
        if hasattr(network, name):
            setattr(network, name, nn.Identity())
    if isinstance(network, VisionTransformer):
        network.attn_pool = None
    return network


def shortened(network: nn.Module, blocks: int, name: str) -> nn.Module:
    """The same network with its first `blocks` blocks only. Raises ConfigError where it has no such number of them."""
    if not isinstance(network, VisionTransformer) or blocks > len(network.blocks):
        reason = (
            f"{name} has {len(network.blocks)} blocks"
            if isinstance(network, VisionTransformer)
            else f"{name} is none of timm's vision transformers"
        )
        raise ConfigError(Problem("task.stage_1_blocks", blocks, reason, "task.stage_1_blocks=null"))
    network.blocks = network.blocks[:blocks]
    if blocks == 0:  # nothing would pass between patches and the tokens before them, which would never learn
        if network.pos_embed is not None and not network.no_embed_class:
            network.pos_embed = nn.Parameter(network.pos_embed.detach()[:, network.num_prefix_tokens :].clone())
        network.cls_token = network.reg_token = None
        network.num_prefix_tokens, network.num_reg_tokens, network.has_class_token = 0, 0, False
    return network


def embed(network: VisionTransformer, images: Tensor) -> Tensor:
    """Tokens with their positions, prefix tokens first, [N, prefix + hw, D]."""
    tokens = network._pos_embed(network.patch_embed(images))  # the one place that knows which tokens have positions
    return network.norm_pre(tokens)


def run_blocks(network: VisionTransformer, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """All blocks and the last norm. `attention_mask` [N, 1, 1, tokens]: bool, True = seen; or float, added to the scores."""
    for block in network.blocks:
        if network.grad_checkpointing and torch.is_grad_enabled():
            tokens = cast(Tensor, checkpoint(block, tokens, attention_mask, use_reentrant=False))
        else:
            tokens = block(tokens, attn_mask=attention_mask)
    return network.fc_norm(network.norm(tokens))  # one of the two is the identity


def grid(network: VisionTransformer, images: Tensor) -> tuple[int, int]:
    """How many patches lie below and beside one another."""
    rows, columns = cast(Any, network.patch_embed).dynamic_feat_size(images.shape[2:])
    return int(rows), int(columns)


def feature_map(network: nn.Module, images: Tensor) -> Tensor:
    """Features of every place, [N, D, h, w]."""
    if isinstance(network, VisionTransformer):
        tokens = run_blocks(network, embed(network, images))[:, network.num_prefix_tokens :]  # [N, hw, D]
        return tokens.transpose(1, 2).unflatten(2, grid(network, images))
    return cast(Any, network).forward_features(images)


def feature_width(network: nn.Module) -> int:
    """D."""
    return int(cast(Any, network).num_features)


def seen_tokens(network: VisionTransformer, images: Tensor, mask: Tensor, *, bias: float | None, prune: bool) -> Tensor:
    """The class token [N, D] after all blocks, when each token attends to the prefix tokens and to the patches of `mask`.

    Args:
        mask: [N, h, w], how much each patch is seen.
        bias: None = a patch is seen or not; a number = log(mask + bias) is added to its scores, so that gradients reach it.
        prune: compute no more than the result needs. Without `bias`, what no image of the batch sees is left out: the kept tokens
            attend to the same tokens as before. With it, hidden tokens teach the mask and nothing else.
    """
    if not isinstance(network.patch_embed, PatchEmbed):  # convolutions would show what a patch's neighbours hold
        images = images * F.interpolate(mask.unsqueeze(1), size=images.shape[2:], mode="nearest").to(images.dtype)
    tokens, hidden = embed(network, images), None
    prefix = network.num_prefix_tokens
    mask = mask.flatten(1)  # [N, hw]
    in_parts = divisible(network)
    if prune and (bias is None or in_parts):
        tokens, mask, rest = seen_first(tokens, mask, prefix)
        if bias is None:
            mask = mask[:, : tokens.shape[1] - prefix]
        else:
            hidden = rest.detach()
    always = mask.new_ones(len(mask), prefix)
    seen = torch.cat([always, mask], dim=1)[:, None, None]  # [N, 1, 1, prefix + patches], for every head and query
    if bias is None:
        scores = seen > 0.5
    else:
        with torch.autocast(mask.device.type, enabled=False):
            scores = (seen.float() + bias).log().to(_score_type(tokens))
    if in_parts:
        return class_token(network, tokens, scores, hidden)
    return run_blocks(network, tokens, scores)[:, 0]


def _score_type(tokens: Tensor) -> torch.dtype:
    """What the scores of attention are computed in."""
    kind = tokens.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype


def seen_first(tokens: Tensor, mask: Tensor, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """As many patches as the image that sees most sees, those that are seen first among them; the mask in the new order; the rest.
    Both shares of the patches stay in their old order."""
    count = int((mask > 0.5).sum(1).max())
    order = mask.argsort(dim=1, descending=True, stable=True)
    order = torch.cat([order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values], dim=1)  # [N, patches]
    patches = tokens[:, prefix:].gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :prefix], patches[:, :count]], dim=1), mask.gather(1, order), patches[:, count:]
