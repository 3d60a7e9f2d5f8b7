"""What happens to an image between the file and the network, in two stages.

`sample` runs in a loader's worker on one sample: it decodes, cuts and resizes, and ends in uint8. `batch` runs on the device
on a whole micro-batch: flips, colour, mixing, normalisation. Both draw from the sample's own key, so that what a sample looks
like depends neither on the number of workers and ranks nor on what else is in the batch; only the partners of mixup and
cutmix come from the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from trainer.data.source import Sample
    from trainer.random import SampleRandom
    from trainer.task import Batch


Made = TypeVar("Made")


class Other(Protocol):
    """Another sample of the data, drawn by the key of the one it joins. Where it cannot be read, `use` is given another."""

    def __call__(self, number: int, use: Callable[[Sample], Made], /) -> Made: ...


class Augmentation(Protocol):
    """The transform of one split. It reaches the workers by fork.

    It may have more: `lazy = True` where it wants image files with their headers read and their pixels not, because
    it knows the crop first; `ragged`, the names of fields whose shape differs from sample to sample; and
    `others(random, epoch) -> int`, how many other samples it wants beside one. Where these are some, `together(sample, other:
    Other, random)` takes the place of `sample`.
    """

    num_classes: int | None  # set by the loader; needed where labels are mixed

    def sample(self, sample: Sample, random: SampleRandom) -> dict[str, Any]:
        """One sample as tensors, arrays and numbers, `image` uint8 [C, H, W]. All samples have the same fields and shapes."""
        ...

    def batch(self, batch: Batch) -> Batch:
        """The batch ready for the network, in tensors of its own: the loader reuses the memory it came in."""
        ...
