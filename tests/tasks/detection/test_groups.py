"""A backbone's learning rate, layer decay and freezing reach the network under a detector, all of it, and nothing above it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
from torch import nn

from tasks.detection.task import Detection
from tests.tasks.detection.test_backbones import SIZE, SWIN, build
from trainer.config import LoopConfig
from trainer.config.mit import MitModel
from trainer.config.model import ModelConfig, TimmModel, TorchvisionModel
from trainer.config.optimizer import AdamW
from trainer.errors import ConfigError
from trainer.optim import layer_scales, parameter_groups
from trainer.parts import freeze

BODY = "model.detector.backbone.body."
BACKBONES: dict[str, tuple[ModelConfig, int]] = {  # with the channels of the images
    "torchvision": (TorchvisionModel(name="resnet18"), 3),
    "timm": (TimmModel(name="test_convnext"), 3),
    "swin": (TimmModel(name="swin_tiny_patch4_window7_224", args=SWIN), 3),
    "vit": (TimmModel(name="test_vit"), 3),
    "mit": (MitModel(name="mit_b0"), 3),
    "two streams": (MitModel(name="mit_b0", fusion="cross_attention"), 5),
}


def on(name: str, **changes: Any) -> Detection:
    model, channels = BACKBONES[name]
    return build(model, channels, **changes)


def rates(task: nn.Module, **settings: Any) -> dict[str, float]:
    """The learning rate of each parameter by name."""
    groups = parameter_groups(task, AdamW(lr=1e-2, weight_decay=0.05, **settings), 64)
    rate = {p: group["lr"] for group in groups for p in group["params"]}
    return {name: rate[p] for name, p in task.named_parameters() if p in rate}


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "ssdlite"])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_backbones_own_rate_is_the_backbones(name, detector):
    task = on(name, detector=detector, roi_samples=None)
    found = rates(task, backbone_lr=1e-4)
    assert found == {n: pytest.approx(1e-4 if n.startswith(BODY) else 1e-2) for n, _ in task.named_parameters()}
    assert any("fpn" in n or "head" in n for n, rate in found.items() if rate == pytest.approx(1e-2))


@pytest.mark.parametrize("name", BACKBONES)
def test_layer_decay_falls_from_the_backbones_last_layer_down(name):
    task = on(name)
    scales = layer_scales(task, 0.5)
    assert {n for n in scales if n.startswith(BODY)} == {n for n, _ in task.named_parameters() if n.startswith(BODY)}
    assert all(n.startswith(BODY) for n in scales), "the detector's own layers learn at the full rate"
    values = sorted(set(scales.values()), reverse=True)
    assert values == [0.5 ** (i + 1) for i in range(len(values))] and len(values) >= 5
    first = [n for n, p in task.named_parameters() if n.startswith(BODY) and p.ndim > 1][0]
    assert scales[first] == values[-1]
    assert max(rates(task, layer_decay=0.5).values()) == 1e-2


def test_layer_decay_of_a_transformer_is_vitdets_formula():
    """decay ** (L + 1 - id): id 0 for the patches, i + 1 for block i, L + 1 for all that is not the backbone."""
    task = on("vit")
    blocks = len(timm.create_model("test_vit").blocks)  # pyright: ignore[reportArgumentType]
    for name, scale in layer_scales(task, 0.7).items():
        parts = name.removeprefix(BODY + "net.").split(".")
        layer = int(parts[1]) + 1 if parts[0] == "blocks" else 0
        assert scale == pytest.approx(0.7 ** (blocks + 1 - layer)), name


def test_what_joins_two_streams_is_as_far_up_as_their_stage():
    scales = layer_scales(on("two streams"), 0.5)
    for i in range(4):
        top = scales[f"{BODY}rgb.stages.{i}.blocks.1.norm1.weight"]
        assert top == scales[f"{BODY}x.stages.{i}.blocks.1.norm1.weight"]
        joints = {scale for n, scale in scales.items() if n.startswith((f"{BODY}rectify.{i}.", f"{BODY}fuse.{i}."))}
        assert joints == {top}


def frozen(task: Detection, freeze_to: str) -> set[str]:
    freeze(task, LoopConfig(freeze_to=freeze_to))
    return {name for name, p in task.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", BACKBONES)
def test_the_frozen_backbone_is_the_backbone(name):
    task = on(name)
    assert frozen(task, "backbone") == {n for n, _ in task.named_parameters() if n.startswith(BODY)}
    task.train()
    assert not any(m.training for m in task.get_submodule(BODY[:-1]).modules()), "it stays in evaluation mode"
    assert task.model.get_submodule("detector.rpn").training


@pytest.mark.parametrize("name", BACKBONES)
def test_stages_are_counted_in_the_backbone(name):
    """As task.freeze_stages counts them, which turns norms into constants."""
    left = {n for n, p in on(name, freeze_stages=2).named_parameters() if p.requires_grad}
    task = on(name)
    expected = {n for n, _ in task.named_parameters()} - left
    assert expected and frozen(task, "2") == expected
    with pytest.raises(ConfigError, match=r"loop\.freeze_to=99: .*stages before its head"):
        frozen(on(name), "99")


@pytest.mark.parametrize(
    ("name", "end", "rest"),
    [
        ("torchvision", "layer2", ("layer3", "layer4")),
        ("timm", "stages.2", ("net.stages.3",)),
        ("mit", "stages.1", ("net.stages.2", "net.stages.3")),
        ("torchvision", "detector.backbone.body.layer3", ("layer4",)),
    ],
)
def test_parts_have_their_librarys_names(name, end, rest):
    task = on(name)
    left = {n.removeprefix(BODY) for n, _ in task.named_parameters() if n.startswith(BODY)} - {
        n.removeprefix(BODY) for n in frozen(task, end)
    }
    assert left and all(n.startswith(rest) for n in left), left


def test_a_part_above_the_backbone_takes_the_backbone_with_it():
    task = on("torchvision")
    assert frozen(task, "detector.backbone.fpn") == {n for n, _ in task.named_parameters() if n.startswith("model.detector.backbone.")}
    with pytest.raises(ConfigError, match=r"loop\.freeze_to=layr2: "):
        frozen(on("torchvision"), "layr2")


def test_a_network_that_is_no_backbone_keeps_its_groups():
    """A classifier's rates: what they were before a task could name a backbone."""
    network = nn.ModuleDict({"model": timm.create_model("test_vit", img_size=SIZE, num_classes=3)})
    found = rates(network, backbone_lr=1e-4)
    assert {n for n, rate in found.items() if rate == pytest.approx(1e-2)} == {"model.head.weight", "model.head.bias"}
    scales = layer_scales(network, 0.5)
    assert scales["model.head.weight"] == 1
