"""Training a detector on JPEGs with boxes, by this project's engine and as torchvision's reference does it; and scoring
detections. Everything is timed in CPU time of the process, on one thread."""

from __future__ import annotations

import atexit
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

IMAGES, BATCH, STEPS = 16, 2, 4  # photographs on disk; a batch; batches of one block
WIDTH, HEIGHT, LONGEST = 640, 480, 320  # pixels of a photograph, and of the longer side that the network sees
CLASSES = 3


def photographs() -> Path:
    """A folder of COCO's layout; the images are noise of low frequency, as large in bytes as photographs."""
    from PIL import Image

    scratch = tempfile.TemporaryDirectory()
    atexit.register(scratch.cleanup)
    root, random = Path(scratch.name), np.random.default_rng(0)
    boxes, images = [], []
    for i in range(IMAGES):
        small = random.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(small).resize((WIDTH, HEIGHT)).save(root / f"{i:03}.jpg", quality=90)
        images.append({"id": i, "file_name": f"{i:03}.jpg", "width": WIDTH, "height": HEIGHT})
        for _ in range(12):  # as many cells as a photograph of BCCD shows
            x, y, w, h = random.integers(0, WIDTH - 120), random.integers(0, HEIGHT - 120), *random.integers(30, 110, 2)
            boxes.append({
                "id": len(boxes) + 1, "image_id": i, "category_id": int(random.integers(CLASSES)), "bbox": [int(v) for v in (x, y, w, h)],
                "area": int(w * h), "iscrowd": 0,
            })  # fmt: skip
    document = {"images": images, "annotations": boxes, "categories": [{"id": k, "name": str(k)} for k in range(CLASSES)]}
    for split in ("train", "val"):
        (root / f"instances_{split}.json").write_text(json.dumps(document))
    return root


def ours() -> Callable[[], float]:
    """Milliseconds per image."""
    torch.set_num_threads(1)
    fit, stream = _training(
        ["optimizer=sgd", "optimizer.lr=1e-4", "task.width=256", "task.roi_samples=512", "dataset.num_workers=0"], BATCH
    )
    fit(stream, steps=1)
    return lambda: _milliseconds(lambda: fit(stream, steps=STEPS), STEPS * BATCH)


def waiting() -> Callable[[], float]:
    """Per cent of the wall time of steps of eight images that passed while the loop waited for the loader, with as many
    workers and threads as a run takes by itself."""
    fit, stream = _training(["task.width=128", "task.roi_samples=128", "dataset.num_workers=auto"], 8)
    clocked = Clocked(stream)
    fit(clocked, steps=2)

    def block() -> float:
        clocked.seconds, started = 0.0, time.perf_counter()
        fit(clocked, steps=STEPS)
        return 100 * clocked.seconds / (time.perf_counter() - started)

    return block


class Clocked:
    """A stream, and how long its consumer has waited for it."""

    def __init__(self, stream: Iterator[Any]) -> None:
        self.stream, self.seconds = stream, 0.0

    def __iter__(self) -> Clocked:
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        batch = next(self.stream)
        self.seconds += time.perf_counter() - started
        return batch


def _training(overrides: list[str], batch: int) -> tuple[Callable[..., None], Iterator[Any]]:
    """`fit(batches, steps)` of a Faster R-CNN on ResNet-18, and the loader's batches."""
    import tasks  # noqa: F401  (registers the tasks' schemas)
    from benchmarks.peers.ours import OVERRIDES, prepare_task
    from trainer.build import build_data, build_task
    from trainer.distributed import World
    from trainer.feeds import loaders
    from trainer.launch.compose import compose_run

    overrides = [
        "task=detection", "dataset=coco", f"dataset.path={photographs()}", f"dataset.image_size={LONGEST}", "model=torchvision",
        "model.name=resnet18", "loop.ema_decay=null", "loop.max_grad_norm=null", f"loop.batch_size={batch}", "loop.steps=1000000", *overrides,
    ]  # fmt: skip
    run, world = compose_run(*OVERRIDES, *overrides), World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    data = build_data(run)
    task = build_task(run, data, world.device, 1)
    return prepare_task(task, overrides), iter(loaders(run, data, task, world, 0)[0])


