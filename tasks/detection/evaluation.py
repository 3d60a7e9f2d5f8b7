"""COCO's scores over a validation set, the same whatever the number of ranks and the size of batches.

Results are gathered by the images' places in the dataset and scored once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.detection.coco import Found, Truth, coco_scores
from tasks.detection.config import DetectionConfig
from trainer.task import Batch, Report

Detect = Callable[[list[Tensor]], list[dict[str, Tensor]]]  # pictures -> boxes [D, 4], labels [D], scores [D] of each


class CocoEvaluator:
    """One pass. Truths and detections are in the pixels of the image files, which is what COCO's sizes are about."""

    def __init__(
        self,
        detect: Detect,
        cfg: DetectionConfig,
        classes: Sequence[str],
        *,
        offset: int,
        mean: Sequence[float],
        std: Sequence[float],
        network: nn.Module | None = None,
    ) -> None:
        self.detect, self.cfg, self.classes, self.offset = detect, cfg, classes, offset
        self.mean, self.std, self.network = mean, std, network
        self.results: dict[int, tuple[Truth, Found]] = {}  # by place in the dataset
        self.shown: list[tuple[Tensor, dict[str, Tensor], Tensor]] = []  # picture, what was found, true boxes, all on the canvas
        self.seconds = 0.0

    def update(self, batch: Batch) -> None:
        from tasks.detection.pictures import pictures

        images = pictures(batch)
        started = _now(images[0].device)
        found = self.detect(images)
        self.seconds += _now(images[0].device) - started
        self._keep(images, found, batch)
        for i, index in enumerate(batch["index"].tolist()):
            height, width = batch["source_size"][i]
            (h, w), result = batch["size"][i], found[i]
            factor = torch.tensor([width / w, height / h] * 2, dtype=torch.float64, device=result["boxes"].device)
            truth = _array(batch["truth"][i], np.float64)  # x, y, width, height, label, crowd, area
            self.results[index] = (
                Truth(truth[:, :4], truth[:, 4].astype(np.int64), truth[:, 5].astype(bool), truth[:, 6], int(batch["image_id"][i])),
                Found(_array(result["boxes"].double() * factor, np.float64), _array(result["labels"], np.int64) - self.offset, _array(result["scores"], np.float64)),
            )  # fmt: skip

    def _keep(self, images: Sequence[Tensor], found: Sequence[dict[str, Tensor]], batch: Batch) -> None:
        for image, result, boxes in zip(images, found, batch["boxes"], strict=True):
            if len(self.shown) < self.cfg.num_previews:
                self.shown.append((image.float().cpu(), {k: v.cpu() for k, v in result.items()}, boxes.cpu()))

    def compute(self) -> dict[str, float]:
        results, seconds = self.results, self.seconds
        if dist.is_initialized():
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.gather_object((self.results, self.seconds), everyone if dist.get_rank() == 0 else None)
            if dist.get_rank() == 0:
                results = {index: pair for part, _ in everyone for index, pair in part.items()}
                seconds = sum(s for _, s in everyone)
        scores = [self._scores(results, seconds)] if not dist.is_initialized() or dist.get_rank() == 0 else [{}]
        if dist.is_initialized():
            dist.broadcast_object_list(scores)
        return scores[0]

    def _scores(self, results: Mapping[int, tuple[Truth, Found]], seconds: float) -> dict[str, float]:
        if not results:
            return {}
        truths, found = zip(*(results[index] for index in sorted(results)), strict=True)
        return {**coco_scores(truths, found, self.classes, self.cfg.scorer), "seconds_per_image": seconds / len(results)}

    def report(self) -> Report:
        """What an image costs, and how large the network is; this rank's images timed."""
        per_image = self.seconds / max(1, len(self.results))
        row: dict[str, float] = {
            "milliseconds_per_image": 1000 * per_image,
            "images_per_second": 1 / per_image if per_image else 0.0,
        }
        if self.network is not None:
            row["parameters"] = sum(p.numel() for p in self.network.parameters())
            row["megabytes"] = sum(w.numel() * w.element_size() for w in self.network.state_dict().values()) / 1e6
        return Report(tables={"speed": [row]})

    def pictures(self) -> dict[str, Tensor]:
        """uint8 [3, H, W] each, by name: true boxes and those found."""
        from tasks.detection.drawing import drawn

        return {
            f"detections-{i}": drawn(image, result, boxes, self.classes, self.offset, self.mean, self.std)
            for i, (image, result, boxes) in enumerate(self.shown)
        }


def _array(x: Tensor, kind: Any) -> np.ndarray:
    x = x.double() if x.is_floating_point() else x  # numpy knows no bfloat16
    return x.cpu().numpy().astype(kind)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
