"""Mix transformers, the encoders of SegFormer (Xie et al., 2021, arXiv:2105.15203, sec. 3.1), written from the paper.

Four stages. Each begins with overlapping patches, and its attention looks at keys and values on a coarser grid; positions
come from the padding of a depth-wise convolution in every block, so any image size will do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from trainer.config.mit import VARIANTS
from trainer.errors import ConfigError, Problem
from trainer.pyramid import Pyramid, layers_of

if TYPE_CHECKING:
    from trainer.config.mit import MitModel

HEADS = (1, 2, 5, 8)  # of each stage
REDUCTIONS = (8, 4, 2, 1)  # how much coarser the grid of keys and values is, each way
STRIDES = (4, 8, 16, 32)


class Patches(nn.Module):
    """Overlapping patches: each sees into its neighbours (sec. 3.1, "overlapped patch merging")."""

    def __init__(self, inputs: int, channels: int, *, first: bool) -> None:
        super().__init__()
        side, stride = (7, 4) if first else (3, 2)
        self.proj = nn.Conv2d(inputs, channels, side, stride, padding=side // 2)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        height, width = x.shape[-2:]
        return self.norm(x.flatten(2).transpose(1, 2)), height, width  # [N, HW, C]


class Attention(nn.Module):
    """Self-attention with keys and values from a grid that is `reduction` times coarser (eq. 2)."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.reduce = nn.Conv2d(channels, channels, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(channels) if reduction > 1 else None

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        n, length, c = x.shape
        q = self.q(x).view(n, length, self.heads, -1).transpose(1, 2)  # [N, heads, HW, C / heads]
        coarse = x
        if self.reduce is not None and self.norm is not None:
            coarse = self.reduce(x.transpose(1, 2).reshape(n, c, height, width)).flatten(2).transpose(1, 2)  # [N, HW / R^2, C]
            coarse = self.norm(coarse)
        k, v = self.kv(coarse).view(n, coarse.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, c))


class MixMlp(nn.Module):
    """A feed-forward layer with a depth-wise 3 x 3 convolution in it, which tells where things are (eq. 3)."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, ratio * channels)
        self.dwconv = nn.Conv2d(ratio * channels, ratio * channels, 3, padding=1, groups=ratio * channels)
        self.fc2 = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.fc1(x)
        n, _, c = x.shape
        x = self.dwconv(x.transpose(1, 2).reshape(n, c, height, width)).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = Attention(channels, heads, reduction)
        self.mlp = MixMlp(channels)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x), height, width))


class Stage(nn.Module):
    def __init__(self, inputs: int, channels: int, drop_paths: Sequence[float], i: int) -> None:
        super().__init__()
        self.patches = Patches(inputs, channels, first=i == 0)
        self.blocks = nn.ModuleList(Block(channels, HEADS[i], REDUCTIONS[i], rate) for rate in drop_paths)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x, height, width = self.patches(x)
        for block in self.blocks:
            x = block(x, height, width)
        return self.norm(x).transpose(1, 2).unflatten(2, (height, width))  # [N, C, H, W]


class MixTransformer(nn.Module):
    """The encoder, ending in `num_classes` logits of its pooled last map; with `num_classes=0` in pooled features [N, D].

    Attributes:
        num_features: channels of the last map.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        in_channels: int = 3,
        num_classes: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_features, self.num_classes = widths[-1], num_classes
        total = sum(depths)
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]  # rising with depth
        starts = [sum(depths[:i]) for i in range(len(depths))]
        self.stages = nn.ModuleList(
            Stage(inputs, width, rates[start : start + depth], i)
            for i, (inputs, width, start, depth) in enumerate(zip([in_channels, *widths], widths, starts, depths))
        )
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_draw)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Every stage's map, of strides 4, 8, 16 and 32."""
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, C, H / 32, W / 32]"""
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.drop(x.mean((2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from the bottom up, for layer-wise learning rates, in timm's form."""
        block = r"^stages\.(\d+)\.blocks\.(\d+)"
        return {
            "stem": r"^stages\.0\.patches",
            "blocks": r"^stages\.(\d+)" if coarse else [(block, None), (r"^stages\.(\d+)\.(?:patches|norm)", (0,))],
        }


def _draw(module: nn.Module) -> None:
    """Truncated normal for matrices, He's normal over the fan out for convolutions."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class MitPyramid(Pyramid):
    """The maps of one mix transformer."""

    def __init__(self, net: MixTransformer, strides: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.places = [STRIDES.index(s) for s in strides]
        self.strides, self.channels = tuple(strides), tuple(_width(net, place) for place in self.places)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.net.maps(images)
        return [maps[place] for place in self.places]

    def depths(self) -> dict[str, int]:
        return {f"net.{name}": depth for name, depth in depths_of(self.net).items()}

    def layers(self) -> dict[str, int]:
        return {f"net.{name}": layer for name, layer in layers_of(self.net).items()}


def depths_of(net: nn.Module) -> dict[str, int]:
    """0 for the stem, 1 to 4 for the stages, by the names of `stages`."""
    return {
        name: 0 if name.startswith("stages.0.patches") else int(name.split(".")[1]) + 1
        for name in net.state_dict()
        if name.startswith("stages.")
    }


def _width(net: MixTransformer, place: int) -> int:
    stage = net.stages[place]
    assert isinstance(stage, Stage)
    return stage.norm.normalized_shape[0]


def mit_pyramid(cfg: MitModel, strides: Sequence[int], *, in_channels: int) -> Pyramid:
    unknown = [s for s in strides if s not in STRIDES]
    if unknown:
        raise ConfigError(Problem("model.name", cfg.name, f"has maps of stride {STRIDES}, none of stride {unknown}", "model=resnet50"))
    if cfg.fusion is not None:
        from trainer.fusion import FusedPyramid

        return FusedPyramid(*VARIANTS[cfg.name], strides, in_channels=in_channels, drop_path_rate=cfg.drop_path_rate)
    net = MixTransformer(*VARIANTS[cfg.name], in_channels=in_channels, drop_path_rate=cfg.drop_path_rate)
    return MitPyramid(net, strides)
