"""Networks by name: sizes, channels, classes; what a library refuses, in the config's terms; recomputed activations."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer import models, pretrained
from trainer.config.loop import LoopConfig
from trainer.config.model import ModelConfig, TimmModel, TorchvisionModel
from trainer.errors import ConfigError, Problem
from trainer.launch.store import tell_hydra


def build(cfg: ModelConfig, size: int = 32, channels: int = 3, classes: int = 5) -> nn.Module:
    return cfg.build(num_classes=classes, image_size=size, in_channels=channels)


def output(model: nn.Module, size: int = 32, channels: int = 3) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)))


def refused(cfg: ModelConfig, size: int = 32, channels: int = 3) -> Problem:
    with pytest.raises(ConfigError) as error:
        build(cfg, size, channels)
    (found,) = error.value.problems
    assert isinstance(found, Problem)
    return found


# --- sizes, channels, classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", 48), ("test_vit_relpos", 48), ("test_resnet", 20), ("test_convnext", 40), ("test_efficientnet", 33),
        ("test_maxvit", 64), ("swin_tiny_patch4_window7_224", 64), ("resnet18", 32),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("channels", "classes"), [(3, 5), (1, 0), (5, 2)])
def test_timm_takes_any_size_channels_and_classes(name: str, size: int, channels: int, classes: int) -> None:
    model: Any = build(TimmModel(name=name), size, channels, classes)
    out = output(model, size, channels)
    assert out.shape == (2, classes or model.num_features)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 32), ("mobilenet_v3_small", 32), ("vit_b_16", 48), ("swin_t", 32), ("googlenet", 32)]
)
def test_torchvision_takes_any_size_channels_and_classes(name: str, size: int) -> None:
    for channels, classes in ((3, 5), (4, 0)):
        out = output(build(TorchvisionModel(name=name), size, channels, classes), size, channels)
        assert out.shape[0] == 2
        assert out.ndim == 2
        assert classes == 0 or out.shape[1] == classes
        assert classes != 0 or out.shape[1] > 64  # features


def test_convolutions_in_place_of_patches_halve_the_image_once_for_each_of_their_channels() -> None:
    for depth in (1, 3):
        model: Any = build(TimmModel(name="test_vit", conv_stem=[8, 12], conv_stem_depth=depth), size=40, channels=2)
        convolutions = [m for m in model.patch_embed.backbone.modules() if isinstance(m, nn.Conv2d)]
        assert [c.out_channels for c in convolutions] == [8] * depth + [12] * depth
        tokens = model.patch_embed(torch.zeros(1, 2, 40, 40))
        assert tokens.numel() == 10 * 10 * tokens.shape[-1]


def test_the_config_may_say_the_channels() -> None:
    model: Any = build(TimmModel(name="test_resnet", in_channels=2), channels=3)
    assert output(model, channels=2).shape == (2, 5)


def test_patch_size_can_be_another() -> None:
    model: Any = build(TimmModel(name="test_vit", patch_size=4))
    assert model.patch_embed.num_patches == 64
    assert output(model).shape == (2, 5)


def test_drop_rates_reach_the_network() -> None:
    model: Any = build(TimmModel(name="test_vit", drop_rate=0.3, drop_path_rate=0.2))
    assert model.head_drop.p == 0.3
    assert [round(b.drop_path1.drop_prob, 2) for b in model.blocks[1:]][-1] == 0.2


def test_no_stochastic_depth_can_be_asked_for_where_a_network_has_its_own() -> None:
    """Swin comes with 0.1, and keeps it unless it is told otherwise; zero is no hindrance where there is nothing to drop."""
    small: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
    rates = []
    for rate in (None, 0.0):
        model: Any = build(TimmModel(name="swin_tiny_patch4_window7_224", drop_path_rate=rate, args=small), size=224)
        rates.append(max(getattr(part, "drop_prob", 0.0) for part in model.modules()))
    assert rates == pytest.approx([0.1, 0.0])
    build(TimmModel(name="vgg11", drop_rate=0.0, drop_path_rate=0.0))


def test_further_arguments_reach_the_network() -> None:
    assert build(TimmModel(name="test_vit", args={"class_token": False, "global_pool": "avg"})).cls_token is None


def test_weights_follow_from_the_global_seed_alone() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(build(TimmModel(name="test_resnet")).state_dict())
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def test_trying_a_small_image_leaves_no_trace() -> None:
    torch.manual_seed(3)
    small = build(TimmModel(name="test_resnet"), size=32)
    torch.manual_seed(3)
    large = build(TimmModel(name="test_resnet"), size=128)  # not tried
    assert small.training
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), large.state_dict().values(), strict=True))


# --- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "key", "fix"),
    [
        (TimmModel(name="resnet81"), "model.name", "model.name=resnet18"),
        (TimmModel(name="vit_tiny_patch16_244"), "model.name", "model.name=vit_tiny_patch16_224"),
        (TimmModel(name="resnet18.a1_in2k"), "model.name", "model.name=resnet18.a1_in1k"),
        (TimmModel(name="test_resnet", patch_size=4), "model.patch_size", "model.patch_size=null"),
        (TimmModel(name="vgg11", drop_path_rate=0.1), "model.drop_path_rate", "model.drop_path_rate=0"),
        (TimmModel(name="test_vit", args={"depht": 2}), "model.args.depht", "leave model.args.depht out"),
        (TimmModel(name="test_vit", args={"class_token": False}), "model.args.class_token", None),
        (TimmModel(name="local-dir:/nowhere"), "model.name", None),
        (TimmModel(name="resnet/18"), "model.name", None),
        (TorchvisionModel(name="resnet81"), "model.name", "model.name=resnet18"),
        (TorchvisionModel(name="fasterrcnn_resnet50_fpn"), "model.name", None),
        (TorchvisionModel(name="resnet18", patch_size=4), "model.patch_size", "model.patch_size=null"),
        (TorchvisionModel(name="resnet18", args={"dropout": 0.1}), "model.args.dropout", "leave model.args.dropout out"),
        (TorchvisionModel(name="vit_b_16", patch_size=8), "model.patch_size", "model.patch_size=null"),
    ],
)
def test_what_a_library_refuses_is_said_in_the_configs_terms(cfg: ModelConfig, key: str, fix: str | None) -> None:
    found = refused(cfg)
    assert found.key == key
    assert fix is None or found.fix == fix


@pytest.mark.parametrize("cfg", [TimmModel(name="convnext_tiny"), TorchvisionModel(name="convnext_tiny")])
def test_an_image_too_small_for_the_network_is_refused_with_one_that_is_not(cfg: ModelConfig) -> None:
    found = refused(cfg, size=16)
    assert found.key == "dataset.image_size"
    larger = int(found.fix.removeprefix("dataset.image_size="))
    assert output(build(cfg, larger), larger).shape == (2, 5)


@pytest.mark.parametrize(
    ("cfg", "multiple"),
    [
        (TimmModel(name="vit_tiny_patch16_224"), 16),
        (TimmModel(name="vit_base_patch14_reg4_dinov2"), 14),
        (TimmModel(name="vit_tiny_patch16_224", patch_size=4), 4),
        (TorchvisionModel(name="vit_h_14"), 14),
        (TimmModel(name="resnet18"), None),
        (TorchvisionModel(name="resnet18"), None),
    ],
)
def test_the_multiple_of_the_patch_is_known_without_the_network(cfg: ModelConfig, multiple: int | None) -> None:
    assert cfg.input_multiple == multiple
    assert not list(cfg.problems("model", 14 * 16 * 4))
    problems = list(cfg.problems("model", 14 * 16 * 4 + 1))
    assert [p.fix for p in problems] == ([] if multiple is None else [f"dataset.image_size={14 * 16 * 4}"])


def test_configs_import_no_torch() -> None:
    code = (
        "import sys; from trainer.config.model import TimmModel\n"
        "assert list(TimmModel(name='vit_tiny_patch16_224').problems('model', 30)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- pretrained weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cache, and a resolver that knows no name."""

    def nobody(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(pretrained.socket, "getaddrinfo", nobody)
    for name in ("https_proxy", "http_proxy", "all_proxy", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("cfg", "where"),
    [(TimmModel(name="test_vit", pretrained=True), "models--timm--test_vit"), (TorchvisionModel(name="resnet18", pretrained=True), "torch/checkpoints/resnet18-")],
)  # fmt: skip
def test_without_a_network_the_message_says_where_weights_may_be_put(cfg: ModelConfig, where: str) -> None:
    found = refused(cfg)
    assert found.key == "model.pretrained"
    assert where in found.fix
    assert "init_from=" in found.fix


def published(folder: Path, **facts: Any) -> dict[str, Tensor]:
    """A folder as timm publishes networks: weights of images of 160 pixels, and config.json. Returns the weights."""
    folder.mkdir(parents=True)
    source: Any = timm.create_model("test_vit")
    save_file(source.state_dict(), folder / "model.safetensors")
    known: dict[str, Any] = {
        "input_size": [3, 160, 160],
        "num_classes": 1000,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **facts,
    }
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": known}))
    return source.state_dict()


def in_the_hubs_cache(cache: Path, repository: str) -> Path:
    """Where the hub's client keeps the files of a repository; they are yet to be put there."""
    folder, revision = cache / f"models--{repository.replace('/', '--')}", "a" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    return folder / "snapshots" / revision


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub's cache, of which nothing is fetched that it lacks."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return tmp_path / "hub"


@pytest.mark.parametrize("facts", [{"fixed_input_size": True}, {}], ids=["says so", "silent"])
@pytest.mark.parametrize("kind", ["hf_hub", "hf-hub", "local-dir"])
def test_networks_of_the_hub_and_of_folders_take_any_size(kind: str, facts: dict[str, bool], offline: Path, tmp_path: Path) -> None:
    """Position embeddings are made for the images' size, not for the one that config.json names; weights are resampled."""
    folder = tmp_path / "patch99" if kind == "local-dir" else in_the_hubs_cache(offline, "timm/test_vit.mine")
    weights = published(folder, **facts)
    name = f"local-dir:{folder}" if kind == "local-dir" else f"{kind}:timm/test_vit.mine"
    for pretrained_ in (False, True):
        model: Any = build(TimmModel(name=name, pretrained=pretrained_), size=48)
        assert output(model, size=48).shape == (2, 5)
        assert model.patch_embed.num_patches == 9
        assert torch.equal(model.blocks[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"]) == pretrained_
    assert TimmModel(name=name).input_multiple is None, "a path's own words say nothing of patches"


def test_the_patch_of_a_network_of_the_hub_or_of_a_folder_is_known(tmp_path: Path) -> None:
    assert TimmModel(name="hf_hub:timm/vit_base_patch14_reg4_dinov2.lvd142m").input_multiple == 14
    (tmp_path / "patch99").mkdir()
    (tmp_path / "patch99" / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    assert TimmModel(name=f"local-dir:{tmp_path / 'patch99'}").input_multiple == 16


def test_a_network_of_the_hub_that_is_not_cached_is_refused_with_the_place_to_put_it(offline: Path, tmp_path: Path) -> None:
    found = refused(TimmModel(name="hf_hub:timm/test_vit.mine"))
    assert found.key == "model.name"
    assert "not cached here" in found.reason
    assert f"{offline}/models--timm--test_vit.mine" in found.fix
    folder = in_the_hubs_cache(offline, "timm/test_vit.mine")
    published(folder)
    (folder / "model.safetensors").unlink()
    assert build(TimmModel(name="hf_hub:timm/test_vit.mine")), "config.json is all that random weights ask for"
    assert refused(TimmModel(name="hf_hub:timm/test_vit.mine", pretrained=True)).key == "model.pretrained"
    (folder / "config.json").write_text("{}")
    assert "describes no network" in refused(TimmModel(name="hf_hub:timm/test_vit.mine")).reason
    assert "Unknown model source" in refused(TimmModel(name="elsewhere:timm/test_vit")).reason


def test_weights_put_where_the_message_says_are_found(tmp_path: Path) -> None:
    folder, revision = tmp_path / "models--timm--test_vit.r160_in1k", "a" * 40
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    source: Any = timm.create_model("test_vit")
    save_file(source.state_dict(), folder / "snapshots" / revision / "model.safetensors")
    code = (
        "from trainer.config.model import TimmModel\n"
        "model = TimmModel(name='test_vit', pretrained=True).build(num_classes=5, image_size=48, in_channels=3)\n"
        "print(model.blocks[0].mlp.fc1.weight.double().sum().item())"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) == source.blocks[0].mlp.fc1.weight.double().sum().item()


def test_a_network_without_published_weights_says_so() -> None:
    assert "no published weights" in refused(TimmModel(name="coatnet_0_224", pretrained=True), 64).reason


@pytest.mark.parametrize("name", ["vit_b_16", "resnet18", "densenet121", "googlenet"])
def test_torchvisions_weights_fit_other_sizes_channels_and_classes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # googlenet's constructor announces a change
        source: Any = torchvision.models.get_model(name)
    # As published: DenseNet's file has old names, GoogLeNet's two more heads.
    published = {k.replace("norm1", "norm.1") if "denselayer" in k else k: v for k, v in source.state_dict().items()}
    monkeypatch.setattr(models, "torchvision_weights", lambda _: dict(published))
    model = build(TorchvisionModel(name=name, pretrained=True), 48, 4)
    own = dict(model.named_parameters())
    same = {k for k, p in source.named_parameters() if k in own and own[k].shape == p.shape and torch.equal(own[k], p)}
    rest = {k for k in own if k not in same}
    assert len(rest) <= 4, rest  # the head's weight and bias, the first convolution, position embeddings
    assert output(model, 48, 4).shape == (2, 5)
    if name == "resnet18":  # timm's rule: the colours' weights repeated, and scaled so that activations keep their size
        torch.testing.assert_close(own["conv1.weight"][:, 0], source.conv1.weight[:, 0] * 3 / 4)


def test_weights_of_another_architecture_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torchvision.models.mobilenet_v3_small().state_dict()
    monkeypatch.setattr(models, "torchvision_weights", lambda _: dict(other))
    assert "do not fit" in refused(TorchvisionModel(name="resnet18", pretrained=True)).reason


@pytest.mark.parametrize(("channels", "size"), [(3, 160), (1, 48)])
def test_timms_weights_fit_other_sizes_channels_and_classes(tmp_path: Path, channels: int, size: int) -> None:
    source: Any = timm.create_model("test_vit")
    torch.save(source.state_dict(), tmp_path / "published.pt")
    published = {"pretrained_cfg_overlay": {"file": str(tmp_path / "published.pt")}}
    model: Any = build(TimmModel(name="test_vit.r160_in1k", args=published, pretrained=True), size, channels)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert output(model, size, channels).shape == (2, 5)


# --- getting ready for the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_recomputing_activations_changes_nothing(name: str) -> None:
    """Neither gradients nor the running statistics, which a second look at a batch would otherwise move twice."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5, **({"img_size": 48, "drop_path_rate": 0.5} if "vit" in name else {}))
    task = nn.ModuleDict({"model": copy.deepcopy(plain)})
    models.prepare(task, LoopConfig(activation_checkpointing=True))
    x = torch.randn(4, 3, 48, 48)
    for model in (plain, task["model"]):
        model.train()
        for _ in range(2):
            torch.manual_seed(1)  # noise in the network is drawn again, the same
            model(x).square().mean().backward()
    for (key, own), other in zip(plain.named_parameters(), task["model"].parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=key)
    for (key, own), other in zip(plain.named_buffers(), task["model"].buffers(), strict=True):
        assert torch.equal(own, other), key


def test_activations_are_really_recomputed() -> None:
    model: Any = timm.create_model("test_vit", img_size=48)
    models.prepare(model, LoopConfig(activation_checkpointing=True))
    calls = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    model(torch.randn(2, 3, 48, 48)).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("network", [nn.Linear(2, 2), timm.create_model("vgg11", num_classes=2)])
def test_a_network_that_cannot_recompute_is_refused(network: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"loop.activation_checkpointing=true: .*\n.*loop.activation_checkpointing=false"):
        models.prepare(network, LoopConfig(activation_checkpointing=True))


def test_channels_last() -> None:
    model = build(TimmModel(name="test_resnet"))
    before = output(model)
    models.prepare(model, LoopConfig(channels_last=True))
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)
    torch.testing.assert_close(output(model), before)


def test_nothing_is_done_unasked() -> None:
    model = build(TimmModel(name="test_resnet"))
    strides = [p.stride() for p in model.parameters()]
    models.prepare(model, LoopConfig())
    assert [p.stride() for p in model.parameters()] == strides
    assert not any(m._forward_pre_hooks for m in model.modules())


# --- the choices ------------------------------------------------------------------------------------------------------------


def test_every_choice_is_a_network(pytestconfig: pytest.Config) -> None:
    folder = pytestconfig.rootpath / "conf"
    tell_hydra()
    with initialize_config_dir(str(folder), version_base="1.3"):
        names = sorted(path.stem for path in (folder / "model").glob("*.yaml"))
        found: dict[str, Any] = {n: OmegaConf.to_object(compose(overrides=[f"+model={n}"]).model) for n in names}
    assert {"vit_tiny", "vit_s", "vit_b", "vit_l", "resnet18", "resnet50", "convnext_tiny", "dinov2_vit_b", "timm", "torchvision"} <= set(
        found
    )
    for name, cfg in found.items():
        assert isinstance(cfg, ModelConfig)
        if getattr(cfg, "source", "timm") == "huggingface":
            continue  # its shape is told by a file of the hub: test_dinov2.py writes such files
        with torch.device("meta"):  # no memory, no time
            size = 224 if cfg.input_multiple != 14 else 252
            model = build(cfg, size, classes=7)
            assert model(torch.empty(1, 3, size, size)).shape == (1, 7), name
