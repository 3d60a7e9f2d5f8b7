"""How well holes are filled, what features of images are worth, and pictures of both ends. One validation pass each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from tasks.mim.pixels import triptych
from trainer.evaluation import Mean, Neighbours
from trainer.task import Batch

if TYPE_CHECKING:
    from tasks.mim.task import Mim

SHOWN = 8  # images in a picture


class Judge:
    """The mean loss over the validation images, each with the same mask every time."""

    def __init__(self, task: Mim) -> None:
        self.task = task
        self.means = Mean(self._scores)
        self.page: Tensor | None = None

    def update(self, batch: Batch) -> None:
        self.means.update(batch)

    def _scores(self, batch: Batch) -> dict[str, Tensor]:
        filled = self.task.fill_in(batch["image"], batch["key"])
        if self.page is None:
            first = slice(0, SHOWN)
            self.page = triptych(batch["image"][first], filled.hidden[first], filled.images[first], self.task.mean, self.task.std)
        return {"loss": filled.losses}

    def compute(self) -> dict[str, float]:
        return self.means.compute()

    def pictures(self) -> Mapping[str, Tensor]:
        return {} if self.page is None else {"filled": self.page}


class LabelledJudge(Judge):
    """Beside it, how often the nearest training images of a validation image agree with it in class."""

    def __init__(self, task: Mim) -> None:
        super().__init__(task)
        self.neighbours = Neighbours(task.num_classes)

    def reference(self, batch: Batch) -> None:
        self.neighbours.remember(batch["index"], self.task.features(batch["image"]), batch["label"])

    def update(self, batch: Batch) -> None:
        super().update(batch)
        self.neighbours.ask(batch["index"], self.task.features(batch["image"]), batch["label"])

    def compute(self) -> dict[str, float]:
        found = self.neighbours.accuracy(self.task.cfg.knn_neighbours)
        return super().compute() | ({"knn_top1": found[0]} if found else {})
