"""Detectors on any pyramid, torchvision's and transformers'. Losses, matching, sampling and suppression are those libraries' own code.

Images come normalised and at their final size, so the detectors' own preprocessing is taken out; all that is left of it is
to put images of different sizes into one batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, RPNHead, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from tasks.detection.config import SETS
from tasks.detection.simple_pyramid import SimplePyramid
from tasks.detection.ssdlite import OnTop, SmallerMaps, ssdlite
from trainer.errors import ConfigError, Problem

if TYPE_CHECKING:
    from tasks.detection.config import DetectionConfig
    from trainer.pyramid import Pyramid

RATIOS = (0.5, 1.0, 2.0)  # height over width of anchors


class Batching(GeneralizedRCNNTransform):
    """Images of different sizes into one batch, at the upper left, zeros (the mean colour) beside them."""

    def __init__(self) -> None:
        super().__init__(min_size=0, max_size=0, image_mean=[], image_std=[])

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


class Squares(Batching):
    """Every batch as squares of one side: the default boxes of an SSD are fractions of it."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        batch = images[0].new_zeros((len(images), images[0].shape[0], self.side, self.side))
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch


class Anchors(AnchorGenerator):
    """In fp32 whatever autocast makes of the maps: bf16's eight bits put an anchor at 1,000 pixels where it should not be by
    up to two."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return super().forward(image_list, [m.detach().float() for m in feature_maps])


def in_full(_module: nn.Module, _arguments: Any, output: Any) -> Any:
    """A forward hook of heads: boxes are made of their output, and torchvision computes boxes in whatever it is in."""
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) else x, output)


class CoarserMaps(LastLevelP6P7):
    """P6 and P7 in fp32: in bf16 on a CPU, the weights' gradient of a convolution with stride 2 over a map of one place is
    partly memory that nobody has written (torch 2.15, oneDNN), and small images have such maps."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        with torch.autocast(p[-1].device.type, enabled=False):
            whole, names = super().forward([p[-1].float()], [c[-1].float()], names)
        return [*p, *whole[1:]], names


