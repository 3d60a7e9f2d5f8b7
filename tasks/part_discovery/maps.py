"""From features to part maps, part features and the mask of what is seen of an image. Pure functions, without weights.

Axes: N images, P = K + 1 parts with the background last, D channels, h x w places. Noise is drawn from each sample's own
key, so it depends neither on the number of ranks nor on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.random import uniform

MAP_NOISE, MASK_NOISE, TURNED_NOISE, PART_DROPOUT, MASK_DROPOUT = 0x70A1, 0x70A2, 0x70A3, 0x70A4, 0x70A5  # streams of a sample's numbers

TINY = 1e-10  # what a hidden token still weighs where the mask has to pass gradients on: log(0) would have none


def distance_logits(features: Tensor, prototypes: Tensor) -> Tensor:
    """-|z - p|^2 of every place and prototype, [N, P, h, w] float32, out of [N, D, h, w] and [P, D].

    In float32 whatever autocast says: the squares are hundreds of times their differences.
    """
    with torch.autocast(features.device.type, enabled=False):
        z, p = features.float(), prototypes.float()
        products = torch.einsum("ndhw,pd->nphw", z, p)
        return 2 * products - z.square().sum(1, keepdim=True) - p.square().sum(1).view(1, -1, 1, 1)


def similarity_logits(features: Tensor, prototypes: Tensor) -> Tensor:
    """z · p of every place and prototype, [N, P, h, w] float32: what thresholds on parts are given in."""
    with torch.autocast(features.device.type, enabled=False):
        return torch.einsum("ndhw,pd->nphw", features.float(), prototypes.float())


def gumbel(keys: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard Gumbel noise [N, *shape], float32: -log(-log u)."""
    count = torch.Size(shape).numel()
    u = uniform(keys, stream, count).double() + 2.0**-25  # (0, 1): of 24 bits and a half, so neither logarithm meets 0
    return -(-u.log()).log().float().view(len(keys), *shape)


def soft_maps(logits: Tensor, temperature: float, noise: Tensor | None = None) -> Tensor:
    """Softmax over parts, with noise the Gumbel-softmax (arXiv:1611.01144, sec. 2.2), [N, P, h, w]."""
    return ((logits if noise is None else logits + noise) / temperature).softmax(1)


def kept(keys: Tensor, stream: int, count: int, dropout: float) -> Tensor:
    """1 for each of `count` parts of a sample that stays, 0 for one that is dropped, [N, count]."""
    return (uniform(keys, stream, count) >= dropout).float()


def part_features(features: Tensor, maps: Tensor, *, masked_mean: bool) -> Tensor:
    """Features [N, D, h, w] averaged under each map [N, P, h, w], [N, P, D] float32: over all places, as published, or
    (`masked_mean`) over the places of the part."""
    with torch.autocast(features.device.type, enabled=False):
        sums = torch.einsum("ndhw,nphw->npd", features.float(), maps.float())
        if masked_mean:
            return sums / maps.float().sum((2, 3)).clamp_min(1e-6).unsqueeze(-1)
        return sums / maps[0, 0].numel()


@dataclass(frozen=True, slots=True)
class Mask:
    """What the second stage sees of each image."""

    hard: Tensor  # [N, h, w] float, 1 = seen, with the gradients of `soft_sum` where there are any to pass on
    soft: Tensor  # [N, h, w] probability of the likeliest part


def foreground(
    logits: Tensor, temperature: float, *, noise: Tensor | None = None, kept_parts: Tensor | None = None,
    straight_through: bool = False, bounded: bool = False,
) -> Mask:  # fmt: skip
    """A place is seen where some part is no less likely than the background.

    Args:
        kept_parts: [N, K]; a part that was dropped hides its places.
        straight_through: the hard mask takes the gradient of the summed probabilities of all parts (arXiv:1308.3432).
        bounded: and of it no more at a hidden place than at the seen place of the image where it is largest.
    """
    probabilities = soft_maps(logits, temperature, noise)
    parts, background = probabilities[:, :-1], probabilities[:, -1]
    if kept_parts is not None:
        parts = parts * kept_parts[:, :, None, None]
    likeliest = parts.amax(1)
    hard = (likeliest >= background).to(parts.dtype)
    if straight_through:
        total = parts.sum(1)
        if bounded and total.requires_grad:
            seen = hard.detach() > 0
            total.register_hook(lambda gradient: no_larger_than_seen(gradient, seen))
        hard = hard + (total - total.detach())  # in this order the added term is exactly 0
    return Mask(hard, likeliest)


def no_larger_than_seen(gradient: Tensor, seen: Tensor) -> Tensor:
    """The gradient of a mask [N, h, w], cut off at hidden places where it is larger than at every seen one of its image.

    The weight of a hidden token in an attention is nothing whatever its score s is, but its derivative is exp(s) over the sum of
    the others', without a bound; to show the token would change its weight by less than 1.
    """
    most = (gradient.abs() * seen).amax((1, 2), keepdim=True)
    return torch.where(seen, gradient, torch.minimum(torch.maximum(gradient, -most), most))


def without(logits: Tensor, removed: list[int]) -> Tensor:
    """Logits in which the places of the removed parts go to the background."""
    owner = logits.argmax(1, keepdim=True)  # [N, 1, h, w]
    taken = torch.isin(owner, torch.tensor(removed, device=logits.device))
    gone = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    gone[removed] = True
    hidden = logits.masked_fill(gone.view(1, -1, 1, 1), float("-inf"))
    only_background = torch.full_like(logits, float("-inf"))
    only_background[:, -1] = 0
    return torch.where(taken, only_background, hidden)


def above_thresholds(similarity: Tensor, thresholds: Tensor) -> Tensor:
    """Logits for an evaluation in which a place belongs to a part only where z · p reaches the part's threshold [K]."""
    parts = similarity[:, :-1]
    parts = parts.masked_fill(parts < thresholds.view(1, -1, 1, 1), float("-inf"))
    return torch.cat([parts, similarity[:, -1:]], dim=1)
