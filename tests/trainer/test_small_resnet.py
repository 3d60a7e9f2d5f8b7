"""The networks for small images: any size and channels, stages by number, a channels-last and a torch module like any other."""

from __future__ import annotations

import pytest
import torch

from tests.test_exact import SHORT, run
from trainer.launch.compose import checked, compose, compose_run
from trainer.small_resnet import ResNet9, SmallResNet


@pytest.mark.parametrize("network", [SmallResNet, ResNet9])
@pytest.mark.parametrize(("size", "channels"), [(16, 3), (24, 3), (33, 1), (32, 5)])
def test_any_size_and_any_channels(network: type[SmallResNet] | type[ResNet9], size: int, channels: int) -> None:
    model = network(num_classes=7, in_channels=channels, stem=4, widths=[8, 8, 16], blocks=[1, 2, 1])
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)
    headless = network(num_classes=0, in_channels=channels, stem=4, widths=[8], blocks=[1])
    assert headless(torch.zeros(2, channels, size, size)).shape == (2, headless.num_features)


def test_nine_layers_are_those_of_the_source() -> None:
    """Eight convolutions and a classifier, at its own width."""
    model = ResNet9(num_classes=10, in_channels=3, stem=64, widths=[128, 256, 512], blocks=[1, 0, 1])
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    channels = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == channels
    maps = torch.randn(2, 512, 4, 4)
    classifier = model.get_classifier()
    assert isinstance(classifier, torch.nn.Linear)
    assert torch.equal(model.forward_head(maps), 0.125 * maps.amax((2, 3)) @ classifier.weight.T)
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in model.modules()) == 3


@pytest.mark.parametrize("name", ["small_resnet", "resnet9"])
def test_it_runs_frozen_by_stage_with_layer_decay(tmp_path, name: str) -> None:
    overrides = [f"model={name}", "model.stem=4", "model.widths=[8,8]", "model.blocks=[1,1]", "dataset.num_workers=0", "loop.epochs=1"]
    run(tmp_path, *overrides, "loop.freeze_to=2", "optimizer.layer_decay=0.7")
    saved = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["task"]
    run_ = compose_run(*SHORT, *overrides)
    torch.manual_seed(0)
    assert run_.model.build(num_classes=10, image_size=32, in_channels=3).state_dict().keys() == {n.removeprefix("model.") for n in saved}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.blocks=[1,1]", "model.blocks"),
        ("model.blocks=[1,0,1]", "model.blocks"),
        ("model.pretrained=true", "model.pretrained"),
        ("model.patch_size=4", "model.patch_size"),
    ],
)
def test_what_it_does_not_have(override: str, key: str) -> None:
    _, problems = checked(compose(["model=small_resnet", override]))
    assert key in {p.key for p in problems}
