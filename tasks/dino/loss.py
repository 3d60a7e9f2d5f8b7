"""Losses between what a teacher and a student say of the same image. Pure functions of scores; they know no network."""

from __future__ import annotations

import torch
from torch import Tensor


def sharpened(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """The teacher's probabilities: centred, then sharpened (arXiv:2104.14294, eq. 1 and 4). scores [..., K], center [K]."""
    return ((scores.float() - center) / temperature).softmax(-1)


def view_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between each of the teacher's views and each other view of the student's, their mean (arXiv:2104.14294, eq. 3).

    Args:
        student: scores [V, N, K], whose first views are those of the teacher.
        teacher: probabilities [T, N, K], T <= V.
    """
    log_p = (student.float() / temperature).log_softmax(-1)  # [V, N, K]
    pairs = -torch.einsum("tnk,vnk->tv", teacher, log_p)  # [T, V], sums over images
    views, images = student.shape[0], student.shape[1]
    same = torch.eye(teacher.shape[0], views, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(same, 0).sum() / (teacher.shape[0] * (views - 1) * images)


def patch_loss(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float, images: int) -> Tensor:
    """Cross-entropy at hidden patches: the mean over an image's, then over all images, those without any too (arXiv:2111.07832, eq. 3).

    Args:
        student: scores [M, K] of the hidden patches. teacher: probabilities [M, K]. weight: [M], 1 / number of the image's.
    """
    log_p = (student.float() / temperature).log_softmax(-1)
    return -((teacher * log_p).sum(-1) * weight).sum() / images


def entropy(p: Tensor) -> Tensor:
    """Of distributions [..., K], in nats, [...]."""
    return torch.special.entr(p).sum(-1)
