"""SSDLite, an SSD (arXiv:1512.02325) of separable convolutions (arXiv:1801.04381, sec. 6.2), on the last two maps of any backbone.

Head, default boxes, matching and losses are torchvision's own code. It knows no batches and no scores.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block, _normal_init
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

if TYPE_CHECKING:
    from tasks.detection.config import DetectionConfig

NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # torchvision's, of its published SSDLite
EXTRAS = 4  # maps below the backbone's last, each of half the side of the one before
TOPK = 300  # candidates of a class that suppression looks at: torchvision's ssdlite320


class SmallerMaps(ExtraFPNBlock):
    """Four more maps. In fp32, as some have one place: see `CoarserMaps`.

    Args:
        channels: of the backbone's last map.
        width: the four have 2, 1, 1 and 1/2 times as many channels: torchvision's 512, 256, 256 and 128 at the usual 256.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.widths = [2 * width, width, width, width // 2]
        self.blocks = nn.ModuleList(_extra_block(a, b, NORM) for a, b in zip([channels, *self.widths], self.widths))
        _normal_init(self.blocks)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        maps = list(results)
        with torch.autocast(maps[-1].device.type, enabled=False):
            last = maps[-1].float()
            for block in self.blocks:
                last = block(last)
                maps.append(last)
        return maps, [str(i) for i in range(len(maps))]


class OnTop(nn.Module):
    """The backbone's own maps, and further ones: in the place of a feature pyramid."""

    def __init__(self, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        results, names = self.extra(list(maps.values()), [], list(maps))
        return OrderedDict(zip(names, results))


class DefaultBoxes(DefaultBoxGenerator):
    """In fp32 whatever autocast makes of the maps: eight bits do not tell one pixel in 320 from its neighbour."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return super().forward(image_list, [m.detach().float() for m in feature_maps])


def ssdlite(cfg: DetectionConfig, backbone: Any, num_classes: int, side: int) -> SSD:
    """The detector on a backbone whose `out_channels` are those of each map.

    Args:
        side: of the square that images are put into; default boxes have fractions of it.
    """
    channels: list[int] = backbone.out_channels
    boxes = DefaultBoxes([[2, 3] for _ in channels], min_ratio=0.2, max_ratio=0.95)
    head = SSDLiteHead(channels, boxes.num_anchors_per_location(), num_classes + 1, NORM)  # class 0 is the background
    arguments: dict[str, Any] = {
        "score_thresh": cfg.score_threshold, "nms_thresh": cfg.nms_threshold, "detections_per_img": cfg.max_detections,
        "topk_candidates": TOPK, "head": head,
    }  # fmt: skip
    return SSD(backbone, boxes, (side, side), num_classes + 1, **{**arguments, **cfg.args})
