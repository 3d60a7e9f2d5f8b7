"""COCO's scores against pycocotools, and the same on one, two and three ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tasks.detection.coco import Found, Truth, coco_scores
from tasks.detection.config import DetectionConfig
from tasks.detection.evaluation import CocoEvaluator
from tests.ranks import distributed, run_ranks, torchrun_environments

CLASSES = ["cat", "dog", "of which there is none"]
EQUAL = 1e-9  # promised
IMAGES = 37  # odd, so that ranks have unequal shares


def boxes(random: np.random.Generator, count: int) -> np.ndarray:
    corner, sides = random.uniform(0, 300, (count, 2)), np.exp(random.uniform(1.5, 5.5, (count, 2)))  # of all of COCO's sizes
    return np.concatenate([corner, corner + sides], axis=1)


def image(i: int) -> tuple[Truth, Found]:
    """Every third image shows nothing; some objects are crowds; some detections share their confidence."""
    random = np.random.default_rng(i)
    count = 0 if i % 3 == 0 else int(random.integers(1, 7))
    true = boxes(random, count)
    area = (true[:, 2:] - true[:, :2]).prod(1) * random.uniform(0.5, 1, count)
    sides = true[:, 2:] - true[:, :2]
    truth = Truth(np.hstack([true[:, :2], sides]), random.integers(0, 2, count), random.random(count) < 0.15, area, i)
    near = true + random.normal(0, 3, true.shape)
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    noise = int(random.integers(0, 120))  # more than the hundred that count
    found = np.concatenate([near, boxes(random, noise)]).astype(np.float32).astype(np.float64)
    labels = np.concatenate([truth.labels, random.integers(0, 3, noise)])
    scores = np.concatenate([random.uniform(0.4, 1, count), random.uniform(0, 0.6, noise)]).round(2).astype(np.float32).astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    return truth, Found(found[order], labels[order], scores[order])


def judged(backend: str = "pycocotools") -> dict[str, float]:
    truths, found = zip(*(image(i) for i in range(IMAGES)), strict=True)
    return coco_scores(truths, found, CLASSES, backend)


def test_the_default_equals_pycocotools():
    expected = judged()
    assert {"map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100", "map_class/cat", "map_class/dog"} == set(expected)
    assert 0.05 < expected["map"] < 0.95, "neither nothing nor everything is found"
    assert judged("faster_coco_eval") == pytest.approx(expected, rel=0, abs=EQUAL)


def test_what_cannot_be_scored_is_left_out():
    nothing = Truth(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0))
    blind = Found(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0))
    for backend in ("pycocotools", "faster_coco_eval"):
        assert coco_scores([nothing] * 3, [image(1)[1]] * 3, CLASSES, backend) == {}, "no objects, no precision"
        assert coco_scores([image(1)[0]] * 3, [blind] * 3, CLASSES, backend)["map"] == 0, "objects that nobody finds"


def oracle(images: list[Tensor]) -> list[dict[str, Tensor]]:
    """Finds in each image what is written down for it; the image's number stands in its first pixel."""
    found = [image(int(x[0, 0, 0]))[1] for x in images]
    return [
        {"boxes": torch.tensor(f.boxes, dtype=torch.float32) / 2, "labels": torch.tensor(f.labels) + 1, "scores": torch.tensor(f.scores)}
        for f in found
    ]


def batch(indices: list[int]) -> dict[str, Any]:
    """Images at half of the files' size, as a loader would give them."""
    truths = [image(i)[0] for i in indices]
    rows = [torch.tensor(np.column_stack([t.boxes, t.labels, t.crowd, t.area])) for t in truths]
    return {
        "image": torch.tensor(indices, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 64, 64), "index": torch.tensor(indices),
        "size": [(32 + i % 3, 64) for i in indices], "source_size": [(2 * (32 + i % 3), 128) for i in indices],
        "truth": rows, "image_id": torch.tensor(indices), "boxes": [torch.cat([r[:, :2], r[:, :2] + r[:, 2:4]], 1) / 2 for r in rows],
    }  # fmt: skip


def evaluate(rank: int, size: int) -> dict[str, float]:
    evaluator = CocoEvaluator(oracle, DetectionConfig(), CLASSES, offset=1, mean=[0.5], std=[0.5], network=nn.Linear(3, 3))
    mine = list(range(rank, IMAGES, size))
    for first in range(0, len(mine), 5):
        evaluator.update(batch(mine[first : first + 5]))
    scores = evaluator.compute()
    assert all(p.dtype == torch.uint8 and p.shape[0] == 3 for p in evaluator.pictures().values())
    (speed,) = evaluator.report().tables["speed"]
    assert speed["images_per_second"] == pytest.approx(1000 / speed["milliseconds_per_image"])
    assert (speed["parameters"], speed["megabytes"]) == (12, 48e-6)
    return {name: value for name, value in scores.items() if "seconds" not in name}


def on_a_rank() -> dict[str, float]:
    from trainer.distributed import open_world

    with open_world(distributed(), cuda=False) as world:
        return evaluate(world.rank, world.size)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_same_scores_on_any_number_of_ranks(size, tmp_path):
    if size == 1:
        answers = [evaluate(0, 1)]
    else:
        outcomes = run_ranks(on_a_rank, torchrun_environments(size), tmp_path)
        assert [o.code for o in outcomes] == [0] * size, outcomes
        answers = [o.value for o in outcomes]
    for scores in answers:
        assert scores == pytest.approx(judged(), rel=0, abs=EQUAL)
