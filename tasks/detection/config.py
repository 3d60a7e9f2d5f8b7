"""Config of the detection task. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.config import RunConfig, TaskConfig, schema, setting
from trainer.errors import Problem

if TYPE_CHECKING:
    from tasks.detection.task import Detection
    from trainer.task import DataInfo

STRIDES = {  # of the backbone's maps that each detector builds on; the coarser ones it makes itself
    "faster_rcnn": (4, 8, 16, 32),
    "faster_rcnn_v2": (4, 8, 16, 32),
    "retinanet": (8, 16, 32),
    "retinanet_v2": (8, 16, 32),
    "fcos": (8, 16, 32),
    "ssdlite": (16, 32),
    "detr": (32,),
    "deformable_detr": (8, 16, 32),
}
SETS = ("detr", "deformable_detr")  # which match boxes to objects one to one; of transformers, an extra
LARGE = 512  # pixels: images of this side and more get the sizes of the papers
SMALL = 160


@schema("task", "detection")
@dataclass
class DetectionConfig(TaskConfig):
    """Boxes around objects, by torchvision's detectors on any network that gives maps."""

    needs: ClassVar[frozenset[str]] = frozenset({"image", "boxes"})
    asks: ClassVar[frozenset[str]] = frozenset({"pyramid"})
    smallest_image: ClassVar[int] = 64

    detector: str = setting(
        "faster_rcnn",
        "faster_rcnn (arXiv:1506.01497) and faster_rcnn_v2 (batch norms, deeper heads: arXiv:2111.11429), retinanet (arXiv:1708.02002) and retinanet_v2 (group norms, GIoU), fcos (arXiv:1904.01355), ssdlite (arXiv:1801.04381, sec. 6.2); with the extra hf, detr (arXiv:2005.12872) and deformable_detr (arXiv:2010.04159)",
        choices=list(STRIDES),
    )
    width: int | None = setting(
        None,
        "channels of the feature pyramid and of convolutional heads, a quarter of those of the box head; null = 256, and 64 where images have at most 160 pixels a side",
        ge=32,
    )
    roi_samples: int | None = setting(
        None,
        "faster_rcnn: proposals per image the box head learns from; null = 512, and in proportion to the area of images below 512 pixels, at least 64",
        ge=1,
    )
    anchor_scale: float = setting(
        8.0, "faster_rcnn: side of the square anchor, in strides; retinanet: half of it; the others have none", gt=0
    )
    freeze_stages: int = setting(
        0,
        "parts of the backbone from below that are not trained: 1 = the stem, 2 = and the first stage (torchvision's default) …; batch norms there keep their statistics",
        ge=0,
    )
    frozen_batchnorm: bool = setting(False, "every batch norm of the backbone keeps the statistics and scales it starts with")
    score_threshold: float = setting(0.05, "detections of less confidence are left out", ge=0, lt=1)
    nms_threshold: float = setting(0.5, "of two detections of one class that overlap more than this (IoU), the surer one stays", gt=0, le=1)
    max_detections: int = setting(100, "detections per image at most; COCO's scores look at 100", ge=1)
    args: dict[str, Any] = setting(
        {},
        "further keyword arguments of torchvision's detector, as rpn_fg_iou_thresh or box_positive_fraction; of transformers' config for those of its own, as num_queries",
    )
    scorer: str = setting(
        "faster_coco_eval",
        "library that computes COCO's scores; both give the same numbers",
        choices=["faster_coco_eval", "pycocotools"],
        identity=False,
    )
    num_previews: int = setting(4, "validation images shown with predicted and true boxes", ge=0, identity=False)

    @property
    def strides(self) -> tuple[int, ...]:
        return STRIDES[self.detector]

    @property
    def is_rcnn(self) -> bool:
        return self.detector.startswith("faster_rcnn")

    @property
    def counts_background(self) -> bool:
        """Whether class 0 is the background, and the first class 1."""
        return self.is_rcnn or self.detector == "ssdlite"

    def width_at(self, image_size: int) -> int:
        return self.width or (64 if image_size <= SMALL else 256)

    def roi_samples_at(self, image_size: int) -> int:
        return self.roi_samples or (512 if image_size >= LARGE else max(64, image_size * image_size // LARGE))

    def build(self, run: RunConfig, data: DataInfo) -> Detection:
        from tasks.detection.detectors import build_detector
        from tasks.detection.task import Detection

        pyramid = run.model.build_pyramid(strides=self.strides, image_size=run.dataset.image_size, in_channels=data.channels)
        detector = build_detector(self, pyramid, num_classes=len(data.classes), image_size=run.dataset.image_size)
        return Detection(detector, self, data.classes, run.dataset.mean, run.dataset.std)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        size, coarsest = run.dataset.image_size, max(self.strides)
        if size < 2 * coarsest:
            reason = f"leaves less than two places of the coarsest map, whose stride is {coarsest} pixels"
            yield Problem("dataset.image_size", size, reason, f"dataset.image_size={2 * coarsest}")
        if not run.augmentation.keeps_whole:
            reason = "cuts off parts of validation images, and objects with them"
            yield Problem(
                "augmentation", type(run.augmentation).__name__, reason, "augmentation=boxes, boxes_upright or boxes_large_jitter"
            )
        patch = run.model.input_multiple
        if patch and patch & (patch - 1):
            reason = f"{run.model.name} cuts images into patches of {patch} pixels, and a pyramid's strides are powers of two"
            yield Problem("model.patch_size", patch, reason, "model.patch_size=16")
        fixed = "freeze_stages" if self.freeze_stages else "frozen_batchnorm"
        if (self.freeze_stages or self.frozen_batchnorm) and not (run.model.pretrained or run.init_from):
            value = getattr(self, fixed)
            reason = "keeps what the backbone starts with, which is random without pretrained weights"
            yield Problem(
                f"task.{fixed}", value, reason, f"task.{fixed}={'0' if fixed == 'freeze_stages' else 'false'}, or init_from=<weights>"
            )
        if not self.is_rcnn and self.roi_samples is not None:
            yield Problem("task.roi_samples", self.roi_samples, f"{self.detector} has no proposals", "task.roi_samples=null")
        if self.detector == "ssdlite" and run.loop.batch_size // run.loop.accumulate < 2:
            reason = "ssdlite normalises maps of a single place over the batch, and needs two images in each micro-batch"
            yield Problem("loop.batch_size", run.loop.batch_size, reason, f"loop.batch_size={2 * run.loop.accumulate}")
        if self.detector in SETS and importlib.util.find_spec("transformers") is None:
            yield Problem("task.detector", self.detector, "is transformers', which is not installed", 'pip install -e ".[hf]"')
        width = self.width_at(size)
        if self.detector in SETS and width % 32:
            yield Problem("task.width", width, f"{self.detector} has eight heads, and groups of 32 channels", "task.width=64, 128 or 256")
        if self.detector in ("fcos", "retinanet_v2") and (width % 32 or width < 64):
            reason = f"{self.detector} normalises 32 groups of channels, each of which needs two"
            yield Problem("task.width", width, reason, "task.width=64, 128 or 256")
