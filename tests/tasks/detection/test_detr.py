"""Detectors of transformers' on our backbones: their own losses, the boxes of the pictures, and whole runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tasks.detection.detr import Maps
from tests.tasks.detection.test_backbones import TINY, batch, build
from tests.tasks.detection.test_runs import RESNET, SCENES, resumed
from trainer.config.model import TimmModel
from trainer.errors import ConfigError
from trainer.task import Progress

pytest.importorskip("transformers")
DETECTORS = ["detr", "deformable_detr"]
TERM = 1e-6


def on_a_resnet(detector: str):
    return build(TimmModel(name="test_resnet"), detector=detector, width=32, args=TINY[detector] | {"dropout": 0.0})


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_loss_is_the_librarys_own(detector):
    """The same weights, asked as the library's documentation asks them: padded pixels, a mask, boxes as fractions."""
    task = on_a_resnet(detector).train()
    prepared = batch(3)
    output = task(prepared, Progress(0, 1, 1))
    pixels, mask, labels = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long), []
    for i, (h, w) in enumerate(prepared["size"]):
        pixels[i, :, :h, :w], mask[i, :h, :w] = prepared["image"][i, :, :h, :w], 1
        boxes = prepared["boxes"][i]
        centre, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        labels.append({"class_labels": prepared["labels"][i], "boxes": torch.cat([centre, sides], 1) / torch.tensor([w, h, w, h])})
    model = task.model.get_submodule("detector.model")
    expected = model(pixel_values=pixels, pixel_mask=mask, labels=labels)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=TERM)
    assert set(output.metrics) == {"loss_ce", "loss_bbox", "loss_giou"}
    assert output.metrics["loss_giou"].item() > 0


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_weight_has_one_name_and_learns(detector):
    task = on_a_resnet(detector).train()
    assert sum(isinstance(m, Maps) for m in task.modules()) == 1, "the library's own backbone is gone"
    bodies = [name for name in task.state_dict() if ".net." in name]
    assert bodies and all(name.startswith("model.detector.backbone.body.net.") for name in bodies)
    task(batch(3), Progress(0, 1, 1)).loss.backward()
    assert [n for n, p in task.named_parameters() if p.grad is None] == []


def test_detections_are_those_of_the_librarys_processor(monkeypatch: pytest.MonkeyPatch):
    """With more classes than one, boxes out of the picture, and images of different sizes."""
    from transformers.models.deformable_detr import DeformableDetrImageProcessor
    from transformers.models.detr import DetrImageProcessor

    for detector, processor in (("detr", DetrImageProcessor), ("deformable_detr", DeformableDetrImageProcessor)):
        task = on_a_resnet(detector).eval()
        seen: list = []
        task.model.get_submodule("detector.model").register_forward_hook(lambda m, a, output, kept=seen: kept.append(output))
        images: list[Tensor] = [torch.randn(3, 40, 64), torch.randn(3, 64, 33)]
        with torch.no_grad():
            found = task.model(images)
        expected = processor().post_process_object_detection(seen[0], threshold=0.0, target_sizes=[(40, 64), (64, 33)])
        for ours, theirs, (h, w) in zip(found, expected, [(40, 64), (64, 33)], strict=True):
            order = theirs["scores"].argsort(descending=True, stable=True)[:100]
            torch.testing.assert_close(ours["scores"], theirs["scores"][order])
            assert torch.equal(ours["labels"], theirs["labels"][order])
            limits = torch.tensor([w, h, w, h])
            torch.testing.assert_close(ours["boxes"], torch.minimum(theirs["boxes"][order].clamp(min=0), limits))


def test_arguments_that_the_library_does_not_know_are_refused():
    with pytest.raises(ConfigError, match="knows no num_quieries"):
        build(TimmModel(name="test_resnet"), detector="detr", width=32, args={"num_quieries": 3})


@pytest.mark.parametrize("detector", DETECTORS)
def test_stopped_and_resumed_to_the_last_bit(detector, tmp_path, monkeypatch):
    args = [f"+task.args.{name}={str(value).lower()}" for name, value in TINY[detector].items()]
    resumed(tmp_path, monkeypatch, [*RESNET, *SCENES[:2], f"task.detector={detector}", *args])
