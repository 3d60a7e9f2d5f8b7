"""Pictures of what was there and what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

TRUE, FOUND = "lime", "orange"
SURE = 0.5  # detections of less confidence would cover the picture


def drawn(
    image: Tensor,
    found: Mapping[str, Tensor],
    boxes: Tensor,
    classes: Sequence[str],
    offset: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """uint8 [3, H, W] of a normalised image [C, H, W]: true boxes in green, those found in orange, with class and confidence."""
    channels = [min(c, image.shape[0] - 1) for c in range(3)]  # grey is shown grey; of more than three, the first three
    scale = torch.tensor([std[c % len(std)] for c in channels]).view(3, 1, 1)
    shift = torch.tensor([mean[c % len(mean)] for c in channels]).view(3, 1, 1)
    picture = ((image[channels] * scale + shift).clamp(0, 1) * 255).to(torch.uint8)
    if len(boxes):
        picture = draw_bounding_boxes(picture, _visible(boxes, picture), colors=TRUE)
    sure = found["scores"] >= SURE
    if sure.any():
        names = [f"{classes[n - offset]} {s:.2f}" for n, s in zip(found["labels"][sure].tolist(), found["scores"][sure].tolist())]
        picture = draw_bounding_boxes(picture, _visible(found["boxes"][sure], picture), labels=names, colors=FOUND)
    return picture


def _visible(boxes: Tensor, picture: Tensor) -> Tensor:
    """Corners in order, inside the picture: what is drawn at its very edge is not to be seen."""
    height, width = picture.shape[1:]
    return torch.minimum(boxes.float().clamp(min=0), torch.tensor([width - 1, height - 1] * 2, dtype=torch.float32))
