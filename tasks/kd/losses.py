"""What it costs a student to differ from its teacher, for each image, [N]. Pure functions; logits are [N, C], features [N, D]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of the softened probabilities."""
    ours, theirs = (F.log_softmax(logits.float() / temperature, dim=1) for logits in (student, teacher))
    # Gradients of softened logits shrink with 1 / temperature**2; this undoes it (arXiv:1503.02531, sec. 2).
    return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(1) * temperature**2


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the class that the teacher finds likeliest (arXiv:2012.12877, eq. 3)."""
    return F.cross_entropy(student.float(), teacher.argmax(1), reduction="none")


def embedding(student: Tensor, teacher: Tensor, *, normalize: bool) -> Tensor:
    """Mean squared difference of features, of their directions where `normalize` is set."""
    student, teacher = student.float(), teacher.float()
    if normalize:
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return (student - teacher).square().mean(1)
