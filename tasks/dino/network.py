"""A backbone with what projects its features. Knows one image size at a time, neither views nor losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tasks.dino.head import Head


class Network(nn.Module):
    """Student or teacher. `patch_head` is None where patches are not looked at, or share the head of the whole image."""

    backbone: Any  # a network of timm's

    def __init__(self, backbone: nn.Module, head: Head, patch_head: Head | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.patch_head = patch_head

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [N, D], and those of each patch [N, T, D]."""
        tokens = self.backbone.forward_features(images)
        return self.backbone.forward_head(tokens, pre_logits=True), tokens[:, self.backbone.num_prefix_tokens :]

    def patch_scores(self, patches: Tensor) -> Tensor:
        return (self.patch_head or self.head)(patches)

    @property
    def last_layers(self) -> list[nn.Module]:
        return [head.last_layer for head in (self.head, self.patch_head) if head is not None]


class MaskToken(nn.Module):
    """A learned token in the place of each hidden patch, before positions are added (arXiv:2106.08254, sec. 2.3)."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(backbone.embed_dim))
        self.hidden: Tensor | None = None  # bool [N, T]
        backbone.patch_embed.register_forward_hook(self._put)

    def _put(self, module: nn.Module, inputs: Any, patches: Tensor) -> Tensor | None:
        if self.hidden is None:
            return None
        hidden = self.hidden.view(*patches.shape[:-1], 1)  # patches are [N, T, D] or [N, h, w, D]
        return torch.where(hidden, self.token.to(patches.dtype), patches)

    @contextmanager
    def hiding(self, patches: Tensor) -> Iterator[None]:
        """Inside, the backbone does not see these patches, bool [N, T]."""
        self.hidden = patches
        try:
            yield
        finally:
            self.hidden = None
