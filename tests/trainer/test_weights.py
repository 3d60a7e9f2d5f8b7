"""Starting from other weights: everything that fits is taken, and every tensor is accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from trainer.checkpoint import save_safetensors
from trainer.errors import ConfigError
from trainer.task import Batch, Evaluator, Progress, StepOutput, Task
from trainer.weights import load_weights

TINY: dict[str, Any] = {"depth": 2, "embed_dim": 16, "num_heads": 2}


class Toy(Task):
    """A task around one network, with something of its own beside it."""

    def __init__(self, model: Any, extra: int = 0) -> None:
        super().__init__()
        self.model: Any = model
        if extra:
            self.projection = nn.Linear(16, extra)

    def training_step(self, batch: Batch, progress: Progress, /) -> StepOutput:
        raise NotImplementedError

    def evaluator(self) -> Evaluator:
        raise NotImplementedError


class Pair(Task):
    """A task whose network has another name, beside one that would fit as well."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.a_student, self.teacher = student, teacher

    def network(self) -> nn.Module:
        return self.teacher

    training_step = Toy.training_step
    evaluator = Toy.evaluator


def vit(size: int = 32, classes: int = 10, patch: int = 8, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=patch, num_classes=classes, **(TINY | more))


def checkpoint(
    path: Path, task: Task, *, ema: dict[str, Tensor] | None = None, classes: Sequence[str] = (), network: str | None = "model"
) -> str:
    """As the engine writes one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"task": task.state_dict(), "ema": ema, "network": network, "step": 9, "config": {}, "classes": list(classes)}
    torch.save(content, path)
    return str(path)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_run_of_the_same_task(tmp_path):
    source, target = Toy(vit(seed=1), extra=3), Toy(vit(seed=2), extra=3)
    checkpoint(tmp_path / "run" / "checkpoints" / "last.pt", source)
    account = load_weights(target, str(tmp_path / "run"))
    assert same(source, target)  # the projection beside the network too
    assert len(account.loaded) == account.total == len(target.state_dict())
    assert not (account.missing or account.skipped or account.reset or account.unused or account.resampled)


def test_the_best_weights_and_the_averaged_ones(tmp_path):
    source, target = Toy(vit(seed=1)), Toy(vit(seed=2))
    checkpoint(tmp_path / "checkpoints" / "last.pt", Toy(vit(seed=3)))
    average = {name: tensor + 1 for name, tensor in source.state_dict().items()}
    checkpoint(tmp_path / "checkpoints" / "best.pt", source, ema=average)
    account = load_weights(target, str(tmp_path))
    assert all(torch.equal(tensor, average[name]) for name, tensor in target.state_dict().items())
    assert "best.pt" in str(account) and "averaged" in str(account)


@pytest.mark.parametrize("known", [True, False])
def test_from_a_task_of_another_kind_its_exported_network_is_taken(tmp_path, known):
    source = Pair(vit(seed=1), vit(seed=2))
    path = checkpoint(tmp_path / "x.pt", source, network="teacher" if known else None)
    target = Toy(vit(seed=3))
    account = load_weights(target, path)
    assert len(account.loaded) == account.total
    assert same(target.model, source.teacher if known else source.a_student) or not known


@pytest.mark.parametrize("classes", [(10, 7), (10, 10)])
def test_a_head_for_other_classes_is_left_as_it_was_drawn(tmp_path, classes):
    before, after = classes
    source, target = Toy(vit(classes=before, seed=1)), Toy(vit(classes=after, seed=2))
    head = target.model.head.weight.detach().clone()
    names = [f"c{i}" for i in range(before)]
    path = checkpoint(tmp_path / "x.pt", source, classes=names)
    account = load_weights(target, path, classes=[f"d{i}" for i in range(after)])
    assert torch.equal(target.model.head.weight, head)
    assert [entry.split(" ")[0] for entry in account.reset] == ["model.head.weight", "model.head.bias"]
    assert torch.equal(target.model.norm.weight, source.model.norm.weight)
    if before == after:  # and with the same classes it is taken
        assert not load_weights(target, path, classes=names).reset and same(source, target)


@pytest.mark.parametrize(("name", "head"), [("convnext_atto", "head.fc."), ("resnet10t", "fc.")])
def test_which_part_is_the_head_the_network_knows(tmp_path, name, head):
    """convnext's head also holds a norm that is not for its classes."""
    source, target = Toy(timm.create_model(name, num_classes=3)), Toy(timm.create_model(name, num_classes=4))
    account = load_weights(target, checkpoint(tmp_path / "x.pt", source))
    assert {entry.split(" ")[0] for entry in account.reset} == {f"model.{head}weight", f"model.{head}bias"}
    assert len(account.loaded) == account.total - 2


def test_torchvisions_head(tmp_path):
    import torchvision

    source, target = Toy(torchvision.models.resnet18(num_classes=3)), Toy(torchvision.models.resnet18(num_classes=4))
    account = load_weights(target, checkpoint(tmp_path / "x.pt", source))
    assert {entry.split(" ")[0] for entry in account.reset} == {"model.fc.weight", "model.fc.bias"}


@pytest.mark.parametrize("more", [{}, {"reg_tokens": 4}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}])
def test_position_embeddings_are_resampled_as_timm_does_it(tmp_path, more):
    """Against timm's own loader, which does it on its own terms."""
    source, target, theirs = vit(32, seed=1, **more), vit(48, seed=2, **more), vit(48, seed=2, **more)
    account = load_weights(Toy(target), checkpoint(tmp_path / "x.pt", Toy(source)))
    from timm.models.vision_transformer import checkpoint_filter_fn

    theirs.load_state_dict(checkpoint_filter_fn(source.state_dict(), theirs))
    assert same(target, theirs)
    assert len(account.resampled) == 1 and "pos_embed" in account.resampled[0] and len(account.loaded) == account.total


