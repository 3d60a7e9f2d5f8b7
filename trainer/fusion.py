"""Two encoders side by side, for colour and for another sensor, that correct each other and are fused at every stage.

CMX: Zhang et al., "Cross-modal fusion for RGB-X semantic segmentation with transformers", 2022, arXiv:2203.04838.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.mit import HEADS, STRIDES, MixTransformer, depths_of
from trainer.pyramid import Pyramid, layers_of

JOINTS = ("rectify.", "fuse.")  # prefixes of what stands between the streams, stage by stage
RGB = 3  # channels of the first stream; the second takes the others


class Rectify(nn.Module):
    """Each stream's map is corrected by the other's, weighted by channel and by place (CMX, sec. III-B, eq. 1 to 7)."""

    def __init__(self, channels: int, of_channels: float = 0.5, of_places: float = 0.5) -> None:
        super().__init__()
        both = 2 * channels
        self.by_channel = nn.Sequential(nn.Linear(2 * both, 2 * both), nn.ReLU(), nn.Linear(2 * both, both), nn.Sigmoid())
        self.by_place = nn.Sequential(nn.Conv2d(both, channels, 1), nn.ReLU(), nn.Conv2d(channels, 2, 1), nn.Sigmoid())
        self.of_channels, self.of_places = of_channels, of_places

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([a, b], dim=1)  # [N, 2C, H, W]
        pooled = torch.cat([both.mean((2, 3)), both.amax((2, 3))], dim=1)  # [N, 4C]
        channel_a, channel_b = self.by_channel(pooled)[:, :, None, None].chunk(2, dim=1)  # [N, C, 1, 1] each
        place_a, place_b = self.by_place(both).chunk(2, dim=1)  # [N, 1, H, W] each
        return (
            a + self.of_channels * channel_b * b + self.of_places * place_b * b,
            b + self.of_channels * channel_a * a + self.of_places * place_a * a,
        )


class CrossAttention(nn.Module):
    """Each stream asks with its own tokens for what the other's keys and values sum up to: softmax(K^T V) is C / heads
    square, so the cost is linear in the number of places (CMX, sec. III-C, eq. 8 to 10)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (channels // heads) ** -0.5
        self.kv_a, self.kv_b = (nn.Linear(channels, 2 * channels, bias=False) for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        context_a, context_b = self._context(self.kv_a(a)), self._context(self.kv_b(b))
        return self._ask(a, context_b), self._ask(b, context_a)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [N, heads, HW, C / heads]

    def _context(self, kv: Tensor) -> Tensor:
        k, v = (self._split(x) for x in kv.chunk(2, dim=2))
        return (k.transpose(2, 3) @ v * self.scale).softmax(dim=2)  # [N, heads, C / heads, C / heads]

    def _ask(self, x: Tensor, context: Tensor) -> Tensor:
        return (self._split(x) @ context).transpose(1, 2).flatten(2)


class Exchange(nn.Module):
    """Streams of tokens exchange what they know, each with a residual path of its own (CMX, fig. 4, "cross-attention")."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.into_a, self.into_b = (nn.Linear(channels, 2 * channels) for _ in range(2))
        self.attention = CrossAttention(channels, heads)
        self.out_a, self.out_b = (nn.Linear(2 * channels, channels) for _ in range(2))
        self.norm_a, self.norm_b = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        own_a, shared_a = self.into_a(a).relu().chunk(2, dim=2)
        own_b, shared_b = self.into_b(b).relu().chunk(2, dim=2)
        shared_a, shared_b = self.attention(shared_a, shared_b)
        out_a, out_b = self.out_a(torch.cat([own_a, shared_a], dim=2)), self.out_b(torch.cat([own_b, shared_b], dim=2))
        return self.norm_a(a + out_a), self.norm_b(b + out_b)


class Fuse(nn.Module):
    """Two maps into one: tokens exchange, then channels are embedded around a depth-wise convolution (CMX, sec. III-C)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.exchange = Exchange(channels, heads)
        self.residual = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.embed = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels),
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        height, width = a.shape[-2:]
        a, b = self.exchange(*(x.flatten(2).transpose(1, 2) for x in (a, b)))
        both = torch.cat([a, b], dim=2).transpose(1, 2).unflatten(2, (height, width))  # [N, 2C, H, W]
        return self.norm(self.residual(both) + self.embed(both))


class FusedPyramid(Pyramid):
    """Two mix transformers of one size; the first three channels go to one, the others to the other."""

    def __init__(
        self, depths: Sequence[int], widths: Sequence[int], strides: Sequence[int], *, in_channels: int, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.rgb = MixTransformer(depths, widths, in_channels=RGB, drop_path_rate=drop_path_rate)
        self.x = MixTransformer(depths, widths, in_channels=in_channels - RGB, drop_path_rate=drop_path_rate)
        self.rectify = nn.ModuleList(Rectify(width) for width in widths)
        self.fuse = nn.ModuleList(Fuse(width, heads) for width, heads in zip(widths, HEADS, strict=True))
        self.places = [STRIDES.index(s) for s in strides]
        self.strides, self.channels = tuple(strides), tuple(widths[place] for place in self.places)

    def forward(self, images: Tensor) -> list[Tensor]:
        a, b = images[:, :RGB], images[:, RGB:]
        maps = []
        for stage_a, stage_b, rectify, fuse in zip(self.rgb.stages, self.x.stages, self.rectify, self.fuse, strict=True):
            a, b = rectify(stage_a(a), stage_b(b))
            maps.append(fuse(a, b))
        return [maps[place] for place in self.places]

    def depths(self) -> dict[str, int]:
        found = {f"{name}.{n}": depth for name in ("rgb", "x") for n, depth in depths_of(self.get_submodule(name)).items()}
        # What joins the streams at a stage belongs to it.
        return found | {n: int(n.split(".")[1]) + 1 for n in self.state_dict() if n.startswith(JOINTS)}

    def layers(self) -> dict[str, int]:
        own = layers_of(self.rgb)  # the two are built alike
        found = {f"{stream}.{name}": layer for stream in ("rgb", "x") for name, layer in own.items()}
        # What joins the streams at a stage is as far up as its last block.
        tops = [max(layer for name, layer in own.items() if name.startswith(f"stages.{i}.")) for i in range(len(self.fuse))]
        return found | {n: tops[int(n.split(".")[1])] for n, _ in self.named_parameters() if n.startswith(JOINTS)}
