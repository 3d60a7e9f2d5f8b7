"""From a config to a task: the teachers first, as they say what the student has to match."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from tasks.kd.config import DISTILLED, KdConfig
from tasks.kd.task import Kd
from tasks.kd.teachers import Look, Teacher, open_teacher
from trainer.config import RunConfig
from trainer.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from trainer.task import DataInfo


def build(cfg: KdConfig, run: RunConfig, data: DataInfo) -> Kd:
    """The task, its teachers loaded and tried.

    Raises:
        ConfigError: a teacher cannot be had or does not fit the data, or the student cannot do what the method asks.
    """
    look = Look(run.dataset.image_size, run.dataset.mean, run.dataset.std)
    labelled = "label" in run.dataset.offers
    classes = data.classes if labelled else ()  # those of boxes, say, are no classes of images
    classes = classes or [str(i) for i in range(cfg.num_classes or 0)]
    num_classes = len(classes)
    model = run.model.build(num_classes=num_classes, image_size=run.dataset.image_size, in_channels=data.channels)
    if cfg.method == "deit" and not hasattr(model, "set_distilled_training"):
        reason = "has no distillation token, which deit speaks to"
        raise ConfigError(Problem("model.name", run.model.name, reason, f"model=timm model.name={DISTILLED}, or task.method=hard"))
    teachers = [open_teacher(source, cfg, look, data.channels) for source in cfg.teachers(run)]
    if cfg.method != "embedding" and cfg.weight > 0:
        for teacher in teachers:
            check_classes(teacher, classes, known=labelled)
    width = width_of(model, look, data.channels) if cfg.uses_features else 0
    return Kd(model, cfg, teachers, classes, student_width=width, labelled=labelled)


def width_of(network: nn.Module, look: Look, channels: int) -> int:
    """Of the features that it gives, found by giving it an image."""
    import torch

    from trainer.probe import features_and_output

    training = network.training
    with torch.no_grad():
        features, _ = features_and_output(network.eval(), torch.zeros(1, channels, look.size, look.size))
    network.train(training)
    return features.shape[1]


def check_classes(teacher: Teacher, classes: Sequence[str], *, known: bool) -> None:
    """A teacher of other classes, or of the same in another order, would teach nonsense."""
    fix = (
        "train one on these classes: task=classification, then task.teacher=<its run>; or task.method=embedding, which compares no classes"
    )
    if teacher.num_classes != len(classes):
        reason = f"tells {teacher.num_classes} classes apart, and the data have {len(classes)}"
        raise ConfigError(Problem("task.teacher", teacher.name, reason, fix))
    if teacher.classes and known and list(teacher.classes) != list(classes):
        pairs: Any = enumerate(zip_longest(teacher.classes, classes))
        place, theirs, ours = next((i, a, b) for i, (a, b) in pairs if a != b)
        reason = f"its class {place} is {theirs!r}, and that of the data is {ours!r}"
        raise ConfigError(Problem("task.teacher", teacher.name, reason, fix))
