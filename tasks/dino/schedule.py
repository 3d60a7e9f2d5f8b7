"""How teacher and temperature move over a run, in closed form. Knows step counts only."""

from __future__ import annotations

import math


def teacher_momentum(start: float, step: int, total: int) -> float:
    """How much of itself the teacher keeps at optimizer step `step`, from 0: a cosine from `start` to 1 (arXiv:2104.14294, sec. 3.1)."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / total)) / 2


def teacher_temperature(start: float, end: float, warmup_epochs: int, epoch: int) -> float:
    """Constant within an epoch; over the first `warmup_epochs`, the first and the last included, a line from `start` to `end`
    (arXiv:2104.14294, app. C)."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(1, warmup_epochs - 1)
