"""Scores from an annotation file through loader and evaluator, against `COCO(file).loadRes(results)` of pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from tasks.detection.config import DetectionConfig
from tasks.detection.evaluation import CocoEvaluator
from tests.ranks import distributed, run_ranks, torchrun_environments
from tests.trainer.data.sources import Rank
from trainer.config.letterbox import Letterbox
from trainer.data.augment.letterbox import Boxed
from trainer.data.config import CocoConfig, WebDatasetConfig
from trainer.data.loader import validation_loader
from trainer.data.shards.pack import pack

IMAGES = 23  # odd, so that ranks have unequal shares
CATEGORIES = {7: "cell", 3: "bird", 12: "nothing"}  # numbers that skip, in no order
SIDE = 64  # pixels of the canvas
# Detections go from the canvas to the file's pixels by one division and one multiplication in float64 on either side, so
# that overlaps, thresholds and scores come out alike to the last bits.
EQUAL = 1e-9


def size_of(number: int) -> tuple[int, int]:
    return 90 + 31 * (number % 5), 70 + 17 * (number % 7)


def objects_of(number: int) -> list[dict[str, Any]]:
    """Every third image shows nothing; others have objects over the edge, outside, without area, of an unknown category, crowds."""
    random = np.random.default_rng(number)
    width, height = size_of(number)
    found = []
    for _ in range(0 if number % 3 == 0 else int(random.integers(2, 8))):
        w, h = np.exp(random.uniform(1.5, 4.5, 2))
        x, y = random.uniform(-0.3 * w, width - 0.5 * w), random.uniform(-0.3 * h, height - 0.5 * h)
        kind = int(random.integers(0, 9))
        box = {5: [x, y, 0, 0], 6: [width + 3.3, y, w, h], 7: [x, y, w, 0.0]}.get(kind, [x, y, w, h])
        found.append({
            "bbox": [float(v) for v in box], "area": float(box[2] * box[3] * random.uniform(0.6, 1)), "iscrowd": int(kind == 8),
            "category_id": [3, 7, 3, 7, 99][int(random.integers(0, 5))],
        })  # fmt: skip
    return found


def write(root: Path) -> Path:
    """Images listed in another order than that of their ids."""
    (root / "images").mkdir(parents=True)
    images, objects = [], []
    for number in range(IMAGES):
        width, height = size_of(number)
        Image.new("RGB", (width, height), (8 * number, 0, 0)).save(root / "images" / f"{number}.png")
        images.append({"id": 1000 - number * 7, "file_name": f"{number}.png", "width": width, "height": height})
        objects += [{**a, "id": len(objects) + 1 + i, "image_id": images[-1]["id"]} for i, a in enumerate(objects_of(number))]
    document = {"images": images, "annotations": objects, "categories": [{"id": k, "name": name} for k, name in CATEGORIES.items()]}
    for split in ("train", "val"):
        (root / f"instances_{split}.json").write_text(json.dumps(document))
    return root


def detections(number: int, h: int, w: int) -> dict[str, Tensor]:
    """Some objects found, some twice, and more; on a picture of w x h pixels. Confidences of few values: many are equal."""
    random = np.random.default_rng(1000 + number)
    width, height = size_of(number)
    found = [a for a in objects_of(number) if a["category_id"] != 99] * 2
    near = np.array([a["bbox"] for a in found]).reshape(-1, 4) + random.normal(0, 1.5, (len(found), 4)) * random.integers(
        0, 2, (len(found), 1)
    )
    noise = np.column_stack([random.uniform(0, 50, (9, 2)), random.uniform(5, 40, (9, 2))])
    rows = np.concatenate([near, noise])
    corners = np.concatenate([rows[:, :2], rows[:, :2] + np.maximum(rows[:, 2:], 1)], axis=1) * np.array([w / width, h / height] * 2)
    labels = [sorted(CATEGORIES).index(a["category_id"]) for a in found] + random.integers(0, 3, 9).tolist()
    scores = random.integers(1, 6, len(rows)) / 5
    order = np.argsort(-scores, kind="stable")
    return {"boxes": torch.tensor(corners, dtype=torch.float32)[order.copy()], "labels": torch.tensor(labels)[order.copy()] + 1,
            "scores": torch.tensor(scores)[order.copy()]}  # fmt: skip


def detect(images: list[Tensor]) -> list[dict[str, Tensor]]:
    """The image's number stands in its red pixels, which were normalised."""
    return [detections(round((float(x[0, 0, 0]) * 0.25 + 0.5) * 255 / 8), *x.shape[1:]) for x in images]


