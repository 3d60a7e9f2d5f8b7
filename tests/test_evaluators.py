"""What an evaluator may have besides scores: a look at the training images, and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.any_task import AnyTask, AnyTaskConfig
from tests.test_exact import SHORT
from trainer.config import RunConfig
from trainer.feeds import spread
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory
from trainer.task import Batch, ComparesWithTraining, DataInfo, Illustrates

SEEN: list[dict[str, list[int]]] = []


class Curious:
    """Remembers which images it saw, and draws one of them."""

    def __init__(self, task: CuriousTask) -> None:
        self.task = task
        self.known: list[int] = []
        self.asked: list[int] = []
        SEEN.append({"known": self.known, "asked": self.asked})

    def reference(self, batch: Batch) -> None:
        assert not self.task.training and not torch.is_grad_enabled() and not self.asked
        self.known += batch["index"].tolist()

    def update(self, batch: Batch) -> None:
        self.asked += batch["index"].tolist()

    def compute(self) -> dict[str, float]:
        return {"loss": float(len(self.known))}

    def pictures(self) -> dict[str, Tensor]:
        assert not self.task.training
        return {"grey": torch.full((3, 4, 6), 100 + len(self.asked), dtype=torch.uint8)}


@dataclass
class CuriousConfig(AnyTaskConfig):
    def build(self, run: RunConfig, data: DataInfo) -> CuriousTask:
        return CuriousTask(data.channels)


class CuriousTask(AnyTask):
    def evaluator(self) -> Curious:  # type: ignore[override]
        return Curious(self)


def test_the_protocols_tell_who_wants_what():
    curious = Curious(CuriousTask(1))
    assert isinstance(curious, ComparesWithTraining) and isinstance(curious, Illustrates)
    assert not isinstance(AnyTask(1).evaluator(), ComparesWithTraining | Illustrates)


@pytest.mark.parametrize(("every", "steps"), [(1, [3, 6, 9]), (2, [3, 9]), (None, [])])
def test_training_images_first_and_pictures_when_due(every, steps, tmp_path: Path):
    run = compose_run(*SHORT, "dataset.image_size=16", f"loop.preview_every={every or 'null'}", "loop.max_reference_images=40")
    run.task = CuriousConfig()
    SEEN.clear()
    train(run, RunDirectory(tmp_path / "run"))
    passes = [p for p in SEEN if p["asked"]]
    assert len(passes) == 3
    for one in passes:
        assert sorted(one["known"]) == list(range(40)), "places in the subset, each once"
        assert len(one["asked"]) == 32
    written = sorted(p.relative_to(tmp_path / "run" / "previews").as_posix() for p in (tmp_path / "run" / "previews").rglob("*.png"))
    assert written == [f"step-{step:07d}/grey.png" for step in steps]
    for path in written:
        with Image.open(tmp_path / "run" / "previews" / path) as image:
            assert image.size == (6, 4) and (np.asarray(image) == 132).all()


def test_a_spread_is_even_and_without_repeats():
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert len(set(spread(1000, 999).tolist())) == 999
