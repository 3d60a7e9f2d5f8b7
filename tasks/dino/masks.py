"""Which patches of a large view are hidden from the student, drawn for each sample by its own key. Knows grids, not networks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.data.augment import Augmentation
    from trainer.data.source import Sample
    from trainer.random import SampleRandom
    from trainer.task import Batch

MASKS = 160  # stream of a sample's numbers
TRIES = 32  # rectangles drawn for a mask; what is missing then is filled up patch by patch
SMALLEST, FLATTEST = 4, 0.3  # patches of a rectangle, and its aspect ratio (arXiv:2106.08254, alg. 1)


class Masking:
    """The run's views, and `mask` [N, 2, h, w]: True where a patch of a large view is hidden.

    A view is masked at all with `probability`; then a share of its patches, uniform in `ratio`, is (arXiv:2111.07832, app. A).
    """

    def __init__(self, views: Augmentation, grid: tuple[int, int], *, probability: float, ratio: list[float]) -> None:
        self.views, self.grid, self.probability, self.ratio = views, grid, probability, ratio
        self.lazy = getattr(views, "lazy", False)
        self.num_classes = views.num_classes

    def sample(self, sample: Sample, random: SampleRandom) -> dict[str, Any]:
        draw = random.stream(MASKS)
        return {**self.views.sample(sample, random), "mask": torch.stack([self._mask(draw) for _ in range(2)])}

    def _mask(self, draw: SampleRandom) -> Tensor:
        is_masked, share = draw.uniform() < self.probability, draw.uniform(*self.ratio)
        return block_mask(draw, self.grid, int(share * self.grid[0] * self.grid[1]) if is_masked else 0)

    def batch(self, batch: Batch) -> Batch:
        mask = batch["mask"].clone()  # the loader reuses the memory it came in
        return {**self.views.batch(batch), "mask": mask}


def block_mask(draw: SampleRandom, grid: tuple[int, int], count: int) -> Tensor:
    """Exactly `count` patches of the grid, in rectangles that may overlap (arXiv:2106.08254, alg. 1): bool [h, w]."""
    height, width = grid
    mask, left = torch.zeros(grid, dtype=torch.bool), count
    for _ in range(TRIES):
        if left == 0:
            break
        area = draw.uniform(min(SMALLEST, left), left)
        aspect = math.exp(draw.uniform(math.log(FLATTEST), -math.log(FLATTEST)))
        h, w = (min(limit, max(1, round(side))) for side, limit in ((math.sqrt(area * aspect), height), (math.sqrt(area / aspect), width)))
        top, start = draw.integer(height - h + 1), draw.integer(width - w + 1)
        block = mask[top : top + h, start : start + w]
        new = h * w - int(block.sum())
        if new <= left:
            block.fill_(True)
            left -= new
    flat = mask.view(-1)
    while left:
        free = (~flat).nonzero().view(-1)
        flat[free[draw.integer(len(free))]] = True
        left -= 1
    return mask
