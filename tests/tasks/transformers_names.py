"""The names that transformers gives to the weights of timm's networks, for tests that hold ours against theirs."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

_BLOCK = [
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.relative_position_bias_table$", ".attention.relative_position_bias.relative_position_bias_table"),
]
VIT = [
    *_BLOCK,
    (r"^model\.blocks\.", "vit.layers."),
    (r"^model\.norm\.", "vit.layernorm."),
    (r"^model\.cls_token$", "vit.embeddings.cls_token"),
    (r"^model\.pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^model\.patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
]
MAE = [
    *VIT,
    (r"^decoder\.blocks\.", "decoder.decoder_layers."),
    (r"^decoder\.embed\.", "decoder.decoder_embed."),
    (r"^decoder\.norm\.", "decoder.decoder_norm."),
    (r"^decoder\.predict\.", "decoder.decoder_pred."),
]
SIMMIM_VIT = [*VIT, (r"^mask_token$", "vit.embeddings.mask_token"), (r"^decoder\.", "decoder.0.")]
SIMMIM_SWIN = [
    *_BLOCK,
    (r"^mask_token$", "swin.embeddings.mask_token"),
    (r"^decoder\.", "decoder.0."),
    (r"^model\.patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."),
    (r"^model\.patch_embed\.norm\.", "swin.embeddings.norm."),
    (r"^model\.norm\.", "swin.layernorm."),
    # timm merges patches before a stage, transformers after it.
    (r"^model\.layers\.(\d+)\.downsample\.", lambda m: f"swin.encoder.layers.{int(m[1]) - 1}.downsample."),
    (r"^model\.layers\.", "swin.encoder.layers."),
]


def theirs(name: str, rules: list) -> list[str]:
    """One name, or three where queries, keys and values are one matrix in timm."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    if ".attn.qkv." in name:
        return [name.replace(".attn.qkv.", f".attention.{part}_proj.") for part in "qkv"]
    return [name]


def copy_weights(ours: nn.Module, other: nn.Module, rules: list) -> None:
    """Give `other` the weights of `ours`, all of them."""
    parameters, filled = dict(other.named_parameters()), set()
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            names = theirs(name, rules)
            for key, part in zip(names, weight.chunk(len(names)), strict=True):
                parameters[key].copy_(part.view_as(parameters[key]))
                filled.add(key)
    left = {name for name, p in parameters.items() if p.requires_grad} - filled
    assert not left, left


def gradients(ours: nn.Module, other: nn.Module, rules: list) -> list[tuple[str, Tensor, Tensor]]:
    """(name, ours, theirs) of every parameter that trains."""
    parameters = dict(other.named_parameters())
    rows = []
    for name, weight in ours.named_parameters():
        if weight.requires_grad:
            grads = [parameters[key].grad for key in theirs(name, rules)]
            assert weight.grad is not None, name
            rows.append((name, weight.grad, torch.cat([g for g in grads if g is not None]).view_as(weight)))
    return rows
