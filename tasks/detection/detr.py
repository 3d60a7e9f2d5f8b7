"""Detectors of `transformers`' DETR family on any backbone. Architecture, matching and losses are that library's own code.

They learn a set of boxes, each matched to at most one object, so there is no suppression. It knows no scores of a dataset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from trainer.errors import ConfigError, Problem

if TYPE_CHECKING:
    from tasks.detection.config import DetectionConfig

TERMS = ("loss_ce", "loss_bbox", "loss_giou")
LAYERS, HEADS = 6, 8  # of encoder and decoder alike
QUERIES = {"detr": 100, "deformable_detr": 300}
FEED_FORWARD = {"detr": 8, "deformable_detr": 4}  # hidden layers are so many times as wide: 2048 and 1024 at the usual 256


class Maps(nn.Module):
    """A backbone in the place where the library has its own. It belongs to the detector and is only reached from here, so its
    weights have one name."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.__dict__["reached"] = [backbone]  # not a submodule

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.__dict__["reached"][0](images).values())


class SetDetector(nn.Module):
    """`forward` as torchvision's detectors have it: images of different sizes, and loss terms or detections."""

    def __init__(self, model: nn.Module, backbone: nn.Module, batching: nn.Module, cfg: DetectionConfig) -> None:
        super().__init__()
        self.backbone, self.model, self.transform = backbone, model, batching
        self.softmax = cfg.detector == "detr"  # over the classes and "nothing"; the others ask each class by itself
        self.score_threshold, self.max_detections = cfg.score_threshold, cfg.max_detections
        encoder = next(m for m in model.modules() if type(m).__name__.endswith("ConvEncoder"))
        encoder.model = Maps(backbone)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        batch = cast(Any, self.transform).batch_images(images)  # [N, C, H, W]
        mask = torch.zeros(len(images), *batch.shape[2:], dtype=torch.long, device=batch.device)
        for row, (h, w) in zip(mask, sizes, strict=True):
            row[:h, :w] = 1
        if self.training:
            assert targets is not None
            output = self.model(pixel_values=batch, pixel_mask=mask, labels=[_target(t, s) for t, s in zip(targets, sizes, strict=True)])
            return self._terms(output.loss_dict)
        output = self.model(pixel_values=batch, pixel_mask=mask)
        return [self._found(*one) for one in zip(output.logits, output.pred_boxes, sizes, strict=True)]

    def _terms(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each term over all layers of the decoder, as it is weighted in the loss (arXiv:2005.12872, eq. 2 and app. A.2)."""
        config = cast(Any, self.model).config
        weights = dict(zip(TERMS, (1, config.bbox_loss_coefficient, config.giou_loss_coefficient), strict=True))
        return {
            term: weight * torch.stack([v for name, v in losses.items() if name == term or name.startswith(f"{term}_")]).sum()
            for term, weight in weights.items()
        }

    def _found(self, logits: Tensor, boxes: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Detections of one image out of logits [Q, K] and boxes [Q, 4], centre and sides as fractions of the image."""
        corners = clip_boxes_to_image(box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([size[1], size[0]] * 2), size)
        if self.softmax:
            scores, labels = logits.softmax(-1)[:, :-1].max(-1)  # the last class is "nothing"
            query = torch.arange(len(scores), device=scores.device)
        else:  # a query may stand for more than one class
            scores, place = logits.sigmoid().flatten().sort(descending=True, stable=True)
            query, labels = place // logits.shape[1], place % logits.shape[1]
        order = scores.argsort(descending=True, stable=True)[: self.max_detections]
        order = order[scores[order] > self.score_threshold]
        return {"boxes": corners[query[order]], "labels": labels[order], "scores": scores[order]}


def _target(target: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    height, width = size
    boxes = box_convert(target["boxes"], "xyxy", "cxcywh") / target["boxes"].new_tensor([width, height] * 2)
    return {"class_labels": target["labels"], "boxes": boxes}


def set_detector(
    cfg: DetectionConfig, backbone: Any, channels: list[int], width: int, num_classes: int, batching: nn.Module
) -> SetDetector:
    """Fresh weights. `cfg.args` are keyword arguments of the library's config.

    Raises:
        ConfigError: it refuses them.
    """
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, DetrConfig, DetrForObjectDetection, ResNetConfig

    hidden = FEED_FORWARD[cfg.detector] * width
    # The library wants a backbone of its own: a tiny one with as many channels, thrown away at once.
    stages: dict[str, Any] = {"out_features": [f"stage{i + 1}" for i in range(len(channels))]}
    own = ResNetConfig(embedding_size=4, hidden_sizes=channels, depths=[1] * len(channels), layer_type="basic", **stages)
    arguments: dict[str, Any] = {
        "backbone_config": own, "use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False, "num_labels": num_classes,
        "d_model": width, "num_queries": QUERIES[cfg.detector], "encoder_layers": LAYERS, "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": hidden,
        "decoder_ffn_dim": hidden, "auxiliary_loss": True,
    }  # fmt: skip
    kinds = {"detr": (DetrConfig, DetrForObjectDetection), "deformable_detr": (DeformableDetrConfig, DeformableDetrForObjectDetection)}
    config_class, model_class = kinds[cfg.detector]
    unknown = set(cfg.args) - set(vars(config_class()))
    if unknown:
        reason = f"transformers' {config_class.__name__} knows no {', '.join(sorted(unknown))}"
        raise ConfigError(Problem("task.args", cfg.args, reason, "task.args={}"))
    try:
        model = model_class(config_class(**(arguments | cfg.args)))
    except (TypeError, ValueError) as error:
        raise ConfigError(Problem("task.args", cfg.args, f"transformers refuses them: {error}", "task.args={}")) from error
    return SetDetector(model, backbone, batching, cfg)
