"""FCMAE (arXiv:2301.00808): a ConvNeXt that sees nothing where patches are hidden, and a decoder of one block.

The authors convolve sparsely. Zeros in the hidden places before whatever looks at more than one place give the same numbers (their
sec. 3.1), with the convolutions that everybody has. Their code measures global responses over all images of a batch at once; here, as in
the network itself, each image has its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.mim import masks
from tasks.mim.config import MimConfig, no_convnext
from tasks.mim.task import Mim
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config import ModelConfig


class Fcmae(Mim):
    def __init__(self, model: nn.Module, cfg: MimConfig, *, patch: int, image_size: int, channels: int, fresh: bool = True) -> None:
        super().__init__(model, cfg, patch=patch, image_size=image_size, channels=channels, fresh=fresh)
        network: Any = model
        self.decoder = ConvDecoder(
            int(network.num_features), cfg.decoder_dim or 512, cfg.decoder_depth or 1, outputs=patch * patch * channels
        )

    @staticmethod
    def patch_of(model: nn.Module, cfg: ModelConfig) -> int:
        from timm.models.convnext import ConvNeXt

        first: Any = model.stem[0] if isinstance(model, ConvNeXt) else None
        if first is None or first.kernel_size != first.stride:
            raise ConfigError(no_convnext(cfg.name))
        network: Any = model
        return int(network.feature_info[-1]["reduction"])

    def compiled_parts(self) -> list[nn.Module]:
        return list(self.decoder.blocks)  # the encoder's own forward passes are not called in training

    def losses(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        hidden = masks.enlarged(masks.hidden(order, self.num_visible), self.units, self.factor)  # [N, h, w] of the last feature map
        predicted = self.decoder(self.encode(images, ~hidden), hidden)  # [N, L, P]
        error = (predicted.float() - self.target(images)).square().mean(2)  # [N, L]
        hidden = hidden.flatten(1)
        return (error * hidden).sum(1) / hidden.sum(1), predicted

    def laid_out(self, predicted: Tensor, order: Tensor) -> Tensor:
        return predicted

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """The last feature map, [N, D, h, w], of what is seen of the images; what stands in hidden places has no meaning.

        `visible`: bool [N, h, w].
        """
        network: Any = self.model
        x = network.stem(images)
        for stage in network.stages:
            x = seen_through(stage, x, visible.unsqueeze(1))
        return network.norm_pre(x)


def seen_through(stage: Any, x: Tensor, visible: Tensor) -> Tensor:
    """A stage of a ConvNeXt of timm. `visible`: bool [N, 1, h, w] of the network's last map."""
    if isinstance(stage.downsample, nn.Sequential):
        norm, convolution = stage.downsample
        x = convolution(norm(x) * _at(visible, x))
    seen = _at(visible, x)
    for block in stage.blocks:
        if stage.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(_block, block, x, seen, use_reentrant=False)
        else:
            x = _block(block, x, seen)
    return x


def _block(block: Any, x: Tensor, seen: Tensor) -> Tensor:
    """A block: the depthwise convolution and the norm of global responses are what looks beyond one place."""
    y, mlp = block.conv_dw(x * seen), block.mlp
    if not block.use_conv_mlp:
        y, seen = y.permute(0, 2, 3, 1), seen.permute(0, 2, 3, 1)
    y = block.norm(y)
    # A ConvNeXt of the first kind has no global responses.
    y = mlp.drop2(mlp.fc2(mlp.grn(mlp.drop1(mlp.act(mlp.fc1(y))) * seen))) if hasattr(mlp, "grn") else mlp(y)
    if not block.use_conv_mlp:
        y = y.permute(0, 3, 1, 2)
    if block.gamma is not None:
        y = y * block.gamma.view(1, -1, 1, 1)
    return block.drop_path(y) + block.shortcut(x)


def _at(visible: Tensor, x: Tensor) -> Tensor:
    """The mask in the size and the type of a map: [N, 1, H, W] of zeros and ones."""
    factor = x.shape[2] // visible.shape[2]
    return visible.repeat_interleave(factor, 2).repeat_interleave(factor, 3).to(x.dtype)


class ConvDecoder(nn.Module):
    """Blocks of a ConvNeXt-V2 over a map with a learned vector in each hidden place."""

    def __init__(self, width: int, dim: int, depth: int, outputs: int) -> None:
        from timm.models.convnext import ConvNeXtBlock

        super().__init__()
        self.embed = nn.Conv2d(width, dim, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.blocks = nn.ModuleList([ConvNeXtBlock(dim, use_grn=True, ls_init_value=None) for _ in range(depth)])
        self.predict = nn.Conv2d(dim, outputs, kernel_size=1)
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)  # as timm draws the encoder's
                assert part.bias is not None
                nn.init.zeros_(part.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Predictions for all places, [N, h * w, outputs]. `x`: [N, width, h, w]; `hidden`: bool [N, h, w]."""
        x = self.embed(x)
        x = torch.where(hidden.unsqueeze(1), self.mask_token.to(x.dtype), x)
        for block in self.blocks:
            x = block(x)
        return self.predict(x).flatten(2).transpose(1, 2)
