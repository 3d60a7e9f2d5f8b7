"""Config of knowledge distillation. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from trainer.config import Resume, RunConfig, TaskConfig, schema, setting
from trainer.config.model import TimmModel
from trainer.config.names import nearest
from trainer.errors import Problem
from trainer.rundir import RunDirectory, run_directory

if TYPE_CHECKING:
    from tasks.kd.task import Kd
    from trainer.task import DataInfo

TIMM = "timm:"
DISTILLED = "deit_tiny_distilled_patch16_224"


@schema("task", "kd")
@dataclass
class KdConfig(TaskConfig):
    """A student learns from labels and from what a trained network, the teacher, says of the same images."""

    asks: ClassVar[frozenset[str]] = frozenset({"classifier"})

    method: str = setting(
        "soft",
        "soft: the teacher's probabilities at task.temperature; hard: the class it finds likeliest; deit: the same, told to the distillation token; embedding: its features",
        choices=["soft", "hard", "deit", "embedding"],
    )
    teacher: Any = setting(
        None,
        "a run directory, a checkpoint of one, timm:<name>, timm:<name>@<file of weights>, a TorchScript or .pt2 file, or a list of several; null = train a small one first, once, and keep it",
    )
    teacher_model: str = setting("resnet10t", "timm's name of the network that is trained first where no teacher is given")
    weight: float = setting(
        0.5, "share of the teacher in the loss: (1 - weight) * labels + weight * teacher; 1 needs no labels, 0 no teacher", ge=0, le=1
    )
    temperature: float = setting(5.0, "soft: logits are divided by this before they become probabilities (arXiv:1503.02531)", gt=0)
    feature_weight: float = setting(0.0, "times the distance between the features of both, added to the loss of any method", ge=0)
    normalize_features: bool = setting(True, "compare features by direction: both scaled to length 1 first")
    label_smoothing: float = setting(0.0, "share of the target spread evenly over all classes, for the labels' part", ge=0, lt=1)
    num_classes: int | None = setting(None, "classes of data without labels: as many as the teacher has; null = the data's", ge=2)
    teacher_size: int | None = setting(None, "side in pixels of the images the teacher sees; null = what it was trained on", ge=1)
    teacher_mean: list[float] | None = setting(None, "mean per channel of the teacher's images; null = what it was trained on")
    teacher_std: list[float] | None = setting(
        None, "standard deviation per channel of the teacher's images; null = what it was trained on", gt=0
    )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        """Labels, unless the teacher alone is listened to."""
        return frozenset({"image", "label"} if self.weight < 1 else {"image"})

    @property
    def uses_teacher(self) -> bool:
        return self.weight > 0 or self.feature_weight > 0

    @property
    def uses_features(self) -> bool:
        return self.feature_weight > 0 or (self.method == "embedding" and self.weight > 0)

    def teachers(self, run: RunConfig) -> list[str]:
        """Where each teacher is found."""
        if not self.uses_teacher:
            return []
        if self.teacher is None:
            return [str(run_directory(needed)) for needed in self.prerequisites(run)]
        return [self.teacher] if isinstance(self.teacher, str) else list(self.teacher)

    def prerequisites(self, run: RunConfig) -> Sequence[RunConfig]:
        """The small teacher: the same data, augmentation and length, labels alone, one seed for all."""
        if self.teacher is not None or not self.uses_teacher:
            return []
        alone = KdConfig(weight=0.0, label_smoothing=self.label_smoothing)
        # Frozen parts, and rates of some parameters, speak of the student, which may start from somewhere: all of the teacher is new.
        stages = [dataclasses.replace(stage, freeze_to=None) for stage in run.loop.stages]
        loop = dataclasses.replace(run.loop, freeze_to=None, freeze=[], freeze_batchnorm=False, stages=stages)
        teacher = dataclasses.replace(
            run, name=f"teacher-{self.teacher_model}".replace("/", "-"), version="s0", seed=0, resume=Resume.auto, init_from=None,
            task=alone, model=TimmModel(name=self.teacher_model), loop=loop,
            optimizer=dataclasses.replace(run.optimizer, rules=[], layer_decay=None, backbone_lr=None),
        )  # fmt: skip
        return [teacher]

    def for_inference(self) -> Self:
        return dataclasses.replace(self, teacher=[])

    def build(self, run: RunConfig, data: DataInfo) -> Kd:
        from tasks.kd.build import build

        return build(self, run, data)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        if self.method == "deit" and not ("distilled" in run.model.name and isinstance(run.model, TimmModel)):
            reason = "deit speaks to a distillation token, which only timm's …_distilled_… networks have"
            yield Problem("model.name", run.model.name, reason, f"model=timm model.name={DISTILLED}, or task.method=hard")
        if "label" not in run.dataset.offers and self.method != "embedding" and self.num_classes is None:
            reason = "the data have no labels: say how many classes the teacher tells apart"
            yield Problem("task.num_classes", None, reason, "task.num_classes=10")
        if self.teacher is not None and self.uses_teacher:
            yield from self._teacher_problems()
        if self.teacher is None and self.uses_teacher and "label" not in run.dataset.offers:
            yield Problem("task.teacher", None, "without labels none can be trained here", "task.teacher=<run directory>")

    def _teacher_problems(self) -> Iterator[Problem]:
        """What the file system tells."""
        several = [self.teacher] if isinstance(self.teacher, str) else self.teacher
        if not isinstance(several, Sequence) or not several or not all(isinstance(t, str) and t for t in several):
            yield Problem("task.teacher", self.teacher, "must be a text or a list of texts", "task.teacher=runs/<name>/<run>")
            return
        for teacher in several:
            path = teacher.partition("@")[2] if teacher.startswith(TIMM) else teacher
            if path:
                yield from _path_problems(teacher, Path(path).expanduser())


def _path_problems(teacher: str, path: Path) -> Iterator[Problem]:
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        fix = f"task.teacher={path.parent / near}" if near else "task.teacher=<run directory | file | timm:name>, or null"
        yield Problem("task.teacher", teacher, "there is no such file or directory", fix)
    elif path.is_dir() and not RunDirectory(path).has_checkpoint():
        yield Problem("task.teacher", teacher, "holds no checkpoints: it is no run, or one that has not got far", "task.teacher=null")
    elif path.suffix == ".safetensors" and not teacher.startswith(TIMM):
        reason = "holds weights alone: say of which network"
        yield Problem("task.teacher", teacher, reason, f"task.teacher=timm:<name>@{path}, or the run directory that it lies in")
