"""How well holes are filled, what features of images are worth, and pictures of both ends. One validation pass each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tasks.mim.pixels import triptych
from trainer.evaluation import Mean, all_cat
from trainer.probe import knn_scores
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
        self.bank: list[tuple[Tensor, Tensor, Tensor]] = []  # index [N], features [N, D], labels [N]
        self.queries: list[tuple[Tensor, Tensor, Tensor]] = []

    def reference(self, batch: Batch) -> None:
        self.bank.append(self._seen(batch))

    def update(self, batch: Batch) -> None:
        super().update(batch)
        self.queries.append(self._seen(batch))

    def _seen(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return batch["index"], self.task.features(batch["image"]).float(), batch["label"]

    def compute(self) -> dict[str, float]:
        scores = super().compute()
        index, bank, labels = _gathered(self.bank, self.task)
        if not scores or not len(index):  # nothing to validate on, or nobody to ask
            return scores
        order = index.argsort(stable=True)  # the same bank on any number of ranks
        places, queries, truth = _gathered(self.queries, self.task)
        votes = knn_scores(bank[order], labels[order], queries, self.task.num_classes, k=self.task.cfg.knn_neighbours)
        hits = (votes.argmax(1) == truth)[places.argsort(stable=True)]
        return {**scores, "knn_top1": hits.double().mean().item()}


def _gathered(rows: list[tuple[Tensor, Tensor, Tensor]], task: Mim) -> tuple[Tensor, Tensor, Tensor]:
    """Everybody's rows; a rank whose share was empty has none to give."""
    none = torch.zeros(0, dtype=torch.int64, device=next(task.parameters()).device)
    width = int(task.model.num_features)  # type: ignore[arg-type]
    mine = (
        [torch.cat(column) for column in zip(*rows, strict=True)] if rows else [none, none.new_zeros(0, width, dtype=torch.float32), none]
    )
    index, features, labels = (all_cat(column) for column in mine)
    return index, features, labels
