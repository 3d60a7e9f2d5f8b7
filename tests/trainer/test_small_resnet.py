"""The network for small images: any size and channels, stages by number, a channels-last and a torch module like any other."""

from __future__ import annotations

import pytest
import torch

from tests.test_exact import SHORT, run
from trainer.launch.compose import checked, compose, compose_run
from trainer.small_resnet import SmallResNet


@pytest.mark.parametrize(("size", "channels"), [(16, 3), (24, 3), (33, 1), (32, 5)])
def test_any_size_and_any_channels(size: int, channels: int) -> None:
    model = SmallResNet(num_classes=7, in_channels=channels, stem=4, widths=[8, 8, 16], blocks=[1, 2, 1])
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)
    headless = SmallResNet(num_classes=0, in_channels=channels, stem=4, widths=[8], blocks=[1])
    assert headless(torch.zeros(2, channels, size, size)).shape == (2, headless.num_features)


def test_it_runs_frozen_by_stage_with_layer_decay(tmp_path) -> None:
    overrides = ["model=small_resnet", "model.stem=4", "model.widths=[8,8]", "model.blocks=[1,1]", "dataset.num_workers=0", "loop.epochs=1"]
    run(tmp_path, *overrides, "loop.freeze_to=2", "optimizer.layer_decay=0.7")
    saved = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["task"]
    run_ = compose_run(*SHORT, *overrides)
    torch.manual_seed(0)
    assert run_.model.build(num_classes=10, image_size=32, in_channels=3).state_dict().keys() == {n.removeprefix("model.") for n in saved}


@pytest.mark.parametrize(
    ("override", "key"),
    [("model.blocks=[1,1]", "model.blocks"), ("model.pretrained=true", "model.pretrained"), ("model.patch_size=4", "model.patch_size")],
)
def test_what_it_does_not_have(override: str, key: str) -> None:
    _, problems = checked(compose(["model=small_resnet", override]))
    assert key in {p.key for p in problems}
