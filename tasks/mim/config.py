"""Config of masked image modelling. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trainer.config import RunConfig, TaskConfig, schema, setting
from trainer.config.model import TimmModel
from trainer.errors import Problem

if TYPE_CHECKING:
    from tasks.mim.task import Mim
    from trainer.task import DataInfo

# The share of an image that is hidden: MAE, arXiv:2111.06377, sec. 4; SimMIM, arXiv:2111.09886, sec. 4.1; FCMAE, arXiv:2301.00808,
# sec. 3.1; CrossMAE, arXiv:2401.14391, sec. 4.1.
RATIOS = {"mae": 0.75, "simmim": 0.6, "fcmae": 0.6, "crossmae": 0.75}
PREDICTED = 0.25  # share of an image's patches that CrossMAE predicts in a step (its sec. 4.1)
_CONVOLUTIONAL = re.compile(
    r"(res|conv|dense|mobile|efficient|reg|ghost|vgg|inception|xception|dark|dla|hrnet|lcnet|sk|ecares|rexnet|small_res)"
)


@schema("task", "mim")
@dataclass
class MimConfig(TaskConfig):
    """Masked image modelling: hide most of an image, learn by filling it in. Needs no labels; where there are some, k-NN judges."""

    asks: ClassVar[frozenset[str]] = frozenset({"features"})

    method: str = setting(
        "mae",
        "mae: a ViT sees the visible patches only, a small decoder the rest; crossmae: the same with a decoder that fills in some hidden patches, "
        "each by itself; simmim: a ViT, BEiT, EVA, Swin or Hiera sees a token in the place of each hidden patch; fcmae: a ConvNeXt sees nothing in their place",
        choices=list(RATIOS),
    )
    mask_ratio: float | None = setting(
        None, "share of an image that is hidden; null = the method's own: mae and crossmae 0.75, simmim and fcmae 0.6", gt=0, lt=1
    )
    mask_unit: int | None = setting(
        None,
        "side in pixels of what is hidden or shown as a whole; null = the method's own: simmim at most a sixth of the image (32 of 192), the others "
        "a patch (fcmae: a place of the last feature map)",
        ge=1,
    )
    mask: str = setting("random", "random: every unit alike; block: rectangles, one over the other", choices=["random", "block"])
    normalize_pixels: bool | None = setting(
        None, "predict each patch less its mean, over its standard deviation; null = the method's own: simmim false, the others true"
    )
    decoder_depth: int | None = setting(
        None,
        "blocks of the decoder; null = mae: two thirds of the encoder's, at most 8; crossmae: the encoder's, at most 12; fcmae: 1",
        ge=1,
    )
    decoder_dim: int | None = setting(None, "width of the decoder; null = two thirds of the encoder's, at most 512; fcmae: 512", ge=8)
    decoder_heads: int | None = setting(None, "mae, crossmae: attention heads of the decoder; null = one for each 32 of its width", ge=1)
    predicted_ratio: float | None = setting(
        None, f"crossmae: share of an image's patches that is predicted in a step; null = {PREDICTED}, at most task.mask_ratio", gt=0, lt=1
    )
    knn_neighbours: int = setting(20, "neighbours that vote on a validation image's class, where there are labels", ge=1)

    @property
    def ratio(self) -> float:
        return RATIOS[self.method] if self.mask_ratio is None else self.mask_ratio

    @property
    def normalizes(self) -> bool:
        return self.method != "simmim" if self.normalize_pixels is None else self.normalize_pixels

    def unit(self, patch: int, image_size: int) -> int:
        """Side of a unit of the mask in pixels, for patches of this size."""
        if self.mask_unit is not None:
            return self.mask_unit
        if self.method != "simmim":
            return patch
        # 32 pixels of SimMIM's 192; a unit is made of whole patches, and the image of whole units.
        sizes = [u for u in range(patch, image_size + 1, patch) if image_size % u == 0 and u <= image_size / 6]
        return max(sizes, default=patch)

    def num_visible(self, num_units: int) -> int:
        """Units of an image that stay visible, rounded as the methods' authors do."""
        if self.method == "simmim":
            return num_units - math.ceil(num_units * self.ratio)
        return int(num_units * (1 - self.ratio))

    def num_predicted(self, num_patches: int, num_hidden: int) -> int:
        """Of an image's hidden patches, how many are predicted in a step."""
        if self.method != "crossmae":
            return num_hidden
        return min(num_hidden, max(1, int(num_patches * (self.predicted_ratio or PREDICTED))))

    def decoder_size(self, width: int, depth: int) -> tuple[int, int, int]:
        """Width, blocks and heads of a decoder behind an encoder of this width and depth: 512, 8 (CrossMAE: 12) and 16 for ViT-B and -L."""
        dim = self.decoder_dim or min(512, max(64, width * 2 // 3 // 64 * 64))
        blocks = min(12, depth) if self.method == "crossmae" else min(8, max(1, depth * 2 // 3))
        return dim, self.decoder_depth or blocks, self.decoder_heads or max(1, dim // 32)

    def build(self, run: RunConfig, data: DataInfo) -> Mim:
        from tasks.mim.build import build

        return build(self, run, data)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        name, size, patch = run.model.name, run.dataset.image_size, run.model.input_multiple
        if self.method in ("mae", "crossmae") and _CONVOLUTIONAL.match(name):
            yield no_transformer(name, self.method)
        if self.method == "fcmae" and isinstance(run.model, TimmModel) and "convnext" not in name:
            yield no_convnext(name)
        yield from self._unused()
        if self.method == "crossmae" and self.predicted_ratio is not None and self.predicted_ratio > self.ratio:
            reason = f"no more can be predicted than is hidden, task.mask_ratio={self.ratio:g}"
            yield Problem("task.predicted_ratio", self.predicted_ratio, reason, f"task.predicted_ratio={self.ratio:g}")
        if patch and size % patch == 0 and self.method != "fcmae":  # whose places only the network tells
            yield from self.grid_problems(patch, size)

    def _unused(self) -> Iterator[Problem]:
        """Settings that the method has no use for."""
        unused = {"predicted_ratio": "predicts all that is hidden"} if self.method != "crossmae" else {}
        if self.method == "simmim":
            unused |= dict.fromkeys(("decoder_depth", "decoder_dim", "decoder_heads"), "has no decoder but one layer")
        if self.method == "fcmae":
            unused["decoder_heads"] = "has a decoder of convolutions, without attention"
        for key, why in unused.items():
            if getattr(self, key) is not None:
                yield Problem(f"task.{key}", getattr(self, key), f"{self.method} {why}", f"task.{key}=null")

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


def no_transformer(name: str, method: str = "mae", *, patches: bool = False) -> Problem:
    """`patches`: it begins with them, as BEiT, EVA, Swin and Hiera do, which need every place on the way through their blocks."""
    if patches:
        reason = f"{method} shows its encoder the visible patches alone, which takes a plain ViT of timm's; this network counts on all being there"
        return Problem("model.name", name, reason, "task.method=simmim, which takes networks of patches, or model=vit_s")
    reason = f"{method} shows its encoder the visible patches alone, which takes a plain ViT of timm's; a convolution would see the holes"
    fix = "model=vit_s, or task.method=fcmae for a ConvNeXt, or task.method=simmim model=timm model.name=swin_tiny_patch4_window7_224"
    return Problem("model.name", name, reason, fix)


def no_convnext(name: str) -> Problem:
    reason = "fcmae keeps what is hidden out of every convolution of a ConvNeXt of timm's that begins with patches"
    return Problem("model.name", name, reason, "model=convnextv2_micro, or model=timm model.name=convnextv2_tiny; a ViT: task.method=mae")
