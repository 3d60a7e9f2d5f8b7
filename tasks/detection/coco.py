"""COCO's scores of a set of detections: precision averaged over recall, thresholds of overlap, and classes.

The arithmetic is a library's: faster-coco-eval, or pycocotools, which it equals and which is the judge in the tests. This
module knows how to ask them; it knows no network, no ranks and no batches.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Truth:
    """The objects of one image."""

    boxes: np.ndarray  # float64 [M, 4], (x, y, width, height) in the file's own pixels
    labels: np.ndarray  # int64 [M], place in the list of classes
    crowd: np.ndarray  # bool [M]
    area: np.ndarray  # float64 [M], pixels; COCO's is that of the outline
    image_id: int = 0  # detections of equal confidence are ranked in the order of their images' ids


@dataclass(frozen=True)
class Found:
    """What a detector says of one image."""

    boxes: np.ndarray  # float64 [D, 4], (x1, y1, x2, y2)
    labels: np.ndarray  # int64 [D]
    scores: np.ndarray  # float64 [D]


def coco_scores(
    truths: Sequence[Truth], found: Sequence[Found], classes: Sequence[str], backend: str = "faster_coco_eval"
) -> dict[str, float]:
    """`map`, `map_50`, `map_75`, by size, by class, and `mar_100`, over images given in the same order in both lists.

    What no object has to do with (a size or class of which there is none) has no score and is left out.

    Args:
        backend: "faster_coco_eval" or "pycocotools".
    """
    order = sorted(range(len(truths)), key=lambda i: truths[i].image_id)
    truths, found = [truths[i] for i in order], [found[i] for i in order]
    coco, evaluate = _backend(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its tables
        truth, detections = coco(), coco()
        truth.dataset = _dataset(truths, len(classes))
        detections.dataset = {**truth.dataset, "annotations": list(_annotations(found))}
        truth.createIndex()
        detections.createIndex()
        evaluation = evaluate(truth, detections, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"]).reshape(10, 101, len(classes), 4, 3)  # IoU, recall, class, area, most
    recall = np.asarray(evaluation.eval["recall"]).reshape(10, len(classes), 4, 3)
    scores = {"map": _mean(precision[..., 0, 2]), "map_50": _mean(precision[0, ..., 0, 2]), "map_75": _mean(precision[5, ..., 0, 2])}
    scores |= {f"map_{size}": _mean(precision[..., i, 2]) for i, size in enumerate(("small", "medium", "large"), 1)}
    scores |= {"mar_100": _mean(recall[..., 0, 2])}
    scores |= {f"map_class/{name}": _mean(precision[:, :, k, 0, 2]) for k, name in enumerate(classes)}
    return {name: score for name, score in scores.items() if score is not None}


def _backend(name: str) -> tuple[Any, Any]:
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    from faster_coco_eval import COCO as Coco
    from faster_coco_eval import COCOeval_faster

    return Coco, COCOeval_faster


def _dataset(truths: Sequence[Truth], num_classes: int) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image, truth in enumerate(truths):
        for box, label, crowd, area in zip(truth.boxes.tolist(), truth.labels.tolist(), truth.crowd.tolist(), truth.area.tolist()):
            # Ids begin at 1: 0 would read as "matched nothing".
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box,
                "area": area, "iscrowd": int(crowd), "ignore": int(crowd),
            })  # fmt: skip
    return {
        "images": [{"id": i} for i in range(len(truths))],
        "annotations": annotations,
        "categories": [{"id": k} for k in range(num_classes)],
    }


def _annotations(found: Sequence[Found]) -> Any:
    number = 0
    for image, result in enumerate(found):
        for (x1, y1, x2, y2), label, score in zip(result.boxes.tolist(), result.labels.tolist(), result.scores.tolist()):
            number += 1
            width, height = x2 - x1, y2 - y1
            yield {
                "id": number, "image_id": image, "category_id": label, "bbox": [x1, y1, width, height], "score": score,
                "area": width * height, "iscrowd": 0,
            }  # fmt: skip


def _mean(values: np.ndarray) -> float | None:
    """Over what is defined; -1 marks what is not."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
