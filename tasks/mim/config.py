"""Config of masked image modelling. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trainer.config import RunConfig, TaskConfig, schema, setting
from trainer.errors import Problem

if TYPE_CHECKING:
    from tasks.mim.task import Mim
    from trainer.task import DataInfo

# The share of an image that is hidden: MAE, arXiv:2111.06377, sec. 4; SimMIM, arXiv:2111.09886, sec. 4.1.
RATIOS = {"mae": 0.75, "simmim": 0.6}
_CONVOLUTIONAL = re.compile(r"(res|conv|dense|mobile|efficient|reg|ghost|vgg|inception|xception|dark|dla|hrnet|lcnet|sk|ecares|rexnet)")


@schema("task", "mim")
@dataclass
class MimConfig(TaskConfig):
    """Masked image modelling: hide most of an image, learn by filling it in. Needs no labels; where there are some, k-NN judges."""

    asks: ClassVar[frozenset[str]] = frozenset({"features"})

    method: str = setting(
        "mae",
        "mae: a ViT sees the visible patches only, a small decoder the rest; simmim: any ViT or Swin sees a token in the place of each hidden patch",
        choices=list(RATIOS),
    )
    mask_ratio: float | None = setting(None, "share of an image that is hidden; null = the method's own: mae 0.75, simmim 0.6", gt=0, lt=1)
    mask_unit: int | None = setting(
        None,
        "side in pixels of what is hidden or shown as a whole; null = the method's own: mae a patch, simmim at most a sixth of the image (32 of 192)",
        ge=1,
    )
    mask: str = setting("random", "random: every unit alike; block: rectangles, one over the other", choices=["random", "block"])
    normalize_pixels: bool | None = setting(
        None, "predict each patch less its mean, over its standard deviation; null = the method's own: mae true, simmim false"
    )
    decoder_depth: int | None = setting(None, "mae: blocks of the decoder; null = two thirds of the encoder's, at most 8", ge=1)
    decoder_dim: int | None = setting(None, "mae: width of the decoder; null = two thirds of the encoder's, at most 512", ge=8)
    decoder_heads: int | None = setting(None, "mae: attention heads of the decoder; null = one for each 32 of its width", ge=1)
    knn_neighbours: int = setting(20, "neighbours that vote on a validation image's class, where there are labels", ge=1)

    @property
    def ratio(self) -> float:
        return RATIOS[self.method] if self.mask_ratio is None else self.mask_ratio

    @property
    def normalizes(self) -> bool:
        return self.method == "mae" if self.normalize_pixels is None else self.normalize_pixels

    def unit(self, patch: int, image_size: int) -> int:
        """Side of a unit of the mask in pixels, for patches of this size."""
        if self.mask_unit is not None:
            return self.mask_unit
        if self.method == "mae":
            return patch
        # 32 pixels of SimMIM's 192; a unit is made of whole patches, and the image of whole units.
        sizes = [u for u in range(patch, image_size + 1, patch) if image_size % u == 0 and u <= image_size / 6]
        return max(sizes, default=patch)

    def num_visible(self, num_units: int) -> int:
        """Units of an image that stay visible, rounded as the methods' authors do."""
        if self.method == "mae":
            return int(num_units * (1 - self.ratio))
        return num_units - math.ceil(num_units * self.ratio)

    def decoder_size(self, width: int, depth: int) -> tuple[int, int, int]:
        """Width, blocks and heads of MAE's decoder behind an encoder of this width and depth: 512, 8 and 16 for ViT-B and -L."""
        dim = self.decoder_dim or min(512, max(64, width * 2 // 3 // 64 * 64))
        return dim, self.decoder_depth or min(8, max(1, depth * 2 // 3)), self.decoder_heads or max(1, dim // 32)

    def build(self, run: RunConfig, data: DataInfo) -> Mim:
        from tasks.mim.build import build

        return build(self, run, data)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        name, size, patch = run.model.name, run.dataset.image_size, run.model.input_multiple
        if self.method == "mae" and _CONVOLUTIONAL.match(name):
            yield no_transformer(name)
        if self.method != "mae":
            for key in ("decoder_depth", "decoder_dim", "decoder_heads"):
                if getattr(self, key) is not None:
                    yield Problem(f"task.{key}", getattr(self, key), f"{self.method} has no decoder but one layer", f"task.{key}=null")
        if patch and size % patch == 0:
            yield from self.grid_problems(patch, size)

    def grid_problems(self, patch: int, size: int) -> Iterator[Problem]:
        """What is wrong between mask, patches and image."""
        unit = self.unit(patch, size)
        if unit % patch or size % unit:
            units = [u for u in range(patch, size, patch) if size % u == 0] or [patch]
            near = min(units, key=lambda u: abs(u - unit))
            reason = f"a unit consists of whole patches of {patch} pixels, and an image of {size} of whole units"
            yield Problem("task.mask_unit", unit, reason, f"task.mask_unit={near}")
            return
        units = (size // unit) ** 2
        if not 0 < self.num_visible(units) < units:
            seen = "nothing to see" if self.num_visible(units) <= 0 else "nothing to fill in"
            reason = f"of an image of {units} units ({unit} of {size} pixels) it leaves {seen}"
            fix = "task.mask_ratio=0.5" if units > 1 else f"dataset.image_size={size * 2}"
            yield Problem("task.mask_ratio", self.ratio, reason, fix)


def no_transformer(name: str) -> Problem:
    reason = "mae shows its encoder the visible patches alone, which takes a plain ViT of timm's; a convolution would see the holes"
    return Problem("model.name", name, reason, "model=vit_s, or task.method=simmim model=timm model.name=swin_tiny_patch4_window7_224")