def reference() -> Callable[[], float]:
    """references/detection of torchvision: CocoDetection, tensors in [0, 1], its own resizing, `loss.item()` at every step."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.models import resnet18
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    root = photographs()
    transforms = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float32, scale=True)])
    raw = CocoDetection(str(root), str(root / "instances_train.json"), transforms=transforms)
    dataset = wrap_dataset_for_transforms_v2(raw, target_keys=("boxes", "labels"))
    loader = DataLoader(dataset, BATCH, shuffle=True, collate_fn=lambda rows: tuple(zip(*rows)))  # pyright: ignore[reportArgumentType]
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(resnet18(), layers, [64, 128, 256, 512], 256)
    model = FasterRCNN(backbone, CLASSES + 1, min_size=LONGEST * HEIGHT // WIDTH, max_size=LONGEST).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    stream = endless()

    def fit(steps: int) -> None:
        for _ in range(steps):
            images, targets = next(stream)
            losses = model(list(images), [{k: torch.as_tensor(v) for k, v in t.items()} for t in targets])
            loss = torch.stack(list(losses.values())).sum()
            loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    fit(1)
    return lambda: _milliseconds(lambda: fit(STEPS), STEPS * BATCH)


def _milliseconds(work: Callable[[], object], count: int) -> float:
    started = time.process_time()
    work()
    return 1e3 * (time.process_time() - started) / count


# --- scores ---------------------------------------------------------------------------------------------------------------


def results(count: int = 1000, most: int = 100, objects: int = 7) -> list[tuple[Any, Any]]:
    from tasks.detection.coco import Found, Truth

    random = np.random.default_rng(0)

    def boxes(n: int) -> np.ndarray:
        corner, sides = random.uniform(0, 500, (n, 2)), np.exp(random.uniform(2, 5.5, (n, 2)))
        return np.concatenate([corner, corner + sides], axis=1)

    pairs = []
    for _ in range(count):
        true = boxes(objects)
        found = np.concatenate([true + random.normal(0, 2, true.shape), boxes(most - objects)])
        labels, scores = random.integers(0, 80, most), np.sort(random.random(most))[::-1].copy()
        sides = true[:, 2:] - true[:, :2]
        pairs.append(
            (Truth(np.hstack([true[:, :2], sides]), labels[:objects], np.zeros(objects, bool), sides.prod(1)), Found(found, labels, scores))
        )
    return pairs


def evaluator() -> Callable[[], float]:
    """Milliseconds for all 1,000 images, as `CocoEvaluator.compute` takes them."""
    from tasks.detection.config import DetectionConfig
    from tasks.detection.evaluation import CocoEvaluator

    scorer = CocoEvaluator(lambda images: [], DetectionConfig(), [str(k) for k in range(80)], offset=1, mean=[0.5], std=[0.5])
    scorer.results = dict(enumerate(results()))
    scorer.compute()
    return lambda: _milliseconds(scorer.compute, 1)


def backend(name: str) -> Callable[[], float]:
    """As the library's own documentation does it: a list of dictionaries of results, `loadRes`, evaluate, accumulate, summarize."""
    import contextlib
    import io

    pairs = results()
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Evaluation
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as Evaluation

    def score() -> None:
        truth = [
            {"image_id": i, "category_id": int(k), "bbox": b, "area": float(a), "iscrowd": 0}
            for i, (t, _) in enumerate(pairs) for b, k, a in zip(t.boxes.tolist(), t.labels, t.area)
        ]  # fmt: skip
        found = [
            {"image_id": i, "category_id": int(k), "bbox": _xywh(b), "score": float(s)}
            for i, (_, f) in enumerate(pairs) for b, k, s in zip(f.boxes.tolist(), f.labels, f.scores)
        ]  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            coco: Any = COCO()
            coco.dataset = {
                "images": [{"id": i} for i in range(len(pairs))], "categories": [{"id": k} for k in range(80)],
                "annotations": [{"id": i + 1, **a} for i, a in enumerate(truth)],
            }  # fmt: skip
            coco.createIndex()
            evaluation: Any = Evaluation(coco, coco.loadRes(found), iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()

    score()
    return lambda: _milliseconds(score, 1)


def _xywh(box: list[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]
