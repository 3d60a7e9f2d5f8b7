"""Detection: the loss terms of torchvision's detectors, summed, and COCO's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tasks.detection.config import DetectionConfig
from tasks.detection.detectors import Detector
from tasks.detection.evaluation import CocoEvaluator
from tasks.detection.pictures import pictures
from trainer.task import Batch, Progress, StepOutput, Task

DIVISOR = 32  # pixels: torchvision pads a batch to multiples of it


class Detection(Task):
    """A detector and what a batch is to it.

    With micro-batches and ranks every part's loss counts by its images, whatever number of objects they show: an image
    without any teaches as much as one that is full.
    """

    main_metric = "val/map"
    backbone_name = "model.detector.backbone.body"  # what is above it, the pyramid of features too, is the detector's own
    higher_is_better = True

    def __init__(self, model: Detector, cfg: DetectionConfig, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.cfg, self.classes, self.mean, self.std = cfg, tuple(classes), tuple(mean), tuple(std)
        self.competing: Tensor | None = None  # [C] bool; None = all classes
        self.offset = int(cfg.counts_background)

    def compiled_parts(self) -> Sequence[nn.Module]:
        return [self.model.get_submodule("detector.backbone")]  # the rest is made of shapes that depend on the data

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        targets = [{"boxes": b, "labels": n + self.offset} for b, n in zip(batch["boxes"], batch["labels"], strict=True)]
        losses: dict[str, Tensor] = self.model(pictures(batch), targets)
        return StepOutput(torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()})

    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """boxes [D, 4], labels [D], scores [D] of each image [C, h, w], the surest first.

        An image is put among those that need the same padding, so what is found in it does not depend on its company.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(tuple(-(-side // DIVISOR) for side in image.shape[1:]), []).append(i)
        found: dict[int, dict[str, Tensor]] = {}
        for rows in groups.values():
            found |= zip(rows, self.model([images[i] for i in rows]), strict=True)
        if self.competing is not None:
            kept = {i: self.competing[result["labels"] - self.offset] for i, result in found.items()}
            found = {i: {name: value[kept[i]] for name, value in result.items()} for i, result in found.items()}
        return [found[i] for i in range(len(images))]

    def restrict(self, classes: Sequence[int]) -> None:
        device = next(self.model.parameters()).device
        self.competing = torch.zeros(len(self.classes), dtype=torch.bool, device=device)
        self.competing[list(classes)] = True

    def evaluator(self) -> CocoEvaluator:
        return CocoEvaluator(
            self.detect, self.cfg, self.classes, offset=self.offset, mean=self.mean, std=self.std, network=self.model
        )  # fmt: skip

    def predict(self, batch: Batch) -> list[list[dict[str, Any]]]:
        """Boxes of the network's image, and as left, top, right and bottom those of the file's."""
        rows = []
        for (h, w), (height, width), found in zip(batch["size"], batch["source_size"], self.detect(pictures(batch)), strict=True):
            factors = (width / w, height / h, width / w, height / h)
            objects = zip(*(found[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
            rows.append([
                {"predicted": self.classes[label - self.offset], "confidence": score, **dict(zip(("x1", "y1", "x2", "y2"), box)),
                 **dict(zip(("left", "top", "right", "bottom"), (side * factor for side, factor in zip(box, factors))))}
                for box, label, score in objects
            ])  # fmt: skip
        return rows
