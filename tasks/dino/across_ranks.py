"""What looks at the batches of all ranks together: balanced assignments, distances to neighbours. Knows scores and features only.

Everything is exact for ranks of unequal size. Micro-batches are not seen together: a step cut up by `loop.accumulate` balances
and measures each on its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer.evaluation import all_cat, all_sum


@torch.no_grad()
def balanced(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Probabilities [N, K] in which every prototype gets about as much as any other (Sinkhorn and Knopp; arXiv:2006.09882, sec. 3.1;
    arXiv:2304.07193, sec. 4). scores [N, K] of this rank."""
    q = scores.float() / temperature
    highest = q.max() if q.numel() else q.new_full((), -torch.inf)
    if dist.is_initialized():
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    q = (q - highest).exp()  # a common factor, which the first division takes out again
    samples = all_sum(q.new_tensor(q.shape[0]))
    for _ in range(iterations):
        q = q / (all_sum(q.sum(0)) * q.shape[1])
        q = q / (q.sum(1, keepdim=True) * samples)
    return q * samples


def koleo(features: Tensor) -> Tensor:
    """-log of the distance to the nearest other feature of any rank, its mean over this rank's (arXiv:1806.03198, eq. 2). features [N, D]."""
    x = F.normalize(features.float(), dim=-1, eps=1e-8)
    everyone, first = all_rows(x)
    with torch.no_grad():
        similarity = x @ everyone.T  # [N, all ranks']
        rows = torch.arange(len(x), device=x.device)
        similarity[rows, rows + first] = -2  # below any cosine: nobody is its own neighbour
        nearest = similarity.argmax(1)
    return -(F.pairwise_distance(x, everyone[nearest], eps=1e-8) + 1e-8).log().mean()


def all_rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks, and where this rank's begin. Gradients flow back to the rank that a row came from."""
    if not dist.is_initialized():
        return x, 0
    counts = all_cat(torch.tensor([x.shape[0]], device=x.device)).tolist()
    first = sum(counts[: dist.get_rank()])
    return _AllRows.apply(x, first), first


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.place = slice(first, first + x.shape[0])
        return all_cat(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_sum(gradient.contiguous())[ctx.place], None
