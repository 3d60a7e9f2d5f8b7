"""Every kind of network is a backbone: maps where they should be, every parameter learns, and what is frozen stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

import tasks  # noqa: F401  (its schemas)
from tasks.detection.config import SETS, STRIDES, DetectionConfig
from tasks.detection.detectors import build_detector
from tasks.detection.pictures import pictures
from tasks.detection.task import Detection
from trainer.config.mit import MitModel
from trainer.config.model import ModelConfig, TimmModel, TorchvisionModel
from trainer.errors import ConfigError, Problem
from trainer.launch.compose import checked, compose
from trainer.pyramid import Pyramid
from trainer.task import DataInfo, Progress

SIZE = 64
SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}
BACKBONES: dict[str, tuple[ModelConfig, int]] = {  # with the channels of the images
    "resnet": (TimmModel(name="test_resnet"), 3),
    "convnext": (TimmModel(name="test_convnext"), 3),
    "efficientnet": (TimmModel(name="test_efficientnet"), 1),
    "vit": (TimmModel(name="test_vit"), 3),
    "vit of finer patches": (TimmModel(name="test_vit", patch_size=8), 3),
    "swin": (TimmModel(name="swin_tiny_patch4_window7_224", args=SWIN), 3),
    "torchvision": (TorchvisionModel(name="mobilenet_v3_small"), 3),
    "torchvision's swin": (TorchvisionModel(name="swin_t"), 3),  # whose maps have channels last
    "mit": (MitModel(name="mit_b0"), 3),
    "two streams": (MitModel(name="mit_b0", fusion="cross_attention"), 5),
}
LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 10}
TINY = {"detr": LAYERS, "deformable_detr": {**LAYERS, "with_box_refine": True}}
IMAGE_SIZES = [(40, 64), (64, 33)]


def build(model: ModelConfig, channels: int = 3, **changes: Any) -> Detection:
    torch.manual_seed(0)
    cfg = DetectionConfig(**{"width": 32, "roi_samples": 8, "score_threshold": 0.0, **changes})
    pyramid = model.build_pyramid(strides=cfg.strides, image_size=SIZE, in_channels=channels)
    return Detection(build_detector(cfg, pyramid, num_classes=2, image_size=SIZE), cfg, ["a", "b"], [0.5], [0.25])


def body(task: Detection) -> Pyramid:
    found = task.model.get_submodule("detector.backbone.body")
    assert isinstance(found, Pyramid)
    return found


def batch(channels: int) -> dict[str, Any]:
    boxes = [torch.tensor([[3.0, 4.0, 30.0, 36.0], [20.0, 2.0, 60.0, 30.0]]), torch.zeros(0, 4)]
    g = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(2, channels, SIZE, SIZE, generator=g), "size": IMAGE_SIZES,
        "boxes": boxes, "labels": [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.int64)],
    }  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_losses_and_detections(name):
    model, channels = BACKBONES[name]
    task = build(model, channels).train()
    maps = body(task)(torch.randn(2, channels, SIZE, 32))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, SIZE // s, 32 // s) for c, s in zip(body(task).channels, body(task).strides, strict=True)
    ]
    output = task(batch(channels), Progress(0, 1, 1))
    assert torch.isfinite(output.loss)
    assert {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} == set(output.metrics)
    output.loss.backward()
    # The last map goes nowhere but into its level, and a level without a proposal teaches the backbone by the proposals' loss.
    assert [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None] == []
    found = task.eval().model([x[:, :h, :w] for x, (h, w) in zip(batch(channels)["image"], IMAGE_SIZES, strict=True)])
    for result, (h, w) in zip(found, IMAGE_SIZES, strict=True):
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"] <= torch.tensor([w, h, w, h])).all()


@pytest.mark.parametrize("detector", STRIDES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_every_detector_in_every_precision(detector, dtype):
    if detector in SETS:
        pytest.importorskip("transformers")
    task = build(
        TimmModel(name="test_resnet"),
        detector=detector,
        width=64,
        roi_samples=8 if detector.startswith("faster") else None,
        args=TINY.get(detector, {}),
    ).train()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = task(batch(3), Progress(0, 1, 1))
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)
        (found,) = task.eval().model([torch.randn(3, 64, 64)])
        assert found["boxes"].dtype == torch.float32, "half of the bits do not tell one pixel from the next"


@pytest.mark.parametrize("detector", ["faster_rcnn", "fcos", "ssdlite"])
def test_anchors_are_exact_in_bf16(detector):
    task = build(TimmModel(name="test_resnet"), detector=detector, width=64)
    anchors = task.model.get_submodule("detector.rpn.anchor_generator" if task.cfg.is_rcnn else "detector.anchor_generator")
    image = ImageList(torch.zeros(1, 3, 1088, 1344), [(1088, 1344)])
    maps = [torch.zeros(1, 1, 1088 // s, 1344 // s) for s in (4, 8, 16, 32, 64, 128)[-num_levels(anchors) :]]
    (exact,), (found,) = anchors(image, maps), anchors(image, [m.bfloat16() for m in maps])
    assert torch.equal(exact, found)


def num_levels(generator: nn.Module) -> int:
    return len(generator.num_anchors_per_location())  # type: ignore[operator]


@pytest.mark.parametrize("detector", ["faster_rcnn", "fcos", "ssdlite", "detr", "deformable_detr"])
def test_images_smaller_than_a_stride(detector):
    """A picture's shorter side may come out as a single pixel."""
    if detector in SETS:
        pytest.importorskip("transformers")
    task = build(TimmModel(name="test_resnet"), detector=detector, width=64, args=TINY.get(detector, {})).train()
    thin = {**batch(3), "size": [(1, 64), (64, 3)], "boxes": [torch.tensor([[3.0, 0.0, 30.0, 1.0]]), torch.zeros(0, 4)],
            "labels": [torch.tensor([1]), torch.zeros(0, dtype=torch.int64)]}  # fmt: skip
    assert torch.isfinite(task(thin, Progress(0, 1, 1)).loss)
    with torch.no_grad():
        found = task.eval().detect(pictures(thin))
    assert all((result["boxes"][:, 2:] <= torch.tensor([w, h])).all() for result, (h, w) in zip(found, thin["size"], strict=True))


