"""iBOT's and DINOv2's parts against lightly's, and masks by their properties."""

from __future__ import annotations

import lightly.loss
import pytest
import timm
import torch
import torch.nn.functional as F
from lightly.loss.swav_loss import sinkhorn

from tasks.dino.across_ranks import balanced, koleo
from tasks.dino.config import DinoConfig
from tasks.dino.masks import block_mask
from tasks.dino.task import Dino
from tests.tasks.test_dino_losses import TOTAL, config
from trainer.random import SampleRandom
from trainer.task import Progress


def small_task(method: str, **changes) -> Dino:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8, dynamic_img_size=True)
    return Dino(vit, 64, config(method=method, **changes), num_classes=4, mean=[0.5], std=[0.2])


def batch(seed: int, images: int = 6, local: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(images, 2, 3, 32, 32, generator=draw),
        "local": torch.randn(images, local, 3, 16, 16, generator=draw),
        "mask": torch.rand(images, 2, 4, 4, generator=draw) < torch.rand(images, 2, 1, 1, generator=draw),
    }


def pieces(task: Dino, views: dict[str, torch.Tensor]):
    """What both networks say, put together here by other means: the whole token sequence, the mask by hand."""
    large = torch.cat(list(views["image"].unbind(1)))
    hidden = torch.cat(list(views["mask"].unbind(1)))  # [2 N, h, w]
    with torch.no_grad():
        said = task.teacher.backbone.norm(run_blocks(task.teacher.backbone, large))
    vit = task.student.backbone
    seen = vit.norm(run_blocks(vit, large, hidden.flatten(1), task.mask_token.token))
    return said[:, 0], said[:, 1:][hidden.flatten(1)], seen[:, 0], seen[:, 1:][hidden.flatten(1)], hidden


def run_blocks(vit, images, hidden=None, token=None):
    x = F.conv2d(images, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=8).flatten(2).transpose(1, 2)
    if hidden is not None:
        x = x * ~hidden.unsqueeze(-1) + token * hidden.unsqueeze(-1)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
    return vit.blocks(vit.norm_pre(x))