def test_patches_of_another_size(tmp_path):
    source, target, theirs = vit(32, patch=8, seed=1), vit(32, patch=4, seed=2), vit(32, patch=4, seed=2)
    load_weights(Toy(target), checkpoint(tmp_path / "x.pt", Toy(source)))
    from timm.models.vision_transformer import checkpoint_filter_fn

    theirs.load_state_dict(checkpoint_filter_fn(source.state_dict(), theirs))
    assert same(target, theirs)


def test_relative_positions_and_windows(tmp_path):
    def swin(size: int) -> Any:
        return timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=size, window_size=size // 16, depths=(1, 1), num_heads=(2, 2), embed_dim=16
        )

    source, target = swin(64), swin(128)
    account = load_weights(Toy(target), checkpoint(tmp_path / "x.pt", Toy(source)))
    assert len(account.loaded) == account.total and len(account.resampled) == 2


def test_torchvisions_position_embeddings(tmp_path):
    from torchvision.models import VisionTransformer
    from torchvision.models.vision_transformer import interpolate_embeddings

    source: Any
    target: Any
    theirs: Any
    source, target, theirs = (VisionTransformer(size, 8, 1, 2, 16, 32) for size in (32, 48, 48))
    account = load_weights(Toy(target), checkpoint(tmp_path / "x.pt", Toy(source)))
    assert len(account.resampled) == 1
    theirs.load_state_dict(interpolate_embeddings(48, 8, source.state_dict()))
    ours, reference = target.encoder.pos_embedding.detach(), theirs.encoder.pos_embedding.detach()
    # torchvision puts the corners on the corners, timm the edges on the edges: close, not equal.
    assert torch.cosine_similarity(ours.flatten(), reference.flatten(), dim=0) > 0.95
    assert torch.equal(ours[:, 0], reference[:, 0])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"state": {}}},
        lambda state: {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {"student": {k: v + 1 for k, v in state.items()}, "teacher": {f"backbone.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state},
    ],
)
def test_other_peoples_files(tmp_path, wrap):
    source, target = vit(seed=1), Toy(vit(seed=2))
    torch.save(wrap(source.state_dict()), tmp_path / "x.pth")
    account = load_weights(target, str(tmp_path / "x.pth"))
    assert same(source, target.model) and len(account.loaded) == account.total


def test_safetensors(tmp_path):
    source, target = vit(seed=1), Toy(vit(seed=2), extra=3)
    save_safetensors(source, tmp_path / "model.safetensors")
    load_weights(target, str(tmp_path / "model.safetensors"))
    assert same(source, target.model)


def test_a_backbone_without_a_head_into_a_network_with_one(tmp_path):
    source, target = vit(classes=0, seed=1), Toy(vit(seed=2))
    torch.save(source.state_dict(), tmp_path / "x.pt")
    account = load_weights(target, str(tmp_path / "x.pt"))
    assert account.missing == ["head.weight", "head.bias"] and "left as drawn" in str(account)


def test_a_network_of_another_width_is_not_half_loaded_silently(tmp_path):
    account = load_weights(Toy(vit(seed=2)), checkpoint(tmp_path / "x.pt", Toy(vit(seed=1, depth=1, mlp_ratio=2.0))))
    assert any("fc1.weight" in entry for entry in account.skipped)  # of another shape
    assert any("blocks.1." in name for name in account.missing)  # one block less
    assert "of another shape" in str(account) and "not in the source" in str(account)


def test_published_weights(tmp_path, monkeypatch):
    """timm's own loader fetches them; here, from a file instead of the network."""
    published = vit(32, seed=1)
    save_safetensors(published, tmp_path / "published.safetensors")
    target = vit(48, seed=2)
    target.pretrained_cfg = {
        **target.pretrained_cfg,
        "file": str(tmp_path / "published.safetensors"),
        "custom_load": False,
        "num_classes": 10,
    }
    original: Any = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kw: original(name, img_size=32, patch_size=8, num_classes=10, **(TINY | kw)))
    account = load_weights(Toy(target), "timm:pretrained")
    assert torch.equal(target.blocks[0].attn.qkv.weight, published.blocks[0].attn.qkv.weight)
    assert len(account.loaded) == account.total and len(account.resampled) == 1 and "vit_tiny" in account.source


def test_what_cannot_be_loaded_is_a_config_error(tmp_path, monkeypatch):
    task = Toy(vit())
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"other": torch.ones(3)}, tmp_path / "other.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"1234567890")
    for source, words in [
        (tmp_path / "nowhere.pt", "no such file"),
        (tmp_path / "othr.pt", r"try: init_from=.*other\.pt"),
        (tmp_path / "empty", "no weights to start from"),
        (tmp_path / "text.pt", "not a whole checkpoint"),
        (tmp_path / "other.pt", "nothing in it fits"),
        (tmp_path / "broken.safetensors", "cannot be read"),
        ("timm:something", "timm:pretrained"),
    ]:
        with pytest.raises(ConfigError, match=words) as refused:
            load_weights(task, str(source))
        assert "init_from" in str(refused.value)
    with pytest.raises(ConfigError, match="not one of timm's"):
        load_weights(Toy(nn.Linear(2, 2)), "timm:pretrained")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot be fetched"):
        load_weights(task, "timm:pretrained")
