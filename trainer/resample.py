"""Tensors whose shape follows the image's or the patches' size, fitted to another size as timm does it."""

from __future__ import annotations

import math
import warnings

from torch import Tensor, nn


def resampled(module: nn.Module, name: str, theirs: Tensor, own: Tensor) -> Tensor | None:
    """`theirs` fitted to the shape of `own`; None where that makes no sense."""
    from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc, resample_patch_embed, resize_rel_pos_bias_table

    if theirs.ndim != own.ndim:
        return None
    owner = module.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    fitted: Tensor | None = None
    if "pos_embed" in leaf and own.ndim == 3 and theirs.shape[2] == own.shape[2]:
        sizes = _grids(owner, theirs.shape[1], own.shape[1])
        if sizes is not None:
            prefix, old, new = sizes
            fitted = resample_abs_pos_embed(theirs, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix)
    elif "pos_embed" in leaf and own.ndim == 4 and theirs.shape[3] == own.shape[3]:
        fitted = resample_abs_pos_embed_nhwc(theirs, new_size=list(own.shape[1:3]))
    elif leaf == "relative_position_bias_table" and hasattr(owner, "window_size") and theirs.shape[1] == own.shape[1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm searches in a strided tensor; torch warns that it is slow
            fitted = resize_rel_pos_bias_table(theirs, new_window_size=owner.window_size, new_bias_shape=tuple(own.shape))  # type: ignore[arg-type]
    elif "patch_embed" in name and own.ndim == 4 and theirs.shape[:2] == own.shape[:2]:
        fitted = resample_patch_embed(theirs, new_size=list(own.shape[2:]))
    return fitted if fitted is not None and fitted.shape == own.shape else None


def _grids(owner: nn.Module, theirs: int, ours: int) -> tuple[int, tuple[int, int], tuple[int, int]] | None:
    """Prefix tokens, old and new grid of [1, tokens, D] position embeddings; None where the tokens form no grid."""
    grid = getattr(getattr(owner, "patch_embed", None), "grid_size", None)
    if grid is not None:
        new = (int(grid[0]), int(grid[1]))
        prefix = ours - math.prod(new)
        old = math.isqrt(max(0, theirs - prefix))
        return (prefix, (old, old), new) if prefix >= 0 and old * old == theirs - prefix else None
    for prefix in (1, 0, 2, 5):  # class token; none; class and distillation token; class token and four registers
        old, side = math.isqrt(max(0, theirs - prefix)), math.isqrt(max(0, ours - prefix))
        if old * old == theirs - prefix and side * side == ours - prefix and min(old, side) > 0:
            return prefix, (old, old), (side, side)
    return None