def test_ibot_is_lightlys_over_ten_steps():
    """Both losses, both centres, every gradient."""
    task = small_task("ibot")
    of_views = lightly.loss.DINOLoss(32, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=3, student_temp=0.1)
    of_patches = lightly.loss.IBOTPatchLoss(32, teacher_temp=0.07, student_temp=0.1)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    for step in range(TOTAL):
        progress, views = Progress(step, TOTAL, 2), batch(step)
        said, said_of_patches, seen, seen_of_patches, hidden = pieces(task, views)
        scores = [*task.student.head(seen).chunk(2), *(task.student.head(task.student.backbone(v)) for v in views["local"].unbind(1))]
        teacher, temperature = task.teacher.head, task.temperature(progress)
        expected = of_views(list(teacher(said).chunk(2)), scores, epoch=step // 2)
        expected += of_patches(teacher(said_of_patches), task.student.head(seen_of_patches), hidden, teacher_temp=temperature)
        expected.backward()
        wanted = [p.grad.clone() for p in task.parameters() if p.grad is not None]
        optimizer.zero_grad()

        loss = task(views, progress).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        found = [p.grad for p in task.parameters() if p.grad is not None]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        task.before_update(progress)
        torch.testing.assert_close(task.center, of_views.center.view(-1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(task.patch_center, of_patches.center.value.view(-1), atol=1e-5, rtol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        task.after_update(progress)
    assert task.mask_token.token.abs().max() > 0, "the mask token learns"


def test_koleo_is_lightlys_over_ten_steps():
    """Loss and gradients of features that move apart and change their neighbours."""
    theirs, draw = lightly.loss.KoLeoLoss(), torch.Generator().manual_seed(0)
    ours, other = (torch.randn(12, 16, generator=draw.manual_seed(0)).mul_(0.1).add_(1).requires_grad_() for _ in range(2))
    neighbours, losses = set(), []
    for _ in range(TOTAL):
        mine, expected = koleo(ours), theirs(other)
        mine.backward()
        expected.backward()
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-5, rtol=1e-5)
        unit = F.normalize(ours.detach(), dim=1)
        neighbours.add(tuple((unit @ unit.T).fill_diagonal_(-2).argmax(1).tolist()))
        losses.append(mine.item())
        for x in (ours, other):
            assert x.grad is not None
            x.data.sub_(x.grad, alpha=1.0)
            x.grad = None
    assert losses[-1] < losses[0] and len(neighbours) > 2


def test_balanced_assignments_are_lightlys():
    scores = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    ours = balanced(scores, 0.3)
    torch.testing.assert_close(ours, sinkhorn(scores, iterations=3, epsilon=0.3), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.sum(1), torch.ones(24))
    torch.testing.assert_close(balanced(scores + 1000, 0.3), ours, atol=1e-4, rtol=1e-3)  # no overflow
    assert balanced(scores[:0], 0.3).shape == (0, 8)


def test_dinov2_is_the_sum_of_its_parts():
    """Views and patches with balanced answers, patches by a head of their own, and a tenth of koleo view by view."""
    task, views, progress = small_task("dinov2"), batch(0), Progress(0, TOTAL, 2)
    torch.nn.init.normal_(task.mask_token.token)
    said, said_of_patches, seen, seen_of_patches, hidden = pieces(task, views)
    teacher, student = task.teacher, task.student
    assert student.patch_head is not None and teacher.patch_head is not None
    answers = sinkhorn(teacher.head(said), iterations=3, epsilon=0.04).chunk(2)
    log_p = [(student.head(x) / 0.1).log_softmax(-1) for x in (*seen.chunk(2), *map(student.backbone, views["local"].unbind(1)))]
    expected = torch.stack([-(answers[t] * log_p[v]).sum(-1).mean() for t in range(2) for v in range(4) if v != t]).mean()
    patch_answers = sinkhorn(teacher.patch_head(said_of_patches), iterations=3, epsilon=0.04)
    losses = -(patch_answers * (student.patch_head(seen_of_patches) / 0.1).log_softmax(-1)).sum(-1)
    of_image = hidden.flatten(1).nonzero()[:, 0]
    means = [losses[of_image == i].mean() for i in of_image.unique()]
    expected = expected + torch.stack(means).sum() / 12 + 0.1 * sum(lightly.loss.KoLeoLoss()(x) for x in seen.chunk(2))
    torch.testing.assert_close(task(views, progress).loss, expected, atol=1e-5, rtol=1e-5)


def test_a_batch_without_hidden_patches_is_no_trouble():
    for method in ("ibot", "dinov2"):
        task, views = small_task(method), batch(0)
        views["mask"] = torch.zeros_like(views["mask"])
        loss = task(views, Progress(0, TOTAL, 2)).loss
        loss.backward()
        task.before_update(Progress(0, TOTAL, 2))
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())
        assert task.patch_center.abs().max() == 0


@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (3, 7)])
def test_masks_have_the_size_asked_for_and_come_in_blocks(grid):
    total = grid[0] * grid[1]
    for count in {0, 1, total // 3, total - 1, total}:
        masks = [block_mask(SampleRandom(key, 7), grid, count) for key in range(20)]
        assert {int(m.sum()) for m in masks} == {count}
        assert torch.equal(masks[3], block_mask(SampleRandom(3, 7), grid, count)), "a function of the key"
    if grid == (14, 14):
        masks = torch.stack([block_mask(SampleRandom(key, 7), grid, 60) for key in range(200)])
        neighbours = (masks[:, 1:] & masks[:, :-1]).float().mean() / masks.float().mean() ** 2
        assert neighbours > 1.5, "hidden patches lie together"
        often = masks.float().mean(0)
        assert often.min() > 0, "every patch is hidden at times"


def test_switches_can_be_set_one_by_one():
    assert (
        DinoConfig(out_dim=8, momentum=0.9, method="dinov2").parts
        == DinoConfig(out_dim=8, momentum=0.9, patch_weight=1.0, koleo_weight=0.1, centering="sinkhorn", separate_heads=True).parts
    )
    assert small_task("dino", koleo_weight=0.1)(batch(0), Progress(0, TOTAL, 2)).metrics.keys() >= {"koleo", "view_loss"}
