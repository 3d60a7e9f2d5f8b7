"""Evaluators that several tasks share. Every one adds up sums and counts over ranks, never means of means."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer.task import Batch


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


def scores_of_logits(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy, and whether the label is the best and among the best five, of each image, [N] each."""
    logits = logits.float()  # [N, C]
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)  # [N, 5]
    return {
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "top1": hits[:, 0].float(),
        "top5": hits.any(1).float(),
    }


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


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
