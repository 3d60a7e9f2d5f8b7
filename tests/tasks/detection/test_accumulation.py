"""Parts of a batch, on one rank or on two, count by their images, however many objects these show: loss and gradients in numbers."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.detection.task import Detection
from tests.ranks import run_ranks, torchrun_environments
from tests.tasks.detection.test_coco_file import write
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory
from trainer.task import Progress

ONE_STEP = ["task=detection", "dataset=coco", "dataset.image_size=64", "dataset.num_workers=0", "augmentation=boxes", "model=timm",
            "model.name=test_resnet", "loop.freeze_batchnorm=true", "task.width=64", "loop.batch_size=8", "loop.epochs=null", "loop.steps=1",
            "loop.log_every=1", "loop.progress=none", "loop.validate_every=null", "logger.plots=false", "loop.max_grad_norm=null", "seed=1"]  # fmt: skip
DETECTORS = {
    "retinanet": [],
    # So many that all are taken: whose turn it is among proposals is drawn, by each rank for itself.
    "faster_rcnn": ["task.roi_samples=100000", "+task.args.rpn_batch_size_per_image=1000000"],
}


class Record:
    """What a rank's step was made of."""

    def __init__(self) -> None:
        self.first: Detection | None = None  # with the weights of the beginning
        self.batches: list[dict[str, Any]] = []
        self.terms: list[dict[str, Tensor]] = []  # of the loss, by batch
        self.gradients: dict[str, Tensor] = {}

    def step(self, task: Detection, batch: dict[str, Any], progress: Progress) -> Any:
        self.first = self.first or copy.deepcopy(task)
        self.batches.append({name: copy.deepcopy(batch[name]) for name in ("image", "size", "boxes", "labels", "index")})
        output = Detection_training_step(task, batch, progress)
        self.terms.append(dict(output.metrics))
        return output

    def update(self, task: Detection, _: Progress) -> None:
        self.gradients = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


Detection_training_step = Detection.training_step


def one_step(directory: Path, overrides: list[str]) -> Record:
    record = Record()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detection, "training_step", lambda task, batch, progress: record.step(task, batch, progress))
        patch.setattr(Detection, "before_update", lambda task, progress: record.update(task, progress))
        train(compose_run(*overrides), RunDirectory(directory))
    return record


def by_hand(task: Detection, batches: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """The mean over equal parts of each part's loss, and its gradients."""
    task = copy.deepcopy(task)
    task.zero_grad()
    losses = [task.training_step(batch, Progress(0, 1, 1)).loss for batch in batches]
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


def whole(batches: list[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {"image": torch.cat([b["image"] for b in batches])}
    return joined | {name: [x for b in batches for x in b[name]] for name in ("size", "boxes", "labels")}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference, as a share of the largest gradient."""
    assert a.keys() == b.keys() and a
    return max(float((a[n] - b[n]).abs().max()) for n in a) / max(float(x.abs().max()) for x in b.values())


def overrides(detector: str, root: Path, *more: str) -> list[str]:
    return [*ONE_STEP, f"dataset.path={root}", f"task.detector={detector}", *DETECTORS[detector], *more]


def logged(directory: Path) -> float:
    (row,) = csv.DictReader((directory / "batches.csv").read_text().splitlines())
    return float(row["train/loss"])


def assert_is_the_mean_of_parts(detector: str, record: Record, parts: list[dict[str, Any]], loss: float) -> None:
    counts = [sum(len(boxes) for boxes in part["boxes"]) for part in parts]
    assert counts[0] != counts[1], "parts of different numbers of objects"
    assert min(len(boxes) for part in parts for boxes in part["boxes"]) == 0, "and images of nothing"
    assert record.first is not None
    mean, gradients = by_hand(record.first, parts)
    assert loss == pytest.approx(mean, rel=1e-5)
    assert furthest(record.gradients, gradients) < 1e-5
    at_once, gradients_at_once = by_hand(record.first, [whole(parts)])
    if detector == "retinanet":  # counts by images within a part too
        assert at_once == pytest.approx(mean, rel=1e-5)
        assert furthest(gradients_at_once, gradients) < 1e-4
    else:  # proposals of a part share one mean, so that parts count alike though one has more of them
        assert abs(at_once - mean) > 1e-4 * mean
        assert furthest(gradients_at_once, gradients) > 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("detector", DETECTORS)
def test_micro_batches(detector, root, tmp_path):
    record = one_step(tmp_path / "run", overrides(detector, root, "loop.accumulate=2"))
    assert len(record.batches) == 2
    assert_is_the_mean_of_parts(detector, record, record.batches, logged(tmp_path / "run"))


@pytest.mark.parametrize("detector", DETECTORS)
def test_ranks(detector, root, tmp_path):
    outcomes = run_ranks(one_step, torchrun_environments(2), tmp_path / "ranks", tmp_path / "run", overrides(detector, root))
    assert [o.code for o in outcomes] == [0, 0], outcomes
    one, two = (o.value for o in outcomes)
    assert furthest(one.gradients, two.gradients) == 0, "all ranks take the same step"
    assert_is_the_mean_of_parts(detector, one, one.batches + two.batches, logged(tmp_path / "run"))
