"""Config of the classification task. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trainer.config import RunConfig, TaskConfig, schema, setting
from trainer.errors import Problem

if TYPE_CHECKING:
    from tasks.classification.task import Classification
    from trainer.task import DataInfo


@schema("task", "classification")
@dataclass
class ClassificationConfig(TaskConfig):
    """One label per image: softmax cross-entropy, or binary cross-entropy of each class."""

    needs: ClassVar[frozenset[str]] = frozenset({"image", "label"})
    asks: ClassVar[frozenset[str]] = frozenset({"classifier"})

    label_smoothing: float = setting(0.0, "share of the target spread evenly over all classes (arXiv:1512.00567, sec. 7)", ge=0, lt=1)

    loss: str = setting(
        "cross_entropy",
        "cross_entropy: one class excludes the others; bce: binary cross-entropy of every class for itself (arXiv:2110.00476, sec. 3)",
        choices=["cross_entropy", "bce"],
    )
    bce_threshold: float | None = setting(
        None, "targets above this count as 1, the others as 0 (only with loss=bce); mixed images then are of both classes; null = soft targets", ge=0, lt=1
    )  # fmt: skip
    bce_sum: bool = setting(False, "sum the binary losses over the classes instead of taking their mean: C times the gradient")
    head_batch_norm: bool = setting(
        False,
        "normalise features over the batch, without scale or shift, before the classifier: for linear probes (arXiv:2111.06377, app. A.1)",
    )
    tta: str = setting(
        "none",
        "test-time augmentation: validate and predict by the mean probability of several views of an image. flip: it and its mirror image; crops: both of the whole image, and of its corners and centre at 8/7 of their size",
        choices=["none", "flip", "crops"],
    )

    mesa_weight: float = setting(
        0.0,
        "weight of MESA (arXiv:2205.14083, sec. 4.2): a divergence from the softened predictions of an average of the network's own weights, which makes for flat minima; 0 = off",
        ge=0,
    )
    mesa_start: float = setting(5.0, "epochs before MESA begins", ge=0)
    mesa_decay: float = setting(0.9995, "decay per optimizer step of the average that MESA compares with", ge=0, lt=1)
    mesa_temperature: float = setting(5.0, "temperature that both predictions are softened with", gt=0)

    def build(self, run: RunConfig, data: DataInfo) -> Classification:
        from tasks.classification.head import normalize_input
        from tasks.classification.task import Classification

        model = run.model.build(num_classes=len(data.classes), image_size=run.dataset.image_size, in_channels=data.channels)
        if self.head_batch_norm:
            normalize_input(model, run.model.name)
        return Classification(model, self, data.classes)

    def beyond_one_view(self) -> str:
        return "" if self.tta == "none" else f"task.tta={self.tta}"

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        if self.loss != "bce":
            for name in ("bce_threshold", "bce_sum"):
                if getattr(self, name) not in (None, False):
                    yield Problem(f"task.{name}", getattr(self, name), f"has no effect with task.loss={self.loss}", "task.loss=bce")
        if self.head_batch_norm and run.loop.freeze_batchnorm:
            reason = "loop.freeze_batchnorm would keep the statistics of the classifier's input, of which there are none yet"
            yield Problem("task.head_batch_norm", True, reason, "loop.freeze_batchnorm=false: loop.freeze_to=backbone freezes the others")
        classes = run.dataset.facts().num_classes
        if classes is not None and classes < 2:
            reason = f"has {classes} class: a classifier needs at least two to tell apart"
            yield Problem("dataset.path", run.dataset.path, reason, "dataset.path=<a folder that holds one folder for each class>")
