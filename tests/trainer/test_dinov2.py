"""DINOv2 networks of Hugging Face's, against that library itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from trainer.config.model import TimmModel
from trainer.errors import ConfigError

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7, "mlp_ratio": 2}


def theirs(folder: Path, *, registers: bool, swiglu: bool = False) -> torch.nn.Module:
    """A small network with random weights everywhere, also where they begin as ones or zeros, saved as transformers saves it."""
    torch.manual_seed(0)
    if registers:
        model = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3, use_swiglu_ffn=swiglu)
        )
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, use_swiglu_ffn=swiglu))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(("registers", "swiglu"), [(False, False), (True, False), (False, True), (True, True)])
def test_features_are_theirs(registers, swiglu, tmp_path):
    expected = theirs(tmp_path, registers=registers, swiglu=swiglu)
    cfg = TimmModel(name=str(tmp_path), source="huggingface", pretrained=True)
    ours = cfg.build(num_classes=0, image_size=28, in_channels=3).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(images), expected(images).last_hidden_state, atol=1e-5, rtol=1e-4)  # type: ignore[operator]


def test_gates_are_read_as_the_hub_stores_them(tmp_path):
    """Older files, as facebook/dinov2-giant, hold gate and values in one, `weights_in`."""
    expected = theirs(tmp_path, registers=False, swiglu=True)
    path = tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(path)
    for name in [n for n in state if ".gate_proj." in n]:  # where the library itself still writes `weights_in`, there is nothing to do
        state[name.replace("gate_proj", "weights_in")] = torch.cat([state.pop(name), state.pop(name.replace("gate_proj", "up_proj"))])
        state[name.replace("gate_proj", "weights_out")] = state.pop(name.replace("gate_proj", "down_proj"))
    safetensors.torch.save_file(state, path)
    ours = TimmModel(name=str(tmp_path), source="huggingface", pretrained=True).build(num_classes=0, image_size=28, in_channels=3).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(images), expected(images).last_hidden_state, atol=1e-5, rtol=1e-4)  # type: ignore[operator]


def test_other_sizes_and_channels_are_resampled(tmp_path):
    theirs(tmp_path, registers=True)
    cfg = TimmModel(name=str(tmp_path), source="huggingface", pretrained=True)
    model = cfg.build(num_classes=5, image_size=42, in_channels=1)
    assert model(torch.randn(2, 1, 42, 42)).shape == (2, 5)


def test_what_is_no_such_network_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        TimmModel(name=str(tmp_path), source="huggingface").build(num_classes=0, image_size=28, in_channels=3)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is a bert"):
        TimmModel(name=str(tmp_path), source="huggingface").build(num_classes=0, image_size=28, in_channels=3)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "patch_size": 7}')
    assert [p.fix for p in TimmModel(name=str(tmp_path), source="huggingface").problems("model", 32)] == ["dataset.image_size=35"]
    assert TimmModel(name="microsoft/rad-dino", source="huggingface").input_multiple == 14
    assert [p.key for p in TimmModel(name="a/b", source="huggingface", patch_size=8).problems("model", 32)] == ["model.patch_size"]


def test_out_of_reach_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"not cached here and cannot be fetched"):
        TimmModel(name="microsoft/rad-dino-that-is-not-cached", source="huggingface").build(num_classes=0, image_size=28, in_channels=3)
