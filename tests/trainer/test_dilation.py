"""torchvision's networks with finer last maps, against torchvision's own dilation and against timm's `output_stride`."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from trainer.config.model import TorchvisionModel
from trainer.dilation import LastMap, parts_in_order
from trainer.errors import ConfigError

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def last_map(name: str, stride: int | None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    cfg = TorchvisionModel(name=name, args={} if stride is None else {"output_stride": stride})
    network = cfg.build(num_classes=0, image_size=64, in_channels=3).eval()
    parts = parts_in_order(network)
    assert parts is not None
    with torch.no_grad():
        return network, LastMap(parts, 3).forward_features(IMAGES)


@pytest.mark.parametrize("stride", [16, 8])
def test_a_resnet_is_torchvisions_own_dilated_one(stride):
    network, found = last_map("resnet50", stride)
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, stride == 8, True]).eval()
    theirs.load_state_dict(network.state_dict(), strict=False)
    parts = parts_in_order(theirs)
    assert parts is not None
    with torch.no_grad():
        torch.testing.assert_close(found, LastMap(parts, 3).forward_features(IMAGES))
    assert found.shape[2:] == (64 // stride, 64 // stride)


@pytest.mark.parametrize(("name", "theirs"), [("resnet18", "resnet18"), ("convnext_tiny", "convnext_tiny")])
def test_others_are_timms(name, theirs):
    """With timm's own arithmetic and torchvision's weights, which both libraries register in nearly the same order."""
    network, found = last_map(name, 8)
    other: Any = timm.create_model(theirs, num_classes=0, output_stride=8).eval()
    ours = list(parts_of(network).items())
    pool = [[n, v] for n, v in other.state_dict().items() if not n.startswith(("head.", "fc."))]
    state = {}
    for _, value in ours:  # the first that is left of the same number of values
        place = next(i for i, (_, v) in enumerate(pool) if v.numel() == value.numel())
        key, shape = pool[place][0], pool.pop(place)[1].shape
        state[key] = value.reshape(shape)
    assert not pool
    other.load_state_dict(state, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(found, other.forward_features(IMAGES), atol=1e-4, rtol=1e-4)
    assert found.shape[2:] == (8, 8)


def parts_of(network: nn.Module) -> dict[str, Tensor]:
    return {n: v for n, v in network.state_dict().items() if not n.startswith(("fc.", "classifier."))}


def test_no_stride_changes_nothing_and_the_networks_own_neither():
    _, plain = last_map("resnet18", None)
    _, same = last_map("resnet18", 32)
    assert torch.equal(plain, same)


@pytest.mark.parametrize(
    ("name", "stride", "reason"), [("vgg11", 8, "come to 32"), ("resnet18", 3, "come to"), ("vit_b_16", 8, "no chain")]
)
def test_what_cannot_be_finer_is_refused(name, stride, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        last_map(name, stride)
    assert refused.value.problems[0].key == "model.args.output_stride"  # type: ignore[union-attr]
