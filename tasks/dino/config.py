"""Config of the DINO task. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trainer.config import RunConfig, TaskConfig, schema, setting
from trainer.errors import Problem

if TYPE_CHECKING:
    from tasks.dino.task import Dino
    from trainer.task import DataInfo


@dataclass(frozen=True)
class Parts:
    """What a method is made of."""

    patch_weight: float  # of the loss at hidden patches; 0 = none are hidden
    koleo_weight: float
    centering: str
    separate_heads: bool


METHODS = {
    "dino": Parts(0.0, 0.0, "mean", False),
    "ibot": Parts(1.0, 0.0, "mean", False),  # arXiv:2111.07832
    "dinov2": Parts(1.0, 0.1, "sinkhorn", True),  # arXiv:2304.07193, sec. 4
}


@schema("task", "dino")
@dataclass
class DinoConfig(TaskConfig):
    """Self-distillation without labels (DINO, arXiv:2104.14294): a student learns to say of small views of an image what a
    teacher, the average of its own past, says of large ones."""

    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    asks: ClassVar[frozenset[str]] = frozenset({"features"})
    views: ClassVar[bool] = True

    method: str = setting(
        "dino",
        "dino: views of an image; ibot: hidden patches of the large views too; dinov2: both, with balanced assignments, a head of "
        "its own for patches, and features kept apart (koleo)",
        choices=list(METHODS),
    )
    patch_weight: float | None = setting(None, "weight of the loss at hidden patches, 0 = none hidden; null = the method's", ge=0)
    koleo_weight: float | None = setting(
        None, "weight of the loss that keeps features of different images apart; null = the method's", ge=0
    )
    centering: str | None = setting(
        None,
        "mean: the teacher's scores less their running mean; sinkhorn: balanced over each step's batch; null = the method's",
        choices=["mean", "sinkhorn"],
    )
    separate_heads: bool | None = setting(None, "a head of its own for patches; null = the method's")
    mask_probability: float = setting(0.5, "probability that patches of a large view are hidden at all", ge=0, le=1)
    mask_ratio: list[float] = setting([0.1, 0.5], "share of patches that is then hidden, [smallest, largest]", gt=0, lt=1, length=2)

    out_dim: int = setting(help="prototypes: width of the head's output", ge=2)
    hidden_dim: int = setting(2048, "width of the head's hidden layers", ge=1)
    bottleneck_dim: int = setting(256, "width of the head before its prototypes", ge=1)
    head_layers: int = setting(3, "layers of the head before its prototypes", ge=1)
    head_batch_norm: bool = setting(
        False,
        "batch normalisation in the head's hidden layers: features of small networks, which all look alike at first, are told apart much sooner",
    )
    norm_last_layer: bool = setting(
        True, "keep the prototypes' lengths at 1; false trains them: better for ViT-S, unstable for larger ones"
    )
    freeze_last_layer_epochs: float = setting(1.0, "epochs at the start in which the prototypes do not move", ge=0)

    momentum: float = setting(
        help="how much of itself the teacher keeps at each optimizer step, rising to 1 along a cosine; smaller for shorter runs", ge=0, le=1
    )
    student_temperature: float = setting(0.1, "the student's softmax temperature", gt=0)
    teacher_temperature: float = setting(0.04, "the teacher's softmax temperature; lower is sharper", gt=0)
    warmup_teacher_temperature: float = setting(0.04, "the teacher's temperature at the start of its warm-up", gt=0)
    warmup_teacher_temperature_epochs: int = setting(0, "epochs in which the teacher's temperature moves there in a line", ge=0)
    center_momentum: float = setting(0.9, "how much of itself the centre of the teacher's scores keeps at each optimizer step", ge=0, lt=1)

    knn_neighbours: int = setting(20, "neighbours that vote in val/knn_top1", ge=1)
    linear_probe: bool = setting(True, "fit a linear classifier on the features at each validation, for val/linear_top1")

    @property
    def parts(self) -> Parts:
        """The method's, but for what is set by itself."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Parts)}
        return dataclasses.replace(METHODS[self.method], **{name: value for name, value in own.items() if value is not None})

    def build(self, run: RunConfig, data: DataInfo) -> Dino:
        from tasks.dino.build import build

        return build(self, run, data)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from self._views(run)
        size = run.loop.batch_size
        if size < 2:
            yield Problem(
                "loop.batch_size", size, "the centre of one image's scores is those scores: nothing is left", "loop.batch_size=64"
            )
        images = run.dataset.facts().num_train
        if images is not None and images < 2:
            key = "dataset.path" if run.dataset.on_disk else "dataset"
            yield Problem(key, run.dataset.path, f"has {images} image to train on; images are told apart from one another", "more images")
        if run.loop.ema_decay is not None:
            reason = "the teacher is the average of the student's weights already, and it is what is evaluated and exported"
            yield Problem("loop.ema_decay", run.loop.ema_decay, reason, "loop.ema_decay=null, and task.momentum sets the teacher's")
        yield from self._patches(run)
        epochs = None if run.loop.steps else run.loop.num_epochs
        warmup = self.warmup_teacher_temperature_epochs
        if epochs is not None and warmup > epochs:
            reason = f"the run ends after {epochs} epochs"
            yield Problem("task.warmup_teacher_temperature_epochs", warmup, reason, f"task.warmup_teacher_temperature_epochs={epochs}")

    def _patches(self, run: RunConfig) -> Iterator[Problem]:
        """What hidden patches, and whatever looks at a whole batch, ask for."""
        low, high = self.mask_ratio
        if low > high:
            yield Problem("task.mask_ratio", self.mask_ratio, "goes from the smallest to the largest", f"task.mask_ratio=[{high},{low}]")
        if self.parts.patch_weight and run.model.input_multiple is None and "vit" not in run.model.name:
            reason = f"task.method={self.method} hides patches, and model.name={run.model.name} has none: it takes a ViT"
            yield Problem("model.name", run.model.name, reason, "model=vit_s, or task.method=dino")
        size, cut = run.loop.batch_size, run.loop.accumulate
        if size >= 2 and size // cut < 2 and (self.parts.koleo_weight or self.parts.centering == "sinkhorn"):
            reason = f"micro-batches of {size // cut} image have no other to be compared with"
            yield Problem("loop.accumulate", cut, reason, f"loop.accumulate={max(1, size // 2)}")

    def _views(self, run: RunConfig) -> Iterator[Problem]:
        """Small views are no larger than large ones, and whole patches."""
        local, large = getattr(run.augmentation, "local_size", None), run.dataset.image_size
        if local is None or not getattr(run.augmentation, "local_crops", 0):
            return
        if local > large:
            reason = f"small views are larger than the large ones of {large} pixels (dataset.image_size)"
            yield Problem("augmentation.local_size", local, reason, f"augmentation.local_size={max(1, round(large * 3 / 7))}")
        multiple = run.model.input_multiple
        if multiple and local % multiple:
            near = max(multiple, round(local / multiple) * multiple)
            reason = f"model={run.model.name} cuts images into patches of {multiple} pixels"
            yield Problem("augmentation.local_size", local, reason, f"augmentation.local_size={near}")
