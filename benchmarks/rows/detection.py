"""What detecting costs beside torchvision's own loop, whether the data keep up, and what scoring costs beside the library that does it."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Worker, race
from benchmarks.table import Effort, Line, at_most, limit, row

OURS, REFERENCE = "trainyard", "torchvision's reference loop"
WAITING = "share of a step that waits for the loader"
EVALUATOR, ALONE, ORACLE = "our evaluator", "faster-coco-eval alone", "pycocotools alone"


@row("detection", "an image of a Faster R-CNN's training on JPEGs of 640 x 480, read, resized, learned from")
def detection(effort: Effort) -> Iterator[Line]:
    contenders = [Worker(OURS, "benchmarks.peers.detection:ours"), Worker(REFERENCE, "benchmarks.peers.detection:reference")]
    yield at_most(race(contenders, effort.rounds(full=7, quick=3)), OURS, REFERENCE, 1.0, unit="ms")


@row("detection_wait", "reading and resizing keeps up with learning: batches of eight JPEGs of 640 x 480, on all cores there are")
def detection_wait(effort: Effort) -> Iterator[Line]:
    times = race([Worker(WAITING, "benchmarks.peers.detection:waiting")], effort.rounds(full=5, quick=2))
    yield limit(times, WAITING, 5.0, unit="%")


@row("coco_scores", "COCO's scores of 1,000 images with 100 detections each, from arrays to numbers")
def coco_scores(effort: Effort) -> Iterator[Line]:
    contenders = [
        Worker(EVALUATOR, "benchmarks.peers.detection:evaluator"),
        Worker(ALONE, "benchmarks.peers.detection:backend", {"name": "faster_coco_eval"}),
        Worker(ORACLE, "benchmarks.peers.detection:backend", {"name": "pycocotools"}),
    ]
    times = race(contenders, effort.rounds(full=7, quick=3))
    yield at_most(times, EVALUATOR, ALONE, 1.1, unit="ms")
    yield at_most(times, EVALUATOR, ORACLE, None, unit="ms", note="(shown, not judged)")
