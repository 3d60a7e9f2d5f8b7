"""What a classifier minimises. Pure functions of logits and targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def binary_cross_entropy(
    logits: Tensor, target: Tensor, *, smoothing: float = 0.0, threshold: float | None = None, total: bool = False
) -> Tensor:
    """Each class against the rest, so that an image may be of several at once, as a mixed one is (arXiv:2110.00476, sec. 3).

    Args:
        logits: [N, C].
        target: labels [N] or soft targets [N, C].
        smoothing: share of the target spread evenly over all classes.
        threshold: targets above it are 1, the others 0; None = as they are.
        total: sum over the classes instead of their mean.
    """
    classes = logits.shape[1]
    soft = F.one_hot(target, classes).to(logits.dtype) if target.ndim == 1 else target.to(logits.dtype)
    soft = soft * (1 - smoothing) + smoothing / classes
    if threshold is not None:
        soft = (soft > threshold).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")  # [N, C]
    return (losses.sum(1) if total else losses.mean(1)).mean()


def divergence(logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """KL(reference || logits), both softened, mean over images (arXiv:2205.14083, sec. 4.2). [N, C] each."""
    log_p = F.log_softmax(logits.float() / temperature, dim=1)
    log_q = F.log_softmax(reference.float() / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
