"""The class token of a vision transformer, without computing what it does not depend on.

Two savings, and neither changes what comes out: of the last block only the class token's own place is computed; and hidden
tokens that only tell what showing them would change are carried along without gradients of their own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


def divisible(network: VisionTransformer) -> bool:
    """Whether the blocks are timm's usual ones, whose parts can be called one by one and draw nothing at random."""
    return not network.grad_checkpointing and all(
        type(block) is Block
        and type(block.attn) is Attention
        and getattr(block.attn, "gate", None) is None
        and block._compiled_call_impl is None
        and not (block.training and any(_draws(part) for part in block.modules()))
        for block in network.blocks
    )


def _draws(part: nn.Module) -> bool:
    return isinstance(part, DropPath) or (isinstance(part, nn.Dropout) and part.p > 0)


def class_token(network: VisionTransformer, tokens: Tensor, bias: Tensor | None, hidden: Tensor | None = None) -> Tensor:
    """The class token [N, D] after all blocks and the last norm.

    Args:
        tokens: [N, T, D], the class token first.
        bias: what is seen, for every head and query, [N, 1, 1, T + H]: bool, or float that is added to the scores.
        hidden: [N, H, D], tokens that hardly weigh anything: they attend like all others, but of the gradients that pass
            through them, as small as they weigh, none is computed.
    """
    blocks = cast("list[Block]", list(network.blocks))
    quiet = bias.detach() if bias is not None else None
    for i, block in enumerate(blocks):
        last = i == len(blocks) - 1
        q, k, v = _heads(block, tokens)
        if hidden is not None:
            with torch.no_grad():
                their_q, their_k, their_v = _heads(block, hidden)
            k, v = torch.cat([k, their_k], dim=2), torch.cat([v, their_v], dim=2)
            if not last:
                with torch.no_grad():
                    hidden = _mixed(block, hidden, their_q, k, v, quiet)
        if last:
            tokens, q = tokens[:, :1], q[:, :, :1]
        tokens = _mixed(block, tokens, q, k, v, bias)
    return network.fc_norm(network.norm(tokens))[:, 0]  # one of the two is the identity


def _heads(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [N, heads, T, D / heads] each."""
    attention = cast(Any, block.attn)
    q, k, v = attention.qkv(block.norm1(tokens)).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(q), attention.k_norm(k), v


def _mixed(block: Block, tokens: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """What the block makes of `tokens`, whose queries are `q`."""
    attention = cast(Any, block.attn)
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    tokens = tokens + cast(Any, block.ls1)(attention.proj(attention.norm(seen)))
    return tokens + cast(Any, block.ls2)(block.mlp(block.norm2(tokens)))
