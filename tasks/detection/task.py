"""Detection: the loss terms of torchvision's detectors, summed, and COCO's scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tasks.detection.config import DetectionConfig
from tasks.detection.evaluation import CocoEvaluator
from trainer.task import Batch, Progress, StepOutput, Task


class Detection(Task):
    """A detector and what a batch is to it.

    With micro-batches and ranks every part's loss counts by its images, whatever number of objects they show: an image
    without any teaches as much as one that is full.
    """

    main_metric = "val/map"
    higher_is_better = True

    def __init__(self, model: nn.Module, cfg: DetectionConfig, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.cfg, self.classes, self.mean, self.std = cfg, tuple(classes), tuple(mean), tuple(std)
        self.offset = 1 if cfg.is_rcnn else 0  # two-stage detectors keep class 0 for the background

    def compiled_parts(self) -> Sequence[nn.Module]:
        return [self.model.get_submodule("backbone")]  # the rest is made of shapes that depend on the data

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        targets = [{"boxes": b, "labels": n + self.offset} for b, n in zip(batch["boxes"], batch["labels"], strict=True)]
        losses: dict[str, Tensor] = self.model(pictures(batch), targets)
        return StepOutput(torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()})

    def evaluator(self) -> CocoEvaluator:
        return CocoEvaluator(self.model, self.cfg, self.classes, offset=self.offset, mean=self.mean, std=self.std)


def pictures(batch: Batch) -> list[Tensor]:
    """Each image without what pads it, [C, h, w]; `size` is known on the host, so nothing waits for the device."""
    images: Tensor = batch["image"]
    return [image[:, :h, :w] for image, (h, w) in zip(images, batch["size"], strict=True)]
