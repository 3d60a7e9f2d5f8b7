"""Config of part discovery. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from trainer.config import RunConfig, TaskConfig, schema, setting
from trainer.errors import Problem

if TYPE_CHECKING:
    from tasks.part_discovery.task import PartDiscovery
    from trainer.task import DataInfo


@dataclass
class LossConfig(TaskConfig):
    """The weights of the loss's terms, 0 = not computed, and their variants. Defaults are the paper's (arXiv:2506.08915)."""

    label_smoothing: float = setting(0.0, "share of the target spread evenly over all classes", ge=0, lt=1)
    stage_2_weight: float = setting(1.0, "weight of the second stage's classification", ge=0)
    stage_1_weight: float = setting(1.0, "weight of the first stage's classification", ge=0)
    orthogonality_weight: float = setting(1.0, "weight of: features of different parts are orthogonal", ge=0)
    orthogonality_axis: str = setting(
        "parts", "what is orthogonal: parts, as in the paper, or channels, as its published code has it", choices=["parts", "channels"]
    )
    equivariance_weight: float = setting(1.0, "weight of: maps turn with the image", ge=0)
    equivariance_rotation: float = setting(90.0, "largest rotation either way, in degrees", ge=0, le=180)
    equivariance_translation: float = setting(0.11, "largest shift, as a fraction of the image's side", ge=0, le=1)
    equivariance_zoom: list[float] = setting([0.8, 1.4], "scale, [smallest, largest]", gt=0, length=2)
    presence_weight: float = setting(1.0, "weight of: every part is somewhere in the batch", ge=0)
    presence_type: str = setting(
        "original", "how that is measured (docs/part-discovery.md)", choices=["original", "soft_constraint", "tanh", "soft_tanh"]
    )
    presence_scope: str = setting(
        "global", "the batch whose images may show a part: global = over all ranks; rank = each rank's share, as published", choices=["global", "rank"]
    )  # fmt: skip
    enforced_presence_weight: float = setting(2.0, "weight of: every image has background", ge=0)
    enforced_presence_type: str = setting(
        "enforced_presence",
        "enforced_presence: near the border; log, linear, mse: anywhere",
        choices=["enforced_presence", "log", "linear", "mse"],
    )
    total_variation_weight: float = setting(1.0, "weight of: maps are smooth", ge=0)
    entropy_weight: float = setting(1.0, "weight of: a place belongs to one part", ge=0)
    concentration_weight: float = setting(0.0, "weight of: a part is in one place", ge=0)
    terms_warmup: float = setting(
        0.0, "fraction of the run over which all terms but the classifications grow to their weights: features first, where they are random", ge=0, lt=1
    )  # fmt: skip

    def weights(self) -> dict[str, float]:
        return {f.name.removesuffix("_weight"): getattr(self, f.name) for f in fields(self) if f.name.endswith("_weight")}


@schema("task", "part_discovery")
@dataclass
class PartDiscoveryConfig(LossConfig):
    """Parts found without labels for them, then a transformer that classifies from what the parts show (arXiv:2506.08915)."""

    needs: ClassVar[frozenset[str]] = frozenset({"image", "label"})

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        """The second stage needs tokens; one stage alone is content with a map."""
        return frozenset({"pyramid"} if self.stages == 1 else {"features"})

    num_parts: int = setting(help="parts to find, besides the background", ge=2)
    stage_1_blocks: int | None = setting(
        None,
        "transformer blocks of the first stage's network; null = all, and none after a model.conv_stem: without pretraining blocks teach every place the class, and parts come to say it by where they are",
        ge=0,
    )
    stages: int = setting(2, "2: a second network sees the parts alone; 1: the first stage is all there is (arXiv:2407.04538)", ge=1, le=2)

    gumbel: bool = setting(True, "Gumbel noise on the part logits in training (arXiv:1611.01144)")
    gumbel_at_eval: bool = setting(False, "noise in evaluation too, as published; from each image's own key, so repeats agree")
    temperature: float = setting(1.0, "temperature of the softmax over parts", gt=0)
    pool: str = setting(
        "mean", "a part's feature: mean over all places of map times feature, or masked_mean, over the map's own mass", choices=["mean", "masked_mean"]
    )  # fmt: skip
    modulation: str = setting(
        "layer_norm",
        "what tells the parts' features apart before they share a classifier",
        choices=["layer_norm", "original", "none", "parallel_mlp"],
    )
    part_dropout: float = setting(0.3, "probability that the first stage's classifier misses a part", ge=0, lt=1)
    part_dropout_stage_2: float = setting(0.3, "probability that a part is hidden from the second stage", ge=0, lt=1)
    mask_gradient: str = setting(
        "straight_through",
        "what the second stage teaches the first: straight_through: hard masks, gradients of soft ones; none: hard masks, no gradient, as published; soft: soft masks",
        choices=["straight_through", "none", "soft"],
    )
    bounded_mask_gradient: bool = setting(
        False,
        "with straight_through: a hidden place gets no more gradient than the seen place of its image that gets most; unbounded, a few hidden tokens that a query fits can drown everything else",
    )
    prune: bool | None = setting(
        None,
        "compute of hidden tokens only what the result needs; null = in evaluation, and in training on a CPU; true = always, though an accelerator is waited for once a step; false = never",
        identity=False,
    )
    drop_path_stage_1: float = setting(0.0, "stochastic depth of the first stage's last block, as a probability", ge=0, lt=1)
    drop_path_stage_2: float = setting(0.0, "stochastic depth of the second stage's last block, as a probability", ge=0, lt=1)

    freeze_stage_1: bool = setting(False, "keep the first stage's network as it is, but for its tokens and position embeddings")
    freeze_stage_1_tokens: bool = setting(False, "with freeze_stage_1: these too")
    freeze_stage_2: bool = setting(False, "keep the second stage's network as it is, but for its tokens and position embeddings")
    freeze_stage_2_tokens: bool = setting(False, "with freeze_stage_2: these too")

    scratch_lr_factor: float = setting(help="times the learning rate: both classifiers", gt=0)
    modulation_lr_factor: float = setting(help="times the learning rate: the modulation", gt=0)
    finer_lr_factor: float = setting(help="times the learning rate: the prototypes", gt=0)
    stage_two_lr_factor: float = setting(1.0, "times the learning rate: the second stage's network", gt=0)

    remove_parts: list[int] = setting([], "in evaluation, parts whose places count as background, from 0", ge=0)
    leave_one_out: bool = setting(
        False, "in `python -m trainer evaluate`, a table of the scores without each part in turn, leave_one_out.csv; costs a pass of the second stage for each"
    )  # fmt: skip
    part_thresholds: list[float] | None = setting(
        None, "in evaluation, the least z · p with which a place belongs to each part; one number a part; null = off"
    )
    threshold_quantile: float | None = setting(
        None, "in evaluation, thresholds that this share of each part's own training places does not reach; null = off", gt=0, lt=1
    )
    keypoint_regression: bool = setting(
        True, "evaluation with named parts and boxes also shows the training images, to fit val/keypoint_nmse"
    )
    preview_images: int = setting(16, "images in the picture of part maps", ge=1, identity=False)

    def whole_batch(self) -> str:
        return f"task.presence_weight={self.presence_weight:g}" if self.presence_weight else ""

    def warnings(self, run: RunConfig) -> Iterator[str]:
        if not (run.model.pretrained or run.init_from) and (self.scratch_lr_factor > 1 or self.freeze_stage_1):
            yield (
                "model.pretrained=false: these are values for pretrained networks, which hardly move or are frozen, and here they are random; "
                "model=dinov2_vit_b model.pretrained=true, or begin with experiment=parts_cub10, which learns from scratch"
            )
        if self.stages == 2 and self.mask_gradient == "straight_through" and run.precision.autocast == "float16":
            yield (
                "precision.autocast=float16: the weight of a hidden token, 1e-10, is zero there, so task.mask_gradient=straight_through teaches at "
                "seen places alone; precision=bf16 and fp32 can hold it"
            )

    def build(self, run: RunConfig, data: DataInfo) -> PartDiscovery:
        from tasks.part_discovery.task import build

        return build(self, run, data)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        classes = run.dataset.facts().num_classes
        if classes is not None and classes < 2:
            yield Problem("dataset.path", run.dataset.path, f"has {classes} class: parts are found by telling at least two apart")
        yield from self._mask_problems()
        yield from self._frozen_problems()
        yield from self._intervention_problems()
        if self.equivariance_zoom[0] > self.equivariance_zoom[1]:
            low, high = self.equivariance_zoom
            yield Problem(
                "task.equivariance_zoom", [low, high], "goes from the smallest to the largest", f"task.equivariance_zoom=[{high},{low}]"
            )
        for name in ("drop_path_stage_1", "drop_path_stage_2"):
            if getattr(self, name) and not hasattr(run.model, "drop_path_rate"):
                yield Problem(f"task.{name}", getattr(self, name), "this network has no stochastic depth", f"task.{name}=0")
        patch = run.model.input_multiple
        if patch and run.dataset.image_size // patch < 3:
            size, reason = run.dataset.image_size, f"makes fewer than 3 x 3 patches of {patch} pixels, and presence looks at 3 x 3 at once"
            yield Problem("dataset.image_size", size, reason, f"dataset.image_size={3 * patch}")

    def _mask_problems(self) -> Iterator[Problem]:
        if self.prune and self.mask_gradient == "soft":
            reason = "soft masks hide no token for good, so none can be left out"
            yield Problem("task.prune", True, reason, "task.prune=false, or task.mask_gradient=straight_through")
        if self.stages == 1 and self.stage_1_weight == 0:
            yield Problem("task.stage_1_weight", 0.0, "with one stage nothing else learns classes", "task.stage_1_weight=1")
        if self.stages == 2 and self.stage_2_weight == 0:
            yield Problem("task.stage_2_weight", 0.0, "the second stage would learn nothing", "task.stages=1, or task.stage_2_weight=1")

    def _frozen_problems(self) -> Iterator[Problem]:
        for stage in (1, 2):
            name = f"freeze_stage_{stage}"
            if getattr(self, f"{name}_tokens") and not getattr(self, name):
                yield Problem(f"task.{name}_tokens", True, f"goes with task.{name}", f"task.{name}=true")
        if self.freeze_stage_2 and self.stages == 1:
            yield Problem("task.freeze_stage_2", True, "there is one stage", "task.freeze_stage_2=false")

    def _intervention_problems(self) -> Iterator[Problem]:
        wrong = sorted({part for part in self.remove_parts if part >= self.num_parts})
        if wrong:
            reason = f"the {self.num_parts} parts are 0 to {self.num_parts - 1}"
            yield Problem("task.remove_parts", self.remove_parts, reason, f"task.remove_parts=[{self.num_parts - 1}]")
        elif self.remove_parts and len(set(self.remove_parts)) == self.num_parts:
            yield Problem("task.remove_parts", self.remove_parts, "leaves no part to see", "task.remove_parts=[0]")
        elif self.leave_one_out and len(set(self.remove_parts)) == self.num_parts - 1:
            yield Problem("task.leave_one_out", True, "one part is left, and nothing would be without it", "task.remove_parts=[]")
        if self.part_thresholds is not None and len(self.part_thresholds) != self.num_parts:
            yield Problem("task.part_thresholds", self.part_thresholds, f"needs a number for each of {self.num_parts} parts")
        if self.part_thresholds is not None and self.threshold_quantile is not None:
            yield Problem("task.threshold_quantile", self.threshold_quantile, "thresholds are given already", "task.part_thresholds=null")
