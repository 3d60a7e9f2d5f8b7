"""Mix transformers, SegFormer's encoders (arXiv:2105.15203), which neither timm nor torchvision has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trainer.config.fields import setting
from trainer.config.model import ModelConfig
from trainer.config.names import nearest
from trainer.config.schemas import schema
from trainer.errors import ConfigError, Problem

if TYPE_CHECKING:
    from torch import nn

    from trainer.pyramid import Pyramid

# name -> blocks of each stage, channels of each stage (arXiv:2105.15203, table 6)
VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "mit_b0": ((2, 2, 2, 2), (32, 64, 160, 256)),
    "mit_b1": ((2, 2, 2, 2), (64, 128, 320, 512)),
    "mit_b2": ((3, 4, 6, 3), (64, 128, 320, 512)),
    "mit_b3": ((3, 4, 18, 3), (64, 128, 320, 512)),
    "mit_b4": ((3, 8, 27, 3), (64, 128, 320, 512)),
    "mit_b5": ((3, 6, 40, 3), (64, 128, 320, 512)),
}


@schema("model", "mit")
@dataclass
class MitModel(ModelConfig):
    """A mix transformer, or two of them side by side."""

    offers: ClassVar[frozenset[str]] = frozenset({"classifier", "features", "pyramid"})

    drop_rate: float = setting(0.0, "dropout before the classifier, as a probability", ge=0, lt=1)
    drop_path_rate: float = setting(0.1, "stochastic depth of the last block, as a probability (arXiv:1603.09382)", ge=0, lt=1)
    fusion: str | None = setting(
        None,
        "cross_attention: one encoder for the first three channels and one for the others, rectified and fused at every stage (CMX, arXiv:2203.04838), for tasks that take a pyramid; null = one encoder for all channels",
        choices=["cross_attention"],
    )

    def build(self, *, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
        from trainer.mit import MixTransformer

        if self.fusion is not None:
            raise ConfigError(Problem("model.fusion", self.fusion, "two streams end in maps, not in classes", "model.fusion=null"))
        return MixTransformer(
            *VARIANTS[self.name], in_channels=self.in_channels or in_channels, num_classes=num_classes,
            drop_rate=self.drop_rate, drop_path_rate=self.drop_path_rate,
        )  # fmt: skip

    def build_pyramid(self, *, strides: Sequence[int], image_size: int, in_channels: int) -> Pyramid:
        from trainer.mit import mit_pyramid

        return mit_pyramid(self, strides, in_channels=self.in_channels or in_channels)

    def channel_problems(self, channels: int) -> Iterator[Problem]:
        yield from super().channel_problems(channels)
        if self.fusion and channels <= 3:
            reason = f"the images have {channels} channels: none beside red, green and blue for the second encoder"
            yield Problem("model.fusion", self.fusion, reason, "model.fusion=null, or dataset=multispectral")

    def problems(self, at: str, image_size: int) -> Iterator[Problem]:
        yield from super().problems(at, image_size)
        if self.name not in VARIANTS:
            close = nearest(self.name, VARIANTS) or "mit_b0"
            yield Problem(f"{at}.name", self.name, f"is none of {', '.join(VARIANTS)}", f"{at}.name={close}")
        if self.pretrained:
            yield Problem(f"{at}.pretrained", True, "nobody publishes weights under these names", f"init_from=<file> {at}.pretrained=false")
        if self.patch_size is not None:
            yield Problem(f"{at}.patch_size", self.patch_size, "a mix transformer's patches are its own", f"{at}.patch_size=null")
        if self.args:
            yield Problem(f"{at}.args", self.args, "a mix transformer takes no further arguments", f"{at}.args={{}}")
