"""SimMIM (arXiv:2111.09886): the whole image goes through the encoder, a learned token in the place of each hidden patch; one
linear layer predicts pixels."""

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

        def replace(part: nn.Module, inputs: tuple[Any, ...], patches: Tensor) -> Tensor:
            flat = patches.ndim == 3  # [N, L, D], or [N, h, w, D]
            here = (mask.flatten(1) if flat else mask).unsqueeze(-1)
            return torch.where(here, self.mask_token.to(patches.dtype), patches)

        handle = self.model.patch_embed.register_forward_hook(replace)  # type: ignore[union-attr, arg-type]
        try:
            yield
        finally:
            handle.remove()

    def _map(self, images: Tensor) -> Tensor:
        """The network's last feature map, [N, D, s, s]."""
        network: Any = self.model
        features = network.forward_features(images)
        if features.ndim == 3:  # a ViT's: class token and registers first
            patches = features[:, getattr(network, "num_prefix_tokens", 0) :]
            side = round(patches.shape[1] ** 0.5)
            return patches.transpose(1, 2).unflatten(2, (side, side))
        return features.permute(0, 3, 1, 2)


def _gives_tokens(model: nn.Module, projection: nn.Conv2d) -> bool:
    """Whether its patches are vectors, [N, L, D] or [N, h, w, D]: a token cannot take the place of a channel of a map."""
    network: Any = model
    size, depth = network.patch_embed.img_size or projection.stride, projection.out_channels
    with torch.no_grad():
        return network.patch_embed(torch.zeros(1, projection.in_channels, *size)).shape[-1] == depth
