"""The same weights and batch give torchvision's own losses, term by term, over ten steps; and torchvision's own weights fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection as theirs
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import _utils as det_utils
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, RPNHead, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block
from torchvision.models.resnet import resnet18
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tasks.detection.config import DetectionConfig
from tasks.detection.detectors import build_detector
from tasks.detection.task import Detection
from tests.tasks.detection.test_accumulation import one_step
from tests.tasks.detection.test_coco_file import IMAGES, write
from trainer.config.model import TorchvisionModel
from trainer.task import Progress

CLASSES = 5
SIZES = [(64, 96), (96, 64), (80, 96)]  # (height, width): one batch of different shapes
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
TERM = 1e-6


def ours(detector: str, name: str = "resnet18", width: int | None = None, size: int = 96) -> Detection:
    cfg = DetectionConfig(detector=detector, width=width, roi_samples=width if detector.startswith("faster_rcnn") else None)
    pyramid = TorchvisionModel(name=name).build_pyramid(strides=cfg.strides, image_size=size, in_channels=3)
    return Detection(build_detector(cfg, pyramid, num_classes=CLASSES, image_size=size), cfg, list("abcde"), MEAN, STD)


def reference(detector: str, width: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD, classes: int = CLASSES) -> nn.Module:
    """torchvision's, with its own preprocessing but without the random resizing."""
    common: dict[str, Any] = {"image_mean": mean, "image_std": std, "_skip_resize": True}
    if detector.startswith("faster_rcnn"):
        second = detector == "faster_rcnn_v2"
        layers, norm = {f"layer{i + 1}": str(i) for i in range(4)}, nn.BatchNorm2d if second else None
        backbone = BackboneWithFPN(resnet18(), layers, [64, 128, 256, 512], width, norm_layer=norm)
        head: nn.Module = TwoMLPHead(width * 49, 4 * width)
        if second:  # as fasterrcnn_resnet50_fpn_v2 is put together
            head = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [4 * width], norm_layer=nn.BatchNorm2d)
            common["rpn_head"] = RPNHead(width, 3, conv_depth=2)
        predictor = FastRCNNPredictor(4 * width, classes + 1)
        return theirs.FasterRCNN(backbone, box_head=head, box_predictor=predictor, box_batch_size_per_image=width, **common)
    if detector == "ssdlite":
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
        backbone = SmallerMaps(resnet18(), width, norm)
        channels = det_utils.retrieve_out_channels(backbone, (96, 96))
        boxes = DefaultBoxGenerator([[2, 3] for _ in range(6)], min_ratio=0.2, max_ratio=0.95)
        head = SSDLiteHead(channels, boxes.num_anchors_per_location(), classes + 1, norm)
        return theirs.ssd.SSD(backbone, boxes, (96, 96), classes + 1, head=head, **common)
    layers = {f"layer{i + 2}": str(i) for i in range(3)}
    extra = LastLevelP6P7(512 if detector == "retinanet_v2" else width, width)
    backbone = BackboneWithFPN(resnet18(), layers, [128, 256, 512], width, extra_blocks=extra)
    if detector == "retinanet_v2":  # as retinanet_resnet50_fpn_v2 is put together
        common["head"] = RetinaNetHead(width, 9, classes, norm_layer=partial(nn.GroupNorm, 32))
        common["head"].regression_head._loss_type = "giou"
    return (theirs.FCOS if detector == "fcos" else theirs.RetinaNet)(backbone, classes, **common)