def expected(root: Path) -> dict[str, float]:
    """What pycocotools makes of the file and of a file of results."""
    truth_file = root / "instances_val.json"
    images, results = json.loads(truth_file.read_text())["images"], []
    for number, image in enumerate(images):
        width, height = image["width"], image["height"]
        scale = SIDE / max(width, height)
        w, h = max(1, round(width * scale)), max(1, round(height * scale))
        found = detections(number, h, w)
        corners = found["boxes"].double().numpy() * np.array([width / w, height / h] * 2)
        for (x1, y1, x2, y2), label, score in zip(corners.tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True):
            results.append({"image_id": image["id"], "category_id": sorted(CATEGORIES)[label - 1], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})  # fmt: skip
    (root / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO(str(truth_file))
        evaluation = COCOeval(truth, truth.loadRes(str(root / "results.json")), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = {"map": 0, "map_50": 1, "map_75": 2, "map_small": 3, "map_medium": 4, "map_large": 5, "mar_100": 8}
    scores = {name: float(evaluation.stats[i]) for name, i in names.items() if evaluation.stats[i] >= 0}
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # [IoU, recall, class]
    scores |= {f"map_class/{CATEGORIES[k]}": float(precision[..., i].mean()) for i, k in enumerate(sorted(CATEGORIES)) if k != 12}
    return scores


def scored(config: Any, scorer: str, rank: int, size: int) -> dict[str, float]:
    augmentation = Boxed(Letterbox(), config, train=False)
    loader = validation_loader(config.build("val"), augmentation, Rank(rank, size), batch_size=4)
    evaluator = CocoEvaluator(detect, DetectionConfig(scorer=scorer), ["bird", "cell", "nothing"], offset=1, mean=[0.5], std=[0.25])
    for batch in loader:
        evaluator.update(batch)
    return {name: value for name, value in evaluator.compute().items() if "seconds" not in name}


def config_of(root: Path) -> CocoConfig:
    return CocoConfig(path=str(root), image_size=SIDE, mean=[0.5] * 3, std=[0.25] * 3)


def on_a_rank(root: Path) -> dict[str, float]:
    from trainer.distributed import open_world

    with open_world(distributed(), cuda=False) as world:
        return scored(config_of(root), "faster_coco_eval", world.rank, world.size)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("coco"))


def test_the_file_is_what_it_should_be(root):
    """Otherwise the tests below would prove little."""
    objects = [a for number in range(IMAGES) for a in objects_of(number)]
    edges = [(a, size_of(number)) for number in range(IMAGES) for a in objects_of(number)]
    assert sum(a["iscrowd"] for a in objects) > 2
    assert sum(a["bbox"][2] * a["bbox"][3] == 0 for a in objects) > 5
    assert sum(a["bbox"][0] < -1 or a["bbox"][0] + a["bbox"][2] > w + 1 for a, (w, _) in edges) > 5
    assert sum(a["category_id"] == 99 for a in objects) > 2
    assert sum(not objects_of(number) for number in range(IMAGES)) > 5
    scores = expected(root)
    assert 0.1 < scores["map"] < 0.9 and scores["map_class/bird"] != scores["map_class/cell"]


@pytest.mark.parametrize("policy", ["clip", "drop"])
@pytest.mark.parametrize("scorer", ["faster_coco_eval", "pycocotools"])
def test_scores_are_those_of_the_file(root, scorer, policy):
    config = config_of(root)
    config.bad_boxes = policy
    assert scored(config, scorer, 0, 1) == pytest.approx(expected(root), rel=0, abs=EQUAL)


@pytest.mark.parametrize("size", [2, 3])
def test_and_on_ranks(root, size, tmp_path):
    outcomes = run_ranks(on_a_rank, torchrun_environments(size), tmp_path, root)
    assert [o.code for o in outcomes] == [0] * size, outcomes
    for outcome in outcomes:
        assert outcome.value == pytest.approx(expected(root), rel=0, abs=EQUAL)


def test_and_from_shards(root, tmp_path):
    """Which have corners: widths are differences there, right to the last bit or two."""
    pack(config_of(root).build("val"), tmp_path, "val", size=1_000_000)
    pack(config_of(root).build("train"), tmp_path, "train", size=1_000_000)
    config = WebDatasetConfig(path=str(tmp_path), image_size=SIDE, mean=[0.5] * 3, std=[0.25] * 3)
    assert scored(config, "faster_coco_eval", 0, 1) == pytest.approx(expected(root), rel=0, abs=EQUAL)


def test_training_sees_mended_boxes_only(root):
    source = config_of(root).build("train")
    for i in range(len(source)):
        sample = source[i]
        assert "truth" not in sample
        width, height = sample["image"].size
        boxes = sample["boxes"]
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all() and (boxes[:, 2:] > boxes[:, :2]).all()
