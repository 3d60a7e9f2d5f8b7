"""Masked image modelling against transformers, to the last digits; masks, features and pictures by their properties."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tasks.mim import masks
from tasks.mim.build import build
from tasks.mim.config import MimConfig
from tasks.mim.pixels import to_images, to_patches
from tests.tasks.transformers_names import MAE, SIMMIM_SWIN, SIMMIM_VIT, copy_weights, gradients
from tests.test_exact import assert_same_run, stop_after
from tests.thresholds import FILLS_IN
from trainer import load_model
from trainer.config import RunConfig
from trainer.errors import ConfigError, Stopped
from trainer.launch.compose import checked, compose, compose_run
from trainer.run import train
from trainer.rundir import RunDirectory
from trainer.task import DataInfo, Progress

VIT = ["model=timm", "model.name=test_vit", "model.patch_size=4", "dataset.image_size=16"]
SWIN = ["model=timm", "model.name=swin_tiny_patch4_window7_224", "model.patch_size=2", "dataset.image_size=32",
        "+model.args.embed_dim=16", "+model.args.depths=[2,2]", "+model.args.num_heads=[2,4]", "+model.args.window_size=4"]  # fmt: skip
BEIT = ["model=timm", "model.name=beitv2_base_patch16_224", "model.patch_size=8", "dataset.image_size=32",
        "+model.args={embed_dim: 24, depth: 2, num_heads: 2}"]  # fmt: skip
EVA = ["model=timm", "model.name=eva02_tiny_patch14_224", "model.patch_size=8", "dataset.image_size=32",
       "+model.args={embed_dim: 24, depth: 2, num_heads: 2}"]  # fmt: skip
HIERA = [
    "model=timm",
    "model.name=hiera_tiny_224",
    "dataset.image_size=64",
    "+model.args={embed_dim: 16, stages: [1, 1, 2, 1], num_heads: 1}",
]
CONVNEXT = ["model=convnextv2_micro", "model.args={depths: [1, 1, 1, 1], dims: [4, 6, 8, 10]}", "dataset.image_size=32", "task.method=fcmae",
            "task.decoder_dim=12"]  # fmt: skip
SHORT = ["loop.batch_size=16", "loop.samples_per_epoch=48", "loop.epochs=2", "loop.log_every=1", "loop.progress=none", "logger.plots=false",
         "loop.max_validation_batches=2", "loop.max_reference_images=64", "dataset.num_workers=0"]  # fmt: skip
INFO = DataInfo(num_train=8, num_val=8, classes=("a", "b"), channels=3, steps_per_epoch=1, total_steps=1)
KEYS = torch.arange(40, 48) * 0x5DEECE66D
START = Progress(0, 1, 1)


def make(*overrides: str) -> Any:
    torch.manual_seed(0)
    return built(compose_run("task=mim", *overrides))


def built(run: RunConfig) -> Any:
    assert isinstance(run.task, MimConfig)
    return build(run.task, run, INFO)


def images(size: int, count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- against transformers ------------------------------------------------------------------------------------------------


def compare(task, batch, other, loss, rules):
    """Loss and every gradient, to 1e-5."""
    mine = task.training_step(batch, START).loss
    mine.backward()
    loss.backward()
    assert mine.item() == pytest.approx(loss.item(), abs=1e-5)
    for name, ours, theirs in gradients(task, other, rules):
        assert (ours - theirs).abs().max() <= 1e-5, name


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_mae_is_transformers_vit_mae(normalize, ratio):
    transformers = pytest.importorskip("transformers")
    task = make(*VIT, f"task.normalize_pixels={normalize}", f"task.mask_ratio={ratio}", "task.decoder_dim=32", "task.decoder_depth=2")
    vit = task.model
    other = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=vit.embed_dim, num_hidden_layers=len(vit.blocks), num_attention_heads=vit.blocks[0].attn.num_heads,
            intermediate_size=vit.blocks[0].mlp.fc1.out_features, image_size=16, patch_size=4, layer_norm_eps=1e-6, mask_ratio=ratio,
            decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=1, decoder_intermediate_size=128, norm_pix_loss=normalize,
        )
    )  # fmt: skip
    copy_weights(task, other, MAE)
    other.decoder.decoder_pos_embed.data.copy_(task.decoder.positions)
    batch = {"image": images(16), "key": KEYS}
    noise = torch.empty(8, 16).scatter_(1, task.order(KEYS), torch.arange(16.0).expand(8, -1))  # their order is that of the noise
    compare(task, batch, other, other(batch["image"], noise=noise).loss, MAE)


def test_fixed_positions_are_those_of_transformers():
    module = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    table = module.build_2d_sinusoidal_position_embedding(4, 4, 64, cls_token=True)
    task = make(*VIT)
    # As they say themselves, MAE's published weights have the two halves the other way round.
    assert torch.allclose(task.model.pos_embed[0], table.roll(32, 1), atol=1e-6)
    assert not task.model.pos_embed.requires_grad


def test_simmim_is_transformers_vit():
    transformers = pytest.importorskip("transformers")
    task = make(*VIT, "task.method=simmim")
    vit = task.model
    other = transformers.ViTForMaskedImageModeling(
        transformers.ViTConfig(
            hidden_size=vit.embed_dim, num_hidden_layers=len(vit.blocks), num_attention_heads=vit.blocks[0].attn.num_heads,
            intermediate_size=vit.blocks[0].mlp.fc1.out_features, image_size=16, patch_size=4, encoder_stride=4, layer_norm_eps=1e-6,
        )
    )  # fmt: skip
    copy_weights(task, other, SIMMIM_VIT)
    batch = {"image": images(16), "key": KEYS}
    mask = masks.hidden(task.order(KEYS), task.num_visible)
    compare(task, batch, other, other(batch["image"], bool_masked_pos=mask).loss, SIMMIM_VIT)


def test_simmim_is_transformers_swin():
    transformers = pytest.importorskip("transformers")
    task = make(*SWIN, "task.method=simmim", "task.mask_unit=8", "model.drop_path_rate=0").train()
    other = transformers.SwinForMaskedImageModeling(
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, encoder_stride=4, drop_path_rate=0.0
        )
    )
    copy_weights(task, other, SIMMIM_SWIN)
    batch = {"image": images(32), "key": KEYS}
    mask = masks.enlarged(masks.hidden(task.order(KEYS), task.num_visible), (4, 4), 4).flatten(1)
    compare(task, batch, other, other(batch["image"], bool_masked_pos=mask).loss, SIMMIM_SWIN)


# --- masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "block"])
@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.75), ((6, 6), 0.6), ((2, 2), 0.5), ((8, 8), 0.9)])
def test_a_mask_hides_exactly_so_many_and_belongs_to_its_sample(kind, grid, ratio):
    keys = torch.arange(64) * 7919
    order = masks.visible_first(keys, grid, kind)
    assert torch.equal(order.sort(dim=1).values, torch.arange(grid[0] * grid[1]).expand(64, -1))
    visible = math.floor(grid[0] * grid[1] * (1 - ratio))
    mask = masks.hidden(order, visible)
    assert (mask.sum(1) == grid[0] * grid[1] - visible).all()
    assert len({tuple(row.tolist()) for row in mask}) > (1 if len(mask[0]) == 4 else 60)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(masks.visible_first(keys[shuffled], grid, kind), order[shuffled])
    assert torch.equal(masks.visible_first(keys[5:6], grid, kind), order[5:6])


def test_every_unit_is_hidden_alike_by_random_masks_and_blocks_hang_together():
    keys = torch.arange(4000)
    rate = masks.hidden(masks.visible_first(keys, (8, 8), "random"), 16).float().mean(0)
    assert (rate - 0.75).abs().max() < 0.04  # five standard deviations of a mean of 4000
    alike = {}
    for kind in ("random", "block"):
        mask = masks.hidden(masks.visible_first(keys, (8, 8), kind), 32).view(-1, 8, 8)
        alike[kind] = (mask[:, :, 1:] == mask[:, :, :-1]).float().mean().item()
    assert alike["random"] < 0.52
    assert alike["block"] > 0.75, "neighbours share their fate"


def test_units_of_patches():
    order = torch.tensor([[3, 0, 1, 2]])  # 2 x 2 units of 2 x 2 patches
    fine = masks.in_patches(order, (2, 2), 2)
    assert fine.tolist()[0][:8] == [10, 11, 14, 15, 0, 1, 4, 5]
    coarse = masks.enlarged(masks.hidden(order, 2), (2, 2), 2).flatten(1)
    assert torch.equal(masks.hidden(fine, 8), coarse)


def test_patches_and_back():
    x = images(12, 2)
    patches = to_patches(x, 4)
    assert torch.equal(patches[1, 5].view(4, 4, 3).permute(2, 0, 1), x[1, :, 4:8, 8:12])
    assert torch.equal(to_images(patches, 4, (3, 3)), x)


# --- the encoder sees what it should -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        VIT, [*VIT, "task.method=simmim"], [*SWIN, "task.method=simmim"], [*VIT, "task.mask_unit=8", "task.mask=block"],
        [*VIT, "task.method=crossmae"], [*CONVNEXT, "task.mask_unit=16"], [*CONVNEXT, "+model.args.output_stride=8", "model.patch_size=4"],
        [*BEIT, "task.method=simmim"], [*EVA, "task.method=simmim"], [*HIERA, "task.method=simmim"],
        [*HIERA, "task.method=simmim", "task.mask_unit=32", "task.mask=block", "+model.args.q_pool=2"],
    ],
)  # fmt: skip
def test_hidden_pixels_do_not_reach_the_prediction(overrides):
    task = make(*overrides).eval()
    x = images(task.grid[0] * task.patch)
    order = task.order(KEYS)
    hidden = masks.enlarged(masks.hidden(order, task.num_visible), task.units, task.unit).unsqueeze(1)
    with torch.no_grad():
        _, before = task.losses(x, order)
        _, same = task.losses(x.where(~hidden, 7.0), order)
        _, other = task.losses(x.where(hidden, 7.0), order)
    assert torch.equal(before, same)
    assert not torch.allclose(before, other)


@pytest.mark.parametrize("network", [VIT, SWIN, BEIT, EVA, HIERA, [*HIERA, "+model.args.q_pool=2"]])
def test_every_weight_learns_and_a_place_of_the_map_is_where_it_is_in_the_image(network):
    """Without gradients that never come, which ranks would wait for; and places are not mixed up on the way to the pixels."""
    task = make(*network, "task.method=simmim")
    size = task.grid[0] * task.patch
    task.training_step({"image": images(size), "key": KEYS}, START).loss.backward()
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []
    side = size // task.stride
    x = images(size, 1).requires_grad_()
    features = task.eval()._map(x)
    assert features.shape[2:] == (side, side)
    if side > 1:
        for row, column in ((0, 0), (0, side - 1), (side - 1, 0)):
            (moved,) = torch.autograd.grad(features[0, :, row, column].square().sum(), x, retain_graph=True)
            weight = moved.square().sum((0, 1)).unflatten(0, (side, -1)).unflatten(2, (side, -1)).sum((1, 3))  # by places
            assert weight.argmax() == row * side + column


def test_mae_encodes_a_quarter():
    task = make(*VIT)
    seen = []
    task.model.blocks[0].register_forward_hook(lambda part, inputs, output: seen.append(inputs[0].shape[1]))
    task.training_step({"image": images(16), "key": KEYS}, START)
    assert seen == [1 + 4], "the class token and four of sixteen patches"


def test_filled_images_keep_what_was_visible():
    task = make(*VIT)
    x = images(16)
    filled = task.fill_in(x, KEYS)
    mask = filled.hidden.unsqueeze(1).expand_as(x)
    assert mask.float().mean() == 0.75
    assert torch.allclose(filled.images[~mask], x[~mask])
    assert not torch.allclose(filled.images[mask], x[mask])


@pytest.mark.parametrize(
    "overrides",
    [
        [*VIT, "task.method=simmim", "precision=bf16"],
        [*SWIN, "task.method=simmim", "model.drop_path_rate=0.2", "loop.activation_checkpointing=true"],
        [*HIERA, "task.method=simmim", "precision=bf16", "loop.activation_checkpointing=true"],
        [*VIT, "task.mask=block", "task.mask_unit=8", "loop.accumulate=2", "loop.activation_checkpointing=true"],
        [*VIT, "task.method=crossmae", "precision=bf16", "loop.activation_checkpointing=true"],
        [*CONVNEXT, "precision=bf16", "loop.activation_checkpointing=true", "model.drop_path_rate=0.2"],
    ],
)
def test_a_stopped_run_ends_in_the_same_bits(overrides, tmp_path, monkeypatch):
    overrides = ["task=mim", *overrides, *SHORT, "task.knn_neighbours=5"]
    train(compose_run(*overrides), RunDirectory(tmp_path / "unbroken"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            train(compose_run(*overrides), RunDirectory(tmp_path / "broken"))
    result = train(compose_run(*overrides), RunDirectory(tmp_path / "broken"))
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")
    assert {"val/loss", "val/knn_top1"} <= result["last"].keys()
    assert list((tmp_path / "broken" / "previews").rglob("*.png"))


def test_it_learns_to_fill_in_digits(tmp_path):
    result = train(
        compose_run("task=mim", *VIT, *SHORT, "loop.epochs=null", "loop.steps=40", "loop.batch_size=64", "loop.samples_per_epoch=null",
                    "loop.validate_every=null", "optimizer.lr=3e-3", "augmentation=none"),
        RunDirectory(tmp_path),
    )  # fmt: skip
    assert result["last"]["val/loss"] < FILLS_IN


@pytest.fixture(scope="module", params=["mae", "simmim", "crossmae"])
def pretrained(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pretrained") / "run"
    train(compose_run("task=mim", *VIT, f"task.method={request.param}", *SHORT), RunDirectory(path))
    return path


def test_what_was_learnt_is_fine_tuned(pretrained, tmp_path, capsys):
    """At another size too: positions are resampled, the head is drawn, the decoder stays behind."""
    for size in (16, 32):
        run = compose_run(
            *VIT, f"dataset.image_size={size}", f"init_from={pretrained}", "optimizer.lr=1e-12", "optimizer.layer_decay=0.65", *SHORT
        )
        train(run, RunDirectory(tmp_path / str(size)))
        said = capsys.readouterr().out
        before, after = (torch.load(d / "checkpoints" / "last.pt", weights_only=True)["task"] for d in (pretrained, tmp_path / str(size)))
        encoder = [name for name in after if name.startswith("model.") and not name.startswith("model.head")]
        assert f"{len(encoder)} of {len(after)} tensors loaded" in said
        assert ("pos_embed 1×17×64 -> 1×65×64" in said) == (size == 32), said
        assert all(
            torch.allclose(before[name], after[name], atol=1e-6)
            for name in encoder
            if name in before and (size == 16 or "pos_embed" not in name)
        )


def test_what_was_learnt_loads_into_plain_timm(pretrained):
    plain = timm.create_model(
        "test_vit", img_size=16, patch_size=4, num_classes=0, checkpoint_path=str(pretrained / "checkpoints" / "model.safetensors")
    )
    ours = load_model(pretrained, "last")
    assert torch.equal(plain.eval()(images(16)), ours(images(16)))


# --- what cannot work ----------------------------------------------------------------------------------------------------


def problems(*overrides: str):
    _, found = checked(compose(["task=mim", *overrides]))
    return {p.key: p for p in found}


@pytest.mark.parametrize(
    ("overrides", "key", "fix"),
    [
        (["model=resnet50"], "model.name", "simmim"),
        (["model=torchvision"], "model", "model=timm"),
        (["task.mask_ratio=0"], "task.mask_ratio", ""),
        (["task.mask_ratio=1"], "task.mask_ratio", ""),
        (["task.mask_ratio=0.999"], "task.mask_ratio", "task.mask_ratio=0.5"),
        (["dataset.image_size=30"], "dataset.image_size", "dataset.image_size=32"),
        (["task.mask_unit=6"], "task.mask_unit", "task.mask_unit=4"),
        (["task.method=simmim", "task.mask_unit=12"], "task.mask_unit", "task.mask_unit="),
        (["task.method=simmim", "task.decoder_depth=2"], "task.decoder_depth", "null"),
        (["task.method=mea"], "task.method", "mae"),
        (["model=small_resnet"], "model.name", "fcmae"),
        (["task.method=crossmae", "model=resnet50"], "model.name", "fcmae"),
        (["task.method=crossmae", "task.predicted_ratio=0.8"], "task.predicted_ratio", "task.predicted_ratio=0.75"),
        (["task.predicted_ratio=0.5"], "task.predicted_ratio", "null"),
        (["task.method=fcmae"], "model.name", "model=convnextv2_micro"),
        (["task.method=fcmae", "model=convnextv2_micro", "task.decoder_heads=2"], "task.decoder_heads", "null"),
        (["augmentation.mixup=0.2"], "augmentation.mixup", "augmentation.mixup=0"),
    ],
)
def test_what_cannot_work_is_said_with_the_way_out(overrides, key, fix):
    found = problems(*overrides)
    assert key in found, found
    assert fix in str(found[key])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=timm", "model.name=swin_s3_tiny_224", "dataset.image_size=224"], "plain ViT"),  # no name tells it
        (["model=timm", "model.name=test_convnext", "task.method=simmim"], "patches that do not overlap"),
        (["model=timm", "model.name=test_resnet"], "plain ViT"),
        ([*VIT, "task.decoder_dim=30"], "task.decoder_dim"),
        (HIERA, r"plain ViT(?s:.*)try: task.method=simmim"),
        (BEIT, r"plain ViT(?s:.*)try: task.method=simmim"),
        ([*HIERA, "dataset.image_size=112", "task.method=simmim"], r"windows of 32 pixels(?s:.*)dataset.image_size=128"),
        (["model=timm", "model.name=nest_tiny_jx", "dataset.image_size=224", "task.method=simmim"], "patches that do not overlap"),
        (["model=timm", "model.name=convnext_nano_ols", "dataset.image_size=64", "task.method=fcmae"], "ConvNeXt of timm's that begins"),
        (["model=small_resnet", "task.method=fcmae"], "ConvNeXt of timm's that begins"),
        (["model=timm", "model.name=test_convnext", "task.method=fcmae", "dataset.image_size=48"], "whole ones"),
        (["model=timm", "model.name=test_convnext", "task.method=fcmae", "dataset.image_size=32"], "nothing to see"),
    ],
)
def test_what_only_the_network_tells_is_said_before_the_first_step(overrides, message):
    run = compose_run("task=mim", *overrides)
    with pytest.raises(ConfigError, match=message):
        built(run)


def test_the_papers_sizes():
    mae, simmim = (compose_run("task=mim", f"task.method={method}").task for method in ("mae", "simmim"))
    assert isinstance(mae, MimConfig) and isinstance(simmim, MimConfig)
    assert mae.decoder_size(768, 12) == mae.decoder_size(1024, 24) == (512, 8, 16)
    assert (mae.unit(16, 224), mae.num_visible(196)) == (16, 49)
    assert (simmim.unit(4, 192), simmim.unit(16, 192), simmim.num_visible(36)) == (32, 32, 14)
