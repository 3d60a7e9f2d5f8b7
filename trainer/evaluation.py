"""Evaluators that several tasks share. Every one adds up sums and counts over ranks, never means of means."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.probe import knn_scores
from trainer.task import Batch

Rows = tuple[Tensor, Tensor, Tensor]
"""Places in the dataset int64 [N], features float32 [N, D], labels int64 [N]."""


def all_sum(x: Tensor) -> Tensor:
    """The sum of `x` over ranks; `x` itself where there is one."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_cat(x: Tensor) -> Tensor:
    """The rows of every rank, one after the other, [sum N_r, ...]; ranks may hold different numbers of rows."""
    if not dist.is_initialized():
        return x
    rows = torch.tensor([x.shape[0]], device=x.device)
    counts = [torch.zeros_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, rows)
    longest = int(max(c.item() for c in counts))
    padded = torch.cat([x, x.new_zeros(longest - x.shape[0], *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count.item())] for part, count in zip(parts, counts, strict=True)])


class Mean:
    """Exact means over the whole set.

    Per-sample values are kept by their place in the dataset and added up in that order, in float64, so that the result
    is the same to the last bit whatever the number of ranks and the size of the batches (for equal per-sample values).
    """

    def __init__(self, per_sample: Callable[[Batch], Mapping[str, Tensor]]) -> None:
        self.per_sample = per_sample  # batch -> {name: [N]}
        self.names: list[str] = []
        self.rows: list[Tensor] = []  # [N, 1 + names] each: index, values
        self.table: Tensor | None = None  # of all ranks, in the dataset's order, once computed

    def update(self, batch: Batch) -> None:
        values = self.per_sample(batch)
        self.names = list(values)
        columns = [batch["index"].to(torch.float64), *(v.to(torch.float64) for v in values.values())]
        self.rows.append(torch.stack(columns, dim=1))

    def compute(self) -> dict[str, float]:
        if dist.is_initialized():  # a rank whose share was empty still has to take part
            everyone: list[list[str] | None] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self.names)
            self.names = next((names for names in everyone if names), [])
        if not self.names:
            return {}
        device = self.rows[0].device if self.rows else _device()
        mine = torch.cat(self.rows) if self.rows else torch.zeros(0, 1 + len(self.names), dtype=torch.float64, device=device)
        table = all_cat(mine)
        table = self.table = table[table[:, 0].argsort(stable=True)]
        means = (table[:, 1:].sum(0) / table.shape[0]).tolist()
        return dict(zip(self.names, means, strict=True))

    def column(self, name: str) -> Tensor:
        """A value of every sample, [N] float64, once computed; `index` is its place in the dataset."""
        if self.table is None:
            return torch.zeros(0, dtype=torch.float64)
        return self.table[:, ["index", *self.names].index(name)]


class Neighbours:
    """How often the nearest training images of an image agree with it in class, exact over ranks.

    Fill it with features of images whose class is known and of those that are asked about, in any shares and any order.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.known: list[Rows] = []
        self.asked: list[Rows] = []

    def remember(self, index: Tensor, features: Tensor, labels: Tensor) -> None:
        self.known.append((index, features.float(), labels))

    def ask(self, index: Tensor, features: Tensor, labels: Tensor) -> None:
        self.asked.append((index, features.float(), labels))

    def accuracy(self, *neighbours: int, temperature: float = 0.07) -> list[float] | None:
        """Share of the asked images that are told right by so many neighbours, for each number; None where nobody knows anything.
        Collective."""
        (bank, bank_labels), (queries, labels) = _everybodys(self.known), _everybodys(self.asked)
        if not len(bank) or not len(queries):
            return None
        votes = (knn_scores(bank, bank_labels, queries, self.num_classes, k=k, temperature=temperature) for k in neighbours)
        return [(v.argmax(1) == labels).double().mean().item() for v in votes]


def _everybodys(rows: list[Rows]) -> tuple[Tensor, Tensor]:
    """Features and labels of all ranks in the order of the dataset, so that no number of ranks changes the answer."""
    width = rows[0][1].shape[1] if rows else 0
    if dist.is_initialized():  # a rank whose share was empty still has to take part
        widths: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(widths, width)
        width = max(widths)
    none = torch.zeros(0, dtype=torch.int64, device=_device() if dist.is_initialized() else torch.device("cpu"))
    mine = (
        [torch.cat(column) for column in zip(*rows, strict=True)] if rows else [none, none.new_zeros(0, width, dtype=torch.float32), none]
    )
    index, features, labels = (all_cat(column) for column in mine)
    order = index.argsort(stable=True)
    return features[order], labels[order]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