@pytest.mark.parametrize("detector", ["ssdlite", "deformable_detr"])
def test_other_detectors_on_a_plain_transformer(detector):
    if detector in SETS:
        pytest.importorskip("transformers")
    task = build(TimmModel(name="test_vit"), detector=detector, width=32, args=LAYERS if detector in SETS else {}).train()
    task(batch(3), Progress(0, 1, 1)).loss.backward()
    assert [n for n, p in task.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["resnet", "vit", "torchvision", "mit", "two streams"])
def test_what_is_frozen_neither_learns_nor_adapts(name):
    model, channels = BACKBONES[name]
    task = build(model, channels, freeze_stages=2).train()
    before = {k: v.clone() for k, v in task.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    task(batch(channels), Progress(0, 1, 1)).loss.backward()
    optimizer.step()
    moved = {k for k, v in task.state_dict().items() if not torch.equal(v, before[k])}
    depths = body(task).depths()
    frozen = {f"model.detector.backbone.body.{k}" for k, depth in depths.items() if depth < 2}
    assert frozen
    assert not frozen & moved
    assert any(k.startswith("model.detector.backbone.body.") for k in moved), "the rest of the backbone learns"


def test_frozen_batch_norms_keep_their_statistics_and_scales():
    task = build(TimmModel(name="test_resnet"), frozen_batchnorm=True)
    norms = [m for m in task.model.get_submodule("detector.backbone.body").modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms == []
    with pytest.raises(ConfigError, match=r"task\.freeze_stages"):
        build(TimmModel(name="test_resnet"), freeze_stages=9)


def test_an_image_is_found_the_same_things_in_whatever_its_company():
    task = build(TimmModel(name="test_convnext")).eval()
    images = [torch.randn(3, h, w, generator=torch.Generator().manual_seed(h)) for h, w in [(40, 64), (64, 33), (33, 64), (64, 64)]]
    with torch.no_grad():
        together = task.detect(images)
        alone = [task.detect([image])[0] for image in images]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a["scores"], b["scores"], atol=1e-5, rtol=1e-4)


def test_weights_of_a_classifier_fit_the_backbone(tmp_path):
    from trainer.weights import load_weights

    for model in (TimmModel(name="test_vit"), TimmModel(name="test_resnet"), TorchvisionModel(name="resnet18"), MitModel(name="mit_b0")):
        torch.manual_seed(1)
        network = model.build(num_classes=7, image_size=SIZE, in_channels=3)
        torch.save(network.state_dict(), tmp_path / "w.pt")
        task = build(model)
        account = load_weights(task, str(tmp_path / "w.pt"))
        own = {k: v for k, v in task.state_dict().items() if k.startswith("model.detector.backbone.body.")}
        assert len(account.loaded) == len(own), account
        first: Tensor = next(iter(own.values()))
        assert any(first.shape == v.shape and torch.equal(first, v) for v in network.state_dict().values())


PUBLISHED = {"mit_b0": 27.8e6, "mit_b1": 60.0e6, "mit_b2": 82.1e6, "mit_b4": 155.4e6, "mit_b5": 196.6e6}


@pytest.mark.parametrize("name", PUBLISHED)
def test_detectors_of_the_sweep_over_backbones_have_the_published_number_of_parameters(name):
    cfg, problems = checked(compose(["experiment=all_backbones", f"model={name}", "dataset.path=."]))
    assert cfg is not None and "dataset" in {p.key.partition(".")[0] for p in problems}, "nothing but the data is missing"
    run: Any = cfg
    with torch.device("meta"):
        task = run.task.build(run, DataInfo(1, 1, ["person", "car"], 5, 1.0, 1))
    assert sum(p.numel() for p in task.parameters()) == pytest.approx(PUBLISHED[name], rel=0.02)


# --- what cannot be ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "strides", "key"),
    [
        (TimmModel(name="test_vit", patch_size=14), (4, 8), "model.patch_size"),
        (TimmModel(name="test_resnet"), (4, 64), "model.name"),
        (TorchvisionModel(name="mobilenet_v3_small"), (4, 64), "model.name"),
        (TorchvisionModel(name="vit_b_16"), (4, 8), "model.name"),
        (TorchvisionModel(name="googlenet"), (4, 8), "model.name"),
        (MitModel(name="mit_b0"), (4, 64), "model.name"),
    ],
)
def test_a_backbone_whose_strides_do_not_fit_is_refused(model, strides, key):
    with pytest.raises(ConfigError) as error:
        model.build_pyramid(strides=strides, image_size=SIZE, in_channels=3)
    assert [p.key for p in error.value.problems if isinstance(p, Problem)] == [key]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["dataset.image_size=32"], "dataset.image_size"),
        (["augmentation=basic"], "augmentation"),
        (["augmentation=boxes", "augmentation.mixup=0.5"], "augmentation.mixup"),
        (["task.freeze_stages=2"], "task.freeze_stages"),
        (["task.frozen_batchnorm=true"], "task.frozen_batchnorm"),
        (["task.detector=yolo"], "task.detector"),
        (["task.detector=fcos", "task.width=96"], ""),
        (["task.detector=fcos", "task.width=80"], "task.width"),
        (["task.detector=retinanet_v2", "task.width=32"], "task.width"),
        (["task.detector=fcos", "task.roi_samples=8"], "task.roi_samples"),
        (["task.detector=ssdlite", "loop.batch_size=2", "loop.accumulate=2"], "loop.batch_size"),
        (["task.nms_threshold=0"], "task.nms_threshold"),
        (["dataset=digit_parts", "dataset.image_size=64", "augmentation=boxes"], "dataset"),
        (["model=dinov2_vit_b", "dataset.image_size=112"], "model.patch_size"),
        (["model.in_channels=5"], "model.in_channels"),
        (["augmentation.keep_aspect=false"], "augmentation.jitter"),
        (["augmentation.mosaic_epochs=3"], "augmentation.mosaic_epochs"),
        (["dataset.shape_groups=3", "loop.samples_per_epoch=64"], "dataset.shape_groups"),
        (["task=classification", "augmentation=boxes", "augmentation.mosaic=1"], "augmentation.mosaic"),
        (["model=mit_b0", "model.fusion=cross_attention"], "model.fusion"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, list) else "",
)
def test_bad_choices_are_told_before_torch_is_imported(overrides, key):
    _, problems = checked(compose(["task=detection", *overrides]))
    assert [p.key for p in problems] == [key] * bool(key), problems
