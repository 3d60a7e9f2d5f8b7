"""What there is to say about predicted labels beside their means: each image's, each class's, and who is taken for whom.

For every evaluator of one label per image; it knows no task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.evaluation import Mean
from trainer.task import Batch, Report

DETAILS = ("label", "predicted", "confidence")  # columns that are kept for the report and are no scores
REAL = "real_top1"


def label_scores(logits: Tensor, batch: Batch, competing: Tensor | None = None) -> dict[str, Tensor]:
    """Loss, accuracies and details of each image, [N] each, of logits [N, C]; only classes of `competing` [C] bool may win.

    Where a batch has `real`, uint8 [N, C], every class that is right for an image (arXiv:2006.07159), accuracy against it is
    there too; NaN for an image for which none is.
    """
    labels, logits = batch["label"], logits.float()
    logits = among(logits, competing)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [N, 5]
    hits = ranked == labels.unsqueeze(1)
    scores = {"loss": F.cross_entropy(logits, labels, reduction="none"), "top1": hits[:, 0].float(), "top5": hits.any(1).float()}
    if "real" in batch:
        right = batch["real"].gather(1, ranked[:, :1])[:, 0].float()
        scores[REAL] = right.where((batch["real"] > 0).any(1), float("nan"))
    confidence = logits.softmax(1).gather(1, ranked[:, :1])[:, 0]
    return {**scores, "label": labels, "predicted": ranked[:, 0], "confidence": confidence}


def competitors(places: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Which of `count` classes may win, bool [count]: those at these places."""
    competing = torch.zeros(count, dtype=torch.bool, device=device)
    competing[list(places)] = True
    return competing


def among(logits: Tensor, competing: Tensor | None) -> Tensor:
    """Logits [N, C] of which only the classes of `competing` [C] bool can win; None = all."""
    return logits if competing is None else logits.masked_fill(~competing, float("-inf"))


class Labelled(Mean):
    """Exact means, and a report of what became of every image and class. `per_sample` gives `DETAILS` too."""

    def __init__(self, per_sample: Callable[[Batch], Mapping[str, Tensor]], classes: Sequence[str]) -> None:
        super().__init__(per_sample)
        self.classes = list(classes)

    def compute(self) -> dict[str, float]:
        scores = super().compute()
        if REAL in scores:
            scores[REAL] = self.column(REAL).nanmean().item()
        return {name: value for name, value in scores.items() if name not in DETAILS}

    def report(self) -> Report:
        return label_report({name: self.column(name) for name in ("index", *DETAILS)}, self.classes)


def label_report(columns: Mapping[str, Tensor], classes: Sequence[str]) -> Report:
    """What became of every image and class; `columns` [N]: `index` in the dataset, and `DETAILS`."""
    places, labels, guesses = (columns[name].long() for name in ("index", "label", "predicted"))
    rows = zip(places.tolist(), labels.tolist(), guesses.tolist(), columns["confidence"].tolist(), strict=True)
    samples = [{"index": i, "label": classes[y], "predicted": classes[p], "confidence": c, "correct": y == p} for i, y, p, c in rows]
    counts = confusion(labels, guesses, len(classes))
    tables = {"classes": class_table(counts, classes)} if len(labels) else {}
    return Report(samples=samples, tables=tables, matrices={"confusion": (list(classes), counts.tolist())})


def best_five(logits: Tensor, classes: Sequence[str], competing: Tensor | None = None) -> list[list[dict[str, Any]]]:
    """`Task.predict` of logits [N, C]: the likeliest class of each image, its probability, and the likeliest five."""
    logits = among(logits.float(), competing)
    values, places = logits.softmax(1).topk(min(5, logits.shape[1]), dim=1)  # [N, 5]
    found = []
    for shares, labels in zip(values.tolist(), places.tolist(), strict=True):
        ranked = [(classes[label], share) for label, share in zip(labels, shares, strict=True) if share > 0]
        top = "; ".join(f"{name} {share:.4f}" for name, share in ranked)
        found.append([{"predicted": ranked[0][0], "confidence": ranked[0][1], "top5": top}])
    return found


def confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """How often a class [rows] was taken for another [columns], [C, C] int64."""
    flat = torch.bincount(labels.cpu() * num_classes + predicted.cpu(), minlength=num_classes**2)
    return flat.view(num_classes, num_classes)


def class_table(counts: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row a class that has images or was predicted: how many of it were found, how many of those called so are, and what
    its images are most often mistaken for."""
    total, called, right = counts.sum(1), counts.sum(0), counts.diag()
    wrong = counts - counts.diag().diag()
    rows = []
    for c, name in enumerate(classes):
        if not (total[c] or called[c]):
            continue
        most = int(wrong[c].argmax())
        rows.append(
            {
                "class": name, "images": int(total[c]), "recall": float(right[c] / total[c]) if total[c] else None,
                "precision": float(right[c] / called[c]) if called[c] else None,
                "mistaken_for": f"{classes[most]} ({int(wrong[c, most])})" if wrong[c, most] else None,
            }
        )  # fmt: skip
    return rows
