"""How good the teacher's features are, and whether it is about to say the same of every image. Knows features, not how they were learned."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.dino.attention import attention_maps, has_attention, sheet
from tasks.dino.loss import entropy
from trainer.evaluation import all_cat, all_sum
from trainer.probe import fit_linear, knn_scores
from trainer.task import Batch

if TYPE_CHECKING:
    from tasks.dino.config import DinoConfig
    from tasks.dino.task import Dino

logger = logging.getLogger(__name__)

SHOWN = 8  # images whose attention is drawn
ALIKE, ONE = 0.99, 0.05  # shares of the largest possible entropy beyond which a teacher has collapsed
FLAT = 0.005  # spread of features below which they have: cosines of 0.99997; a small network's begin at 0.01


class Unlabelled:
    """One validation pass over images: the signs of a collapse, and pictures of what the teacher looks at."""

    def __init__(self, task: Dino) -> None:
        self.task = task
        self.device = task.center.device
        self.sums = torch.zeros(2 * task.width + task.cfg.out_dim + 2, dtype=torch.float64, device=self.device)
        self.shown: list[Tensor] = []  # [C, H, W] each

    def update(self, batch: Batch) -> None:
        self._look(batch)

    def _look(self, batch: Batch) -> Tensor:
        """The features [N, D] of a batch."""
        features = self.task.network()(batch["image"]).float()
        unit, p = F.normalize(features, dim=-1), self.task.probabilities(features)
        sums = [unit.sum(0), unit.square().sum(0), p.sum(0), entropy(p).sum().view(1), p.new_full((1,), p.shape[0])]
        self.sums += torch.cat(sums)
        self.shown += batch["image"][: SHOWN - len(self.shown)].unbind()
        return features

    def compute(self) -> dict[str, float]:
        from tasks.dino.task import spread_of

        width, out_dim = self.task.width, self.task.cfg.out_dim
        first, second, usage, entropies, count = all_sum(self.sums).split([width, width, out_dim, 1, 1])
        scores = {
            "feature_std": spread_of(first, second, count).item(),
            "teacher_entropy": (entropies / count).item(),
            "prototype_entropy": entropy(usage / count).item(),  # of all answers together: 0 where all images get the same
            "center_norm": self.task.center.norm().item(),
        }
        for sign in signs_of_collapse(scores, self.task.cfg):
            logger.warning("%s", sign)
        return scores

    def pictures(self) -> Mapping[str, Tensor]:
        """Where the teacher's class token looks in its last block, head by head."""
        network = self.task.network()
        if not self.shown or not has_attention(network):
            return {}
        images = torch.stack(self.shown)
        return {"attention": sheet(images, attention_maps(network, images), self.task.mean, self.task.std)}


def signs_of_collapse(scores: Mapping[str, float], cfg: DinoConfig) -> Iterator[str]:
    """What is going wrong, each with what to change."""
    most = math.log(cfg.out_dim)
    if scores["feature_std"] < FLAT:
        yield (
            f"the features of all images point the same way (standard deviation {scores['feature_std']:.2g}; where they point everywhere alike "
            "it is 1). Batch normalisation in the head tells them apart, a loss keeps them apart, and the learning rate may be too high: "
            f"task.head_batch_norm=true, task.koleo_weight={cfg.parts.koleo_weight * 2 or 0.1:.3g}, a lower optimizer.lr"
        )
    if scores["teacher_entropy"] > ALIKE * most:
        yield (
            f"the teacher finds all prototypes alike (entropy {scores['teacher_entropy']:.3f} of at most {most:.3f}): there is nothing to learn from "
            f"it. A sharper one helps: task.teacher_temperature={cfg.teacher_temperature / 2:.3g}, "
            f"task.warmup_teacher_temperature={cfg.warmup_teacher_temperature / 2:.3g}; so may a lower optimizer.lr or fewer prototypes, "
            f"task.out_dim={max(2, cfg.out_dim // 4)}"
        )
    elif scores["prototype_entropy"] < ONE * most:
        helps = (  # what the centering does not use would change nothing
            f"A centre that follows faster and a softer teacher help: task.center_momentum={cfg.center_momentum / 2:.3g}, "
            if cfg.parts.centering == "mean"
            else "Its answers are balanced over each micro-batch: larger ones (loop.batch_size, loop.accumulate=1) and a softer teacher help: "
        )
        yield (
            f"the teacher says the same of nearly every image (entropy of all its answers {scores['prototype_entropy']:.3f} of at most {most:.3f}). "
            f"{helps}task.teacher_temperature={cfg.teacher_temperature * 1.5:.3g}; so may task.norm_last_layer=true, "
            f"task.freeze_last_layer_epochs={cfg.freeze_last_layer_epochs + 1:g} and a lower optimizer.lr"
        )


class Labelled(Unlabelled):
    """The same where images have labels: what nearest neighbours and a linear classifier make of the features."""

    def __init__(self, task: Dino) -> None:
        super().__init__(task)
        self.known: list[tuple[Tensor, Tensor]] = []  # features [N, D] and (index, label) [N, 2]
        self.asked: list[tuple[Tensor, Tensor]] = []

    def reference(self, batch: Batch) -> None:
        features = self.task.network()(batch["image"]).float()
        self.known.append((features, torch.stack([batch["index"], batch["label"]], dim=1)))

    def update(self, batch: Batch) -> None:
        self.asked.append((self._look(batch), torch.stack([batch["index"], batch["label"]], dim=1)))

    def compute(self) -> dict[str, float]:
        scores = super().compute()
        bank, known = self._gathered(self.known)
        queries, labels = self._gathered(self.asked)
        if not len(bank) or not len(queries):
            return scores
        cfg, classes = self.task.cfg, self.task.num_classes
        found = knn_scores(bank, known, queries, classes, k=cfg.knn_neighbours).argmax(1)
        scores["knn_top1"] = (found == labels).double().mean().item()
        if cfg.linear_probe:
            probe = fit_linear(bank, known, classes)
            scores["linear_top1"] = (probe(queries).argmax(1) == labels).double().mean().item()
        return scores

    def _gathered(self, rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Features and labels of all ranks, in the order of the dataset."""
        features = [f for f, _ in rows] or [torch.zeros(0, self.task.width, device=self.device)]
        numbers = [n for _, n in rows] or [torch.zeros(0, 2, dtype=torch.int64, device=self.device)]
        x, n = all_cat(torch.cat(features)), all_cat(torch.cat(numbers))
        order = n[:, 0].argsort()
        return x[order], n[order, 1]
