"""The terms of the loss, each a pure function of maps or part features. What they mean: docs/part-discovery.md.

Maps are [N, P, h, w] with the background last, features [N, P, D]; every term is a scalar and, but for presence, a mean over
images. Sources: PDiscoFormer (arXiv:2407.04538, sec. 3.3) and its successor with a second stage (arXiv:2506.08915).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def orthogonality(features: Tensor, *, axis: str = "parts") -> Tensor:
    """Mean square of the Gram matrix of unit vectors less the identity: 0 where all parts are orthogonal.

    Over `parts` each part is a vector, as in the papers; over `channels` each channel is one, as the published code has it.
    """
    vectors = F.normalize(features, dim=2) if axis == "parts" else F.normalize(features, dim=1).transpose(1, 2)
    gram = vectors @ vectors.transpose(1, 2)  # [N, P, P] or [N, D, D]
    return (gram - torch.eye(gram.shape[-1], device=gram.device)).square().mean()


def equivariance(maps: Tensor, turned_back: Tensor) -> Tensor:
    """1 - the cosine of each part's map and that of the turned image, turned back; the background is left out."""
    return 1 - F.cosine_similarity(maps[:, :-1].flatten(2), turned_back[:, :-1].flatten(2), dim=2).mean()


def smoothed(maps: Tensor) -> Tensor:
    """Means of 3 x 3 places, without padding, [N, P, h - 2, w - 2]."""
    return F.avg_pool2d(maps, 3, stride=1)


def presence(maps: Tensor, kind: str, *, across_ranks: bool = False) -> Tensor:
    """Every part is somewhere in the batch; of all ranks, or of this one's share of it alone.

    `original` and `soft_constraint` ask for one image that shows the part well, `tanh` and `soft_tanh` add up over images.
    """
    peaks = smoothed(maps[:, :-1]).amax((2, 3))  # [N, K]
    if kind in ("original", "soft_constraint"):
        most = _rank_max(peaks.amax(0), across_ranks)  # [K]
        if kind == "original":
            return 1 - most.mean()
        beta = 0.1  # of the loss of a part that is nowhere, so that it does not vanish
        return ((1 - most) * ((1 - beta) * most.detach() + beta)).mean()
    total = _rank_sum(peaks.sum(0), across_ranks).tanh()
    return log_loss(total).mean() if kind == "tanh" else (1 - total).mean()


def enforced_presence(maps: Tensor, kind: str) -> Tensor:
    """The background is in every image: near its border (`enforced_presence`), or anywhere."""
    background = maps[:, -1]
    if kind == "enforced_presence":
        near = smoothed(maps[:, -1:]).squeeze(1)
        return log_loss((near * border(near)).amax((1, 2))).mean()
    share = background.mean((1, 2))  # [N]
    return {"log": log_loss(share), "linear": 1 - share, "mse": (1 - share).square()}[kind].mean()


def border(maps: Tensor) -> Tensor:
    """(x² + y²) / 2 over [-1, 1]², [h, w]: 1 in the corners, 0 in the middle."""
    y, x = (torch.linspace(-1, 1, n, device=maps.device) for n in maps.shape[-2:])
    squares = y.square()[:, None] + x.square()[None]
    return squares / squares.max()


def total_variation(maps: Tensor) -> Tensor:
    """Differences between neighbours, over all maps, per image and place."""
    down, right = maps.diff(dim=2).abs().sum(), maps.diff(dim=3).abs().sum()
    return (down + right) / (maps.shape[0] * maps.shape[2] * maps.shape[3])


def entropy(maps: Tensor) -> Tensor:
    """Mean entropy over parts of a place, in nats."""
    return -torch.special.xlogy(maps, maps.clamp_min(1e-12)).sum(1).mean()


def concentration(maps: Tensor) -> Tensor:
    """Mean squared distance of each part's mass from its centre, in units of the map's sides (arXiv:2309.03173, sec. 3.3)."""
    parts = maps[:, :-1]
    h, w = parts.shape[-2:]
    y, x = torch.arange(h, device=maps.device).view(h, 1) / h, torch.arange(w, device=maps.device).view(1, w) / w
    mass = parts.sum((2, 3), keepdim=True).detach().clamp_min(1e-6)
    centre_y, centre_x = ((parts * c).sum((2, 3), keepdim=True) / mass for c in (y, x))
    return (parts * ((centre_y - y).square() + (centre_x - x).square())).mean()


def log_loss(probability: Tensor) -> Tensor:
    """Binary cross-entropy against 1; finite at 0."""
    return -probability.clamp_min(1e-37).log()


def _rank_max(x: Tensor, across_ranks: bool) -> Tensor:
    """The largest over ranks. DDP will average gradients, so the rank that has it gives `size` times its own."""
    if not (across_ranks and dist.is_initialized()):
        return x
    most = x.detach().clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    owns = (x.detach() == most).to(x.dtype)
    owners = owns.clone()
    dist.all_reduce(owners)
    return most + (x - x.detach()) * owns * (dist.get_world_size() / owners)


def _rank_sum(x: Tensor, across_ranks: bool) -> Tensor:
    if not (across_ranks and dist.is_initialized()):
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + (x - x.detach()) * dist.get_world_size()
