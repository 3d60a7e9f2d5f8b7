"""What a run leaves as it is: by name, by number of stages, by regular expression, all but the head; and what stays in evaluation mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from tests.test_exact import MODELS, last, run, stopped_and_resumed
from trainer.build import build_data, build_task
from trainer.config import LoopConfig
from trainer.config.optimizer import AdamW, LrScaling
from trainer.errors import ConfigError
from trainer.evaluation import Mean
from trainer.launch.compose import checked, compose, compose_run
from trainer.optim import parameter_groups
from trainer.parts import freeze, heads
from trainer.task import Batch, Evaluator, Progress, StepOutput, Task


class Toy(Task):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Batch, progress: Progress, /) -> StepOutput:
        return StepOutput(self.model(batch["image"]).mean())

    def evaluator(self) -> Evaluator:
        return Mean(lambda batch: {})


def vit() -> Toy:
    return Toy(timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3, drop_rate=0.5, drop_path_rate=0.5))


def resnet() -> Toy:
    return Toy(timm.create_model("test_resnet", num_classes=3))


def training(task: Task) -> set[str]:
    return {name.removeprefix("model.").split(".")[0] for name, p in task.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("task", "freeze_to", "left"),
    [
        (vit, "backbone", {"head"}),
        (resnet, "backbone", {"fc"}),
        (resnet, "layer2", {"layer3", "layer4", "fc"}),
        (resnet, "1", {"layer1", "layer2", "layer3", "layer4", "fc"}),  # the stem is the first stage
        (resnet, "3", {"layer3", "layer4", "fc"}),
        (lambda: Toy(torchvision.models.resnet18(num_classes=3)), "layer3", {"layer4", "fc"}),
        (lambda: Toy(torchvision.models.resnet18(num_classes=3)), "backbone", {"fc"}),
        (lambda: Toy(torchvision.models.mobilenet_v3_small(num_classes=3)), "features", {"classifier"}),
    ],
)
def test_frozen_up_to_a_part(task, freeze_to, left):
    toy = task()
    freeze(toy, LoopConfig(freeze_to=freeze_to))
    assert training(toy) == left


def test_a_block_of_a_transformer():
    toy = vit()
    freeze(toy, LoopConfig(freeze_to="blocks.0"))
    left = {name for name, p in toy.named_parameters() if p.requires_grad}
    assert left and not any(
        name.startswith(("model.blocks.0.", "model.patch_embed", "model.pos_embed", "model.cls_token")) for name in left
    )
    assert any(name.startswith("model.blocks.1.") for name in left)


def test_by_regular_expression():
    toy = vit()
    freeze(toy, LoopConfig(freeze=[r"attn\.", "^model.patch_embed"]))
    frozen = {name for name, p in toy.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in toy.named_parameters() if ".attn." in name or name.startswith("model.patch_embed")}


def test_what_is_frozen_whole_stays_in_evaluation_mode_and_nothing_else():
    toy = resnet()
    freeze(toy, LoopConfig(freeze_to="layer2"))
    for _ in range(2):
        toy.train()
        modes = {name: module.training for name, module in toy.model.named_children()}
        assert not any(modes[part] for part in ("bn1", "layer1", "layer2")) and modes["layer3"] and modes["fc"]
        toy.eval()
    toy = vit()  # dropout and stochastic depth of a frozen backbone are off: its features are those of validation
    freeze(toy, LoopConfig(freeze_to="backbone"))
    toy.train()
    assert not any(module.training for module in toy.model.blocks.modules())


def test_batch_normalisation_keeps_what_it_has():
    toy = resnet()
    freeze(toy, LoopConfig(freeze_batchnorm=True))
    norms = [m for m in toy.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.running_mean.clone(), m.weight.clone()) for m in norms]  # type: ignore[union-attr]
    toy.train()
    optimizer = torch.optim.SGD([p for p in toy.parameters() if p.requires_grad], lr=0.1)
    toy.training_step({"image": torch.randn(4, 3, 32, 32)}, Progress(0, 1, 1)).loss.backward()
    optimizer.step()
    for m, (mean, weight) in zip(norms, before, strict=True):
        assert torch.equal(m.running_mean, mean) and torch.equal(m.weight, weight)  # type: ignore[arg-type]
    assert training(toy) >= {"conv1", "layer1", "fc"}


@pytest.mark.parametrize(
    ("task", "loop", "message"),
    [
        (resnet, {"freeze_to": "layer5"}, r"loop.freeze_to=layer5: .*has no part of this name.*layer1, layer2(?s:.*)loop.freeze_to=layer"),
        (resnet, {"freeze_to": "9"}, r"has 5 stages before its head"),
        (lambda: Toy(torchvision.models.resnet18()), {"freeze_to": "2"}, "does not tell its stages"),
        (resnet, {"freeze": ["layr1"]}, r"loop.freeze\[0\]=layr1: matches the name of no parameter(?s:.*)layer1"),
        (resnet, {"freeze": ["."]}, "freezes every parameter"),
        (vit, {"freeze_batchnorm": True}, "has no batch normalisation"),
        (lambda: Toy(timm.create_model("test_vit", img_size=32, num_classes=0)), {"freeze_to": "backbone"}, "freezes every parameter"),
    ],
)
def test_what_cannot_be_frozen_is_refused(task, loop, message):
    with pytest.raises(ConfigError, match=message):
        freeze(task(), LoopConfig(**loop))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["loop.freeze=['(']"], "loop.freeze[0]"),
        (["loop.freeze_to=0"], "loop.freeze_to"),
        (["loop.swa_start=0.5", "loop.ema_decay=0.9"], "loop.swa_start"),
        (["loop.swa_every=3"], "loop.swa_every"),
        (["loop.ema_every=32"], "loop.ema_every"),
        (["loop.ema_rescale=true"], "loop.ema_rescale"),
    ],
)
def test_settings_that_contradict_are_refused(overrides, key):
    _, problems = checked(compose(overrides))
    assert {problem.key for problem in problems} == {key}


def test_a_backbones_own_learning_rate():
    toy = vit()
    head = {toy.model.head.weight, toy.model.head.bias}
    for scaling, batch in ((LrScaling.none, 256), (LrScaling.linear, 512)):
        groups = parameter_groups(toy, AdamW(lr=1e-2, weight_decay=0.05, backbone_lr=1e-4, lr_scaling=scaling), batch)
        factor = 2 if scaling is LrScaling.linear else 1
        rates = {p: group["lr"] / factor for group in groups for p in group["params"]}
        assert [rates[p] for p in head] == pytest.approx([1e-2] * 2)
        rest = [rates[p] for p in rates.keys() - head]
        assert rest == pytest.approx([1e-4] * len(rest))
    headless = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="has a head"):
        parameter_groups(headless, AdamW(lr=1e-2, weight_decay=0.05, backbone_lr=1e-4), 64)


def test_the_head_of_a_network_inside_a_task():
    assert heads(resnet()) == ("model.fc.",)
    assert heads(torchvision.models.resnet18()) == ("fc.",)


@pytest.mark.parametrize("overrides", [[], ["task=kd", "task.teacher=timm:test_resnet@{weights}", "task.teacher_size=32"], ["task=dino"],
                                       ["task=part_discovery", "dataset=digit_parts"]], ids=["classification", "kd", "dino", "part_discovery"])  # fmt: skip
def test_a_task_that_names_no_backbone_leaves_its_head_to_the_library(overrides, tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "weights.pt")
    task_of = [text.format(weights=tmp_path / "weights.pt") for text in overrides]
    cfg = compose_run("model=timm", "model.name=test_vit", "model.patch_size=8", "dataset.image_size=64", *task_of)
    task = build_task(cfg, build_data(cfg), torch.device("cpu"), 1)
    assert task.backbone_name is None
    groups = parameter_groups(task, AdamW(lr=1e-2, weight_decay=0.05, backbone_lr=1e-4), 64)
    rate = {p: group["lr"] for group in groups for p in group["params"]}
    expected = {p: 1e-2 if n.startswith(heads(task)) else 1e-4 for n, p in task.named_parameters() if p in rate}
    assert heads(task) and rate == pytest.approx(expected)


KINDS = {
    "frozen": ["loop.freeze_to=layer2", "loop.ema_decay=0.9"],
    "batchnorm": ["loop.freeze_batchnorm=true", "optimizer.backbone_lr=1e-4"],
    "swa": ["loop.swa_start=0.4", "loop.swa_every=2"],
    "rescaled": ["loop.ema_decay=0.99", "loop.ema_rescale=true", "loop.ema_every=2"],
    "mesa": ["task.mesa_weight=0.8", "task.mesa_start=1", "task.mesa_decay=0.9", "loop.freeze_to=1"],
    "bce": ["task.loss=bce", "task.bce_threshold=0.2", "augmentation.mixup=0.8"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_to_the_same_bits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    overrides = [*MODELS["batchnorm"], "dataset.num_workers=0", *KINDS[kind]]
    stopped_and_resumed(run, tmp_path, monkeypatch, 5, *overrides)
    if kind == "frozen":
        first = timm.create_model("test_resnet", num_classes=10).state_dict()
        saved = last(tmp_path / "unbroken")
        frozen = [name for name in first if name.startswith("layer1") and "running" in name]
        assert frozen and all(torch.equal(saved["task"][f"model.{name}"], first[name]) for name in frozen), "statistics stay as drawn"
        assert not any(name.startswith("model.layer1") and name.endswith("weight") for name in saved["ema"])