class SmallerMaps(nn.Module):
    """As torchvision's SSDLiteFeatureExtractorMobileNet: two maps of the network, and four of extra blocks."""

    def __init__(self, network: nn.Module, width: int, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(network, {"layer3": "0", "layer4": "1"})
        self.extra = nn.ModuleList(
            _extra_block(a, b, norm) for a, b in [(512, 2 * width), (2 * width, width), (width, width), (width, width // 2)]
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = list(self.body(x).values())
        for block in self.extra:
            maps.append(block(maps[-1]))
        return OrderedDict((str(i), m) for i, m in enumerate(maps))


def batch(seed: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Images in [0, 1], and the batch a loader makes of them; the last image shows nothing."""
    g = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=g) for size in SIZES]
    corners = [torch.rand(n, 2, generator=g) * 30 for n in (3, 1, 0)]
    boxes = [torch.cat([c, c + 8 + 25 * torch.rand(c.shape, generator=g)], dim=1) for c in corners]
    labels = [torch.randint(0, CLASSES, (len(b),), generator=g) for b in boxes]
    canvas = torch.full((len(SIZES), 3, 96, 96), 0.123)  # what lies beside a picture must not matter
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for place, image in zip(canvas, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = (image - mean) / std
    return images, {"image": canvas, "size": SIZES, "boxes": boxes, "labels": labels}


@pytest.mark.parametrize("detector", ["faster_rcnn", "faster_rcnn_v2", "retinanet", "retinanet_v2", "fcos", "ssdlite"])
def test_ten_steps_equal_torchvision_term_by_term(detector):
    torch.manual_seed(0)
    width = 64 if detector == "retinanet_v2" else 32
    task, model = ours(detector, width=width).train(), reference(detector, width=width).train()
    weights = task.model.detector.state_dict()
    if detector == "ssdlite":  # published without a place for other backbones, so with names of its own
        weights = {k.replace("backbone.fpn.extra.blocks.", "backbone.extra."): v for k, v in weights.items()}
    model.load_state_dict(weights, strict=True)  # also: the same names and shapes
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (task, model)]
    for step in range(10):
        images, prepared = batch(step)
        targets = [{"boxes": b, "labels": n + task.offset} for b, n in zip(prepared["boxes"], prepared["labels"], strict=True)]
        torch.manual_seed(step)
        output = task(prepared, Progress(step, 10, 10))
        torch.manual_seed(step)  # samplers draw from the global generator
        expected = model(images, targets)
        assert output.metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert output.metrics[name].item() == pytest.approx(value.item(), rel=TERM, abs=TERM), f"{name} at step {step}"
        for loss, optimizer in zip((output.loss, torch.stack(list(expected.values())).sum()), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


LIKE_THEIRS = ["dataset.image_size=64", "dataset.num_workers=0", "augmentation.shorter_side=[48]", "model.name=resnet18", "model.pretrained=false",
               "task.freeze_stages=0", "task.frozen_batchnorm=false", "task.width=64", "scheduler.milestones=[1]", "scheduler.warmup_steps=4",
               "loop.batch_size=4", "loop.epochs=null", "loop.steps=10", "loop.progress=none", "loop.validate_every=null",
               "loop.max_grad_norm=null", "logger.plots=false"]  # fmt: skip


def test_ten_steps_of_a_run_are_those_of_torchvisions_reference(tmp_path):
    """The recipe through our engine, and references/detection/engine.py's `train_one_epoch` over the same batches: SGD on every
    parameter alike, a linear warm-up step by step in the first epoch, milestones in epochs."""
    write(tmp_path / "data")
    record = one_step(tmp_path / "run", ["experiment=coco_retinanet", f"dataset.path={tmp_path / 'data'}", *LIKE_THEIRS])
    assert record.first is not None and len(record.batches) == len(record.terms) == 10
    model = reference("retinanet", 64, [0.0] * 3, [1.0] * 3, classes=3).train()  # the pictures are normalised
    model.load_state_dict(record.first.model.get_submodule("detector").state_dict(), strict=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.001, total_iters=4)
    epochs = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1], gamma=0.1)
    an_epoch = IMAGES // 4
    for step, (batch, terms) in enumerate(zip(record.batches, record.terms, strict=True)):
        images = [image[:, :h, :w] for image, (h, w) in zip(batch["image"], batch["size"], strict=True)]
        expected = model(images, [{"boxes": b, "labels": n} for b, n in zip(batch["boxes"], batch["labels"], strict=True)])
        for name, value in expected.items():
            assert terms[name].item() == pytest.approx(value.item(), rel=TERM, abs=TERM), f"{name} at step {step}"
        optimizer.zero_grad()
        torch.stack(list(expected.values())).sum().backward()
        optimizer.step()
        if step < an_epoch:
            warmup.step()
        if (step + 1) % an_epoch == 0:
            epochs.step()


@pytest.mark.parametrize(
    ("detector", "model"),
    [("faster_rcnn", "fasterrcnn_resnet50_fpn"), ("faster_rcnn_v2", "fasterrcnn_resnet50_fpn_v2"),
     ("retinanet", "retinanet_resnet50_fpn"), ("retinanet_v2", "retinanet_resnet50_fpn_v2"), ("fcos", "fcos_resnet50_fpn")],
)  # fmt: skip
def test_torchvisions_published_detectors_have_the_same_tensors(detector, model):
    """So that their weights load by `init_from`. Frozen batch norms, theirs, have all but the counter."""
    with torch.device("meta"):
        classes = CLASSES + detector.startswith("faster")
        kwargs = {"weights": None, "weights_backbone": None, "num_classes": classes}
        expected = {k: v.shape for k, v in getattr(theirs, model)(**kwargs).state_dict().items()}
        built = {k: v.shape for k, v in ours(detector, "resnet50", size=512).model.detector.state_dict().items()}
    built = {k: v for k, v in built.items() if k in expected or not k.endswith("num_batches_tracked")}
    assert built == expected
