"""SimMIM (arXiv:2111.09886): the whole image goes through the encoder, a learned token in the place of each hidden patch; one
linear layer predicts pixels. Encoders are networks that begin with patches: ViT, BEiT, EVA, Swin, Hiera."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.mim import masks
from tasks.mim.config import MimConfig
from tasks.mim.pixels import to_patches
from tasks.mim.task import Mim
from trainer.errors import ConfigError, Problem

if TYPE_CHECKING:
    from trainer.config import ModelConfig


class SimMim(Mim):
    def __init__(self, model: nn.Module, cfg: MimConfig, *, patch: int, image_size: int, channels: int, fresh: bool = True) -> None:
        super().__init__(model, cfg, patch=patch, image_size=image_size, channels=channels, fresh=fresh)
        network: Any = model
        self.mask_token = nn.Parameter(torch.zeros(int(network.patch_embed.proj.out_channels)))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.stride = image_size // self._side_of_map(image_size)  # pixels along one place of the last feature map
        self.decoder = nn.Conv2d(int(network.num_features), self.stride**2 * channels, kernel_size=1)

    @staticmethod
    def patch_of(model: nn.Module, cfg: ModelConfig) -> int:
        if _is_hiera(model):
            return _patch_of_hiera(model, cfg)
        projection = getattr(getattr(model, "patch_embed", None), "proj", None)
        if not isinstance(projection, nn.Conv2d) or projection.kernel_size != projection.stride or not _gives_tokens(model, projection):
            reason = (
                "simmim puts a token in the place of each hidden patch, which takes a network that begins with patches that do not overlap"
            )
            raise ConfigError(Problem("model.name", cfg.name, reason, "model=timm model.name=swin_tiny_patch4_window7_224, or model=vit_s"))
        return int(projection.stride[0])

    def _side_of_map(self, image_size: int) -> int:
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            side = self._map(torch.zeros(1, self.model.patch_embed.proj.in_channels, image_size, image_size)).shape[2]  # type: ignore[union-attr]
        self.model.train(training)
        return side

    def losses(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        mask = masks.enlarged(masks.hidden(order, self.num_visible), self.units, self.factor)  # [N, h, w] in patches
        with self._hidden(mask):
            features = self._map(images)  # [N, D, s, s]
        pixels = F.pixel_shuffle(self.decoder(features), self.stride)  # [N, C, H, W]
        error = (to_patches(pixels, self.patch).float() - self.target(images)).abs().mean(2)  # [N, L]
        mask = mask.flatten(1)
        return (error * mask).sum(1) / mask.sum(1), pixels

    def laid_out(self, predicted: Tensor, order: Tensor) -> Tensor:
        return to_patches(predicted, self.patch)

    @contextmanager
    def _hidden(self, mask: Tensor) -> Iterator[None]:
        """Inside, the network's patches are what they are where `mask` is False, and the mask token elsewhere."""
        embed: nn.Module = self.model.patch_embed  # type: ignore[assignment]

        def replace(part: nn.Module, inputs: tuple[Any, ...], patches: Tensor) -> Tensor:
            flat = patches.ndim == 3  # [N, L, D], or [N, h, w, D]
            here = (mask.flatten(1) if flat else mask).unsqueeze(-1)
            return torch.where(here, self.mask_token.to(patches.dtype), patches)

        def blank(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            pixels = masks.enlarged(mask.flatten(1), self.grid, self.patch).unsqueeze(1)  # [N, 1, H, W]
            return inputs[0].masked_fill(pixels, 0.0), *inputs[1:]

        handles = [embed.register_forward_hook(replace)]
        if _is_hiera(self.model):  # its patches look beyond their edges: what is hidden is gone before them, as in its own MAE
            handles.append(embed.register_forward_pre_hook(blank))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _map(self, images: Tensor) -> Tensor:
        """The network's last feature map, [N, D, s, s]."""
        network: Any = self.model
        features = network.forward_features(images)
        if _is_hiera(network):
            features = network.reroll(features, len(network.blocks) - 1)  # [N, s, s, D]: in its blocks places are in another order
        if features.ndim == 3:  # a ViT's: class token and registers first
            patches = features[:, getattr(network, "num_prefix_tokens", 0) :]
            side = round(patches.shape[1] ** 0.5)
            return patches.transpose(1, 2).unflatten(2, (side, side))
        return features.permute(0, 3, 1, 2)


def _is_hiera(model: nn.Module) -> bool:
    from timm.models.hiera import Hiera

    return isinstance(model, Hiera)


def _patch_of_hiera(model: Any, cfg: ModelConfig) -> int:
    """A step of its patches, which overlap; its attention and its pooling take images of whole windows."""
    patch, window = int(model.patch_stride[0]), int(model.patch_stride[0] * model.mask_unit_size[0])
    size = int(model.tokens_spatial_shape[0] * patch)
    if any(side % unit for side, unit in zip(model.tokens_spatial_shape, model.mask_unit_size, strict=True)):
        reason = f"{cfg.name} looks at windows of {window} pixels, and an image has whole ones"
        raise ConfigError(Problem("dataset.image_size", size, reason, f"dataset.image_size={max(1, round(size / window)) * window}"))
    return patch


def _gives_tokens(model: nn.Module, projection: nn.Conv2d) -> bool:
    """Whether its patches are vectors, [N, L, D] or [N, h, w, D]: a token cannot take the place of a channel of a map."""
    network: Any = model
    size, depth = network.patch_embed.img_size or projection.stride, projection.out_channels
    with torch.no_grad():
        return network.patch_embed(torch.zeros(1, projection.in_channels, *size)).shape[-1] == depth
