"""FCMAE and CrossMAE against their papers, written out; every method on two ranks."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from tasks.mim import masks
from tasks.mim.pixels import to_patches
from tests.processes import finish, logs, start, start_ranks
from tests.tasks.test_mim import CONVNEXT, KEYS, SHORT, START, VIT, images, make
from tests.test_exact import assert_close_runs, assert_same_run, last


def sparse_convnext(network: Any, image: torch.Tensor, visible: set[tuple[int, int]]) -> dict[tuple[int, int], torch.Tensor]:
    """The features of an image's visible units as sparse convolutions have them: places are computed one by one, those that are
    hidden do not exist. `visible`: (row, column) of units, as wide as a place of the last map."""

    def linear(part: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, part.weight.flatten(1), part.bias)

    def patchwise(part: Any, cells: dict, side: int) -> dict:
        """A convolution that looks at side x side places, each in one patch."""
        corners = {(r // side, c // side) for r, c in cells}
        stacked = {
            (r, c): torch.stack([cells[r * side + i, c * side + j] for i in range(side) for j in range(side)], 1) for r, c in corners
        }
        return {place: linear(part, x.flatten()) for place, x in stacked.items()}

    def norm(part: Any, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + part.eps).sqrt() * part.weight + part.bias

    def block(part: Any, cells: dict) -> dict:
        kernel, inner = part.conv_dw.weight[:, 0], {}
        for r, c in cells:
            near = [kernel[:, i, j] * cells[r + i - 3, c + j - 3] for i in range(7) for j in range(7) if (r + i - 3, c + j - 3) in cells]
            inner[r, c] = torch.nn.functional.gelu(linear(part.mlp.fc1, norm(part.norm, sum(near) + part.conv_dw.bias)))
        response = torch.stack(list(inner.values())).square().sum(0).sqrt()  # arXiv:2301.00808, eq. 1 to 3
        response = response / (response.mean() + 1e-6)
        grn = {at: part.mlp.grn.weight * (x * response) + part.mlp.grn.bias + x for at, x in inner.items()}
        return {at: cells[at] + linear(part.mlp.fc2, x) for at, x in grn.items()}

    cells = {(r, c): image[:, r, c] for r in range(32) for c in range(32) if (r // 8, c // 8) in visible}
    cells = {at: norm(network.stem[1], linear(network.stem[0], x)) for at, x in cells.items()}
    for i, stage in enumerate(network.stages):
        if i:
            cells = patchwise(stage.downsample[1], {at: norm(stage.downsample[0], x) for at, x in cells.items()}, 2)
        for part in stage.blocks:
            cells = block(part, cells)
    return cells


def test_fcmae_convolves_what_is_visible_alone():
    """Against sparse convolutions, and the loss against the formula of github.com/facebookresearch/ConvNeXt-V2, models/fcmae.py."""
    task = make(*CONVNEXT)
    torch.manual_seed(1)
    for p in task.parameters():  # all of them matter, those that begin as zeros too
        torch.nn.init.normal_(p, std=0.3)
    x, order = images(32), task.order(KEYS)
    hidden = masks.hidden(order, task.num_visible)  # [N, 16]
    with torch.no_grad():
        encoded = task.encode(x, ~hidden.view(8, 4, 4))
        visible = {divmod(int(i), 4) for i in (~hidden[3]).nonzero()}
        expected = sparse_convnext(task.model, x[3], visible)
        assert expected.keys() == visible
        for (r, c), feature in expected.items():
            assert torch.allclose(encoded[3, :, r, c], feature, rtol=1e-3, atol=1e-4), (r, c)
        losses, predicted = task.losses(x, order)
    target = torch.einsum("nchpwq->nhwpqc", x.reshape(8, 3, 4, 8, 4, 8)).reshape(8, 16, 192)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = ((predicted - target) ** 2).mean(-1)
    assert torch.allclose(losses.mean(), (error * hidden).sum() / hidden.sum(), rtol=1e-5)


def test_crossmae_is_the_papers_formula():
    """Loss and every gradient against arXiv:2401.14391, sec. 3, written out: attention by hand, mixtures as sums."""
    task = make(
        *VIT, "task.method=crossmae", "task.decoder_dim=32", "task.decoder_depth=2", "task.decoder_heads=2", "task.predicted_ratio=0.5"
    )
    assert (task.num_visible, task.num_predicted, task.num_hidden) == (4, 8, 12)
    decoder, vit, x, order = task.decoder, task.model, images(16), task.order(KEYS)
    mine = task.training_step({"image": x, "key": KEYS}, START).loss
    mine.backward()
    ours = {name: p.grad.clone() for name, p in task.named_parameters() if p.requires_grad}
    task.zero_grad()

    def linear(value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return value @ weight.T + bias

    tokens = vit.patch_embed(x).reshape(8, 16, -1) + vit.pos_embed[:, 1:]
    tokens = torch.stack([tokens[i, order[i, :4]] for i in range(8)])
    maps = [torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(8, -1, -1), tokens], 1)]
    for block in vit.blocks:
        maps.append(block(maps[-1]))
    asked = order[:, 4:][:, [0, 1, 3, 4, 6, 7, 9, 10]]  # eight of twelve, spread
    state = decoder.mask_token + decoder.positions[0][asked]
    for j, block in enumerate(decoder.blocks):
        memory = decoder.norms[j](sum(decoder.mixture[j, k] * m for k, m in enumerate(maps)))
        bias = block.attn.in_proj_bias.chunk(3)
        q = linear(block.norm1(state), block.attn.q_proj_weight, bias[0]).view(8, -1, 2, 16)
        k = linear(memory, block.attn.k_proj_weight, bias[1]).view(8, -1, 2, 16)
        v = linear(memory, block.attn.v_proj_weight, bias[2]).view(8, -1, 2, 16)
        weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) / 4).softmax(-1)
        state = state + block.attn.out_proj(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))
        state = state + block.mlp(block.norm2(state))
    predicted = decoder.predict(decoder.norm(state))
    target = torch.stack([to_patches(x, 4)[i, asked[i]] for i in range(8)])
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    loss = (predicted - target).square().mean()
    loss.backward()
    assert mine.item() == pytest.approx(loss.item(), abs=1e-5)
    for name, grad in ours.items():
        assert (grad - task.get_parameter(name).grad).abs().max() <= 1e-5, name


def test_crossmae_predicts_some_patches_in_training_and_all_in_validation():
    task = make(*VIT, "task.method=crossmae")
    x, order = images(16), task.order(KEYS)
    assert task.losses(x, order)[1].shape[1] == 4
    assert task.eval().losses(x, order)[1].shape[1] == 12


@pytest.mark.parametrize(
    "overrides", [[*VIT, "task.method=crossmae"], CONVNEXT, pytest.param([*VIT, "task.method=simmim"], marks=pytest.mark.slow)]
)
def test_two_ranks_are_one_and_killed_they_end_in_the_same_bits(overrides, tmp_path):
    """As tests/test_tasks.py does with the task as it comes."""
    overrides = [
        "task=mim",
        *overrides,
        *SHORT,
        "loop.max_validation_batches=1",
        "loop.checkpoint_every_steps=1",
        "optimizer=sgd",
        "optimizer.lr=0.05",
    ]
    one, two = start(tmp_path / "one", overrides), start_ranks(tmp_path / "two", overrides, 2)
    killed = start_ranks(tmp_path / "killed", overrides, 2, environment={"TRAINYARD_CHECKPOINT_FAULT": "sync:kill:4"})
    assert finish([one, *two]) == [0, 0, 0], logs(tmp_path / "one") + logs(tmp_path / "two")
    assert finish(killed)[0] == -signal.SIGKILL, logs(tmp_path / "killed")
    assert 0 < last(tmp_path / "killed")["step"] < 6
    assert finish(start_ranks(tmp_path / "killed", overrides, 2)) == [0, 0], logs(tmp_path / "killed")
    assert_same_run(tmp_path / "two", tmp_path / "killed")
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_two_ranks_train_what_one_does_by_mae(tmp_path):
    """An epoch's last batch short, in blocks of several patches."""
    overrides = ["task=mim", *VIT, *SHORT, "loop.max_validation_batches=1", "optimizer=sgd", "optimizer.lr=0.05", "loop.samples_per_epoch=46",
                 "loop.drop_last=false", "task.mask=block", "task.mask_unit=8"]  # fmt: skip
    one, two = start(tmp_path / "one", overrides), start_ranks(tmp_path / "two", overrides, 2)
    assert finish([one, *two]) == [0, 0, 0], logs(tmp_path / "one") + logs(tmp_path / "two")
    assert_close_runs(tmp_path / "one", tmp_path / "two")