class OwnMaps(ExtraFPNBlock):
    """No further maps."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        return results, names


class Backbone(nn.Module):
    """A network and the pyramid on top of it. `out_channels` is the width of its maps, of each one where they differ."""

    def __init__(self, body: Pyramid, fpn: nn.Module, out_channels: int | list[int]) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))


class Detector(nn.Module):
    """torchvision's detector, as the network that a task trains, saves and gives away."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    @property
    def pretrained_cfg(self) -> Any:
        """What timm knows of its backbone's published weights, for `init_from=timm:pretrained`."""
        body = self.detector.get_submodule("backbone.body")
        return getattr(getattr(body, "net", None), "pretrained_cfg", None)

    def forward(self, images: Iterable[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Loss terms by name while it trains; otherwise boxes [D, 4], labels [D] and scores [D] of each image [C, h, w]."""
        return self.detector(list(images), targets)


def build_detector(cfg: DetectionConfig, pyramid: Pyramid, *, num_classes: int, image_size: int) -> Detector:
    """The detector, with fresh weights in all that is not the backbone's."""
    freeze(pyramid, cfg)
    try:
        detector = BUILD[cfg.detector](cfg, backbone_of(cfg, pyramid, cfg.width_at(image_size)), num_classes, image_size)
    except TypeError as error:  # "… got an unexpected keyword argument", "… multiple values for"
        if not cfg.args:
            raise
        raise ConfigError(Problem("task.args", cfg.args, f"torchvision's {cfg.detector} refuses them: {error}", "task.args={}")) from error
    detector.transform = Squares(padded(image_size)) if cfg.detector == "ssdlite" else Batching()
    for name in HEADS.get(cfg.detector, ("head",)):
        found = detector.get_submodule(name)
        for head in found if isinstance(found, nn.ModuleList) else [found]:
            head.register_forward_hook(in_full)
    return Detector(detector)


def backbone_of(cfg: DetectionConfig, pyramid: Pyramid, width: int) -> Backbone:
    """The maps that a detector is built on: those of the network, made equally wide but for SSDLite, and coarser ones."""
    plain, last = pyramid.plain, pyramid.channels[-1]
    if cfg.detector == "ssdlite":
        extra: Any = SmallerMaps(width if plain else last, width)
    elif cfg.detector in SETS:  # transformers makes what it needs beyond these maps
        extra = OwnMaps()
    else:
        extra = LastLevelMaxPool() if cfg.is_rcnn else CoarserMaps(last if cfg.detector == "retinanet_v2" and not plain else width, width)
    if plain:
        fpn: nn.Module = SimplePyramid(pyramid.channels[0], pyramid.strides[0], cfg.strides, width, extra)
    elif cfg.detector == "ssdlite" or cfg.detector in SETS:
        fpn = OnTop(extra)
    else:
        norm = nn.BatchNorm2d if cfg.detector == "faster_rcnn_v2" else None
        fpn = FeaturePyramidNetwork(list(pyramid.channels), width, extra_blocks=extra, norm_layer=norm)
    own = [width] * len(cfg.strides) if plain else list(pyramid.channels)
    return Backbone(pyramid, fpn, [*own, *extra.widths] if cfg.detector == "ssdlite" else own if cfg.detector in SETS else width)


def padded(side: int) -> int:
    """The next multiple of the coarsest stride, as torchvision pads batches."""
    return -(-side // 32) * 32


def faster_rcnn(cfg: DetectionConfig, backbone: Backbone, num_classes: int, image_size: int) -> FasterRCNN:
    levels = (*cfg.strides, 2 * cfg.strides[-1])  # and the map that is made by pooling
    anchors = Anchors(tuple((int(cfg.anchor_scale * s),) for s in levels), (RATIOS,) * len(levels))
    samples = cfg.roi_samples_at(image_size)
    arguments: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign([str(i) for i in range(len(cfg.strides))], output_size=7, sampling_ratio=2),
        "box_batch_size_per_image": samples,
        "box_score_thresh": cfg.score_threshold,
        "box_nms_thresh": cfg.nms_threshold,
        "box_detections_per_img": cfg.max_detections,
    }
    width = backbone.out_channels
    assert isinstance(width, int)
    hidden = 4 * width  # torchvision's 1024 at the usual 256
    if cfg.detector == "faster_rcnn_v2":
        arguments["rpn_head"] = RPNHead(width, len(RATIOS), conv_depth=2)
        arguments["box_head"] = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [hidden], norm_layer=nn.BatchNorm2d)
    else:
        arguments["box_head"] = TwoMLPHead(width * 7 * 7, hidden)
    arguments["box_predictor"] = FastRCNNPredictor(hidden, num_classes + 1)  # class 0 is the background
    return FasterRCNN(backbone, **arguments, **cfg.args)


def retinanet(cfg: DetectionConfig, backbone: Backbone, num_classes: int, image_size: int) -> RetinaNet:
    levels = (*cfg.strides, *(cfg.strides[-1] * n for n in (2, 4)))
    octaves = tuple(tuple(int(cfg.anchor_scale / 2 * s * 2 ** (i / 3)) for i in range(3)) for s in levels)  # three sizes a level
    anchors = Anchors(octaves, (RATIOS,) * len(levels))
    arguments: dict[str, Any] = {
        "anchor_generator": anchors, "score_thresh": cfg.score_threshold, "nms_thresh": cfg.nms_threshold, "detections_per_img": cfg.max_detections,
    }  # fmt: skip
    if cfg.detector == "retinanet_v2":
        count = anchors.num_anchors_per_location()[0]
        assert isinstance(backbone.out_channels, int)
        head = RetinaNetHead(backbone.out_channels, count, num_classes, norm_layer=partial(nn.GroupNorm, 32))
        head.regression_head._loss_type = "giou"
        arguments["head"] = head
    return RetinaNet(backbone, num_classes, **arguments, **cfg.args)


def fcos(cfg: DetectionConfig, backbone: Backbone, num_classes: int, image_size: int) -> FCOS:
    anchors = Anchors(tuple((s,) for s in (*cfg.strides, *(cfg.strides[-1] * n for n in (2, 4)))), ((1.0,),) * (len(cfg.strides) + 2))
    arguments: dict[str, Any] = {
        "anchor_generator": anchors, "score_thresh": cfg.score_threshold, "nms_thresh": cfg.nms_threshold, "detections_per_img": cfg.max_detections,
    }  # fmt: skip
    return FCOS(backbone, num_classes, **arguments, **cfg.args)


def transformers_own(cfg: DetectionConfig, backbone: Backbone, num_classes: int, image_size: int) -> nn.Module:
    from tasks.detection.detr import set_detector

    assert isinstance(backbone.out_channels, list)
    return set_detector(cfg, backbone, backbone.out_channels, cfg.width_at(image_size), num_classes, Batching())


HEADS = {
    "faster_rcnn": ("rpn.head", "roi_heads.box_predictor"), "faster_rcnn_v2": ("rpn.head", "roi_heads.box_predictor"),
    "detr": ("model.class_labels_classifier", "model.bbox_predictor"), "deformable_detr": ("model.class_embed", "model.bbox_embed"),
}  # fmt: skip
BUILD: dict[str, Any] = {
    "faster_rcnn": faster_rcnn, "faster_rcnn_v2": faster_rcnn, "retinanet": retinanet, "retinanet_v2": retinanet, "fcos": fcos,
    "ssdlite": lambda cfg, backbone, num_classes, image_size: ssdlite(cfg, backbone, num_classes, padded(image_size)),
    "detr": transformers_own, "deformable_detr": transformers_own,
}  # fmt: skip


def freeze(pyramid: Pyramid, cfg: DetectionConfig) -> None:
    """Take the lowest parts of the backbone out of training, and batch norms out of adapting."""
    depths = pyramid.depths() if cfg.freeze_stages else {}
    if depths and cfg.freeze_stages > max(depths.values()):
        reason = f"the backbone has {max(depths.values()) + 1} parts, of which the last must train"
        raise ConfigError(Problem("task.freeze_stages", cfg.freeze_stages, reason, f"task.freeze_stages={max(depths.values())}"))
    frozen = {name for name, depth in depths.items() if depth < cfg.freeze_stages}
    for name, parameter in pyramid.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    _fix_norms(pyramid, "", None if cfg.frozen_batchnorm else frozen)


def _fix_norms(module: nn.Module, at: str, frozen: set[str] | None) -> None:
    """Batch norms whose weights are frozen (all: None) become a fixed scale and shift."""
    from timm.layers import freeze_batch_norm_2d

    for name, child in module.named_children():
        path = f"{at}{name}"
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if frozen is None or f"{path}.running_mean" in frozen:
                setattr(module, name, freeze_batch_norm_2d(child))
        else:
            _fix_norms(child, f"{path}.", frozen)
