"""The pictures in a batch, without what pads them."""

from __future__ import annotations

from torch import Tensor

from trainer.task import Batch


def pictures(batch: Batch) -> list[Tensor]:
    """[C, h, w] each; `size` is known on the host, so nothing waits for the device."""
    images: Tensor = batch["image"]
    return [image[:, :h, :w] for image, (h, w) in zip(images, batch["size"], strict=True)]
