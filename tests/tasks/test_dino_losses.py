"""DINO's formulas against an independent implementation (lightly's), and its schedules against the paper's."""

from __future__ import annotations

import math
from typing import Any

import lightly.loss
import numpy as np
import pytest
import torch

from tasks.dino.config import DinoConfig
from tasks.dino.head import Head, Prototypes
from tasks.dino.loss import sharpened, view_loss
from tasks.dino.schedule import teacher_momentum, teacher_temperature
from tasks.dino.task import Dino, views_by_size
from trainer.launch.compose import compose_run
from trainer.task import Progress

TOTAL, EPOCH = 10, 2


class Named(torch.nn.Module):
    """Features that are looked up: what a test decides, whatever the pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3 * 4 * 4, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


def config(**changes) -> DinoConfig:
    values = {"out_dim": 32, "momentum": 0.9, "hidden_dim": 24, "bottleneck_dim": 12, "warmup_teacher_temperature": 0.04, "teacher_temperature": 0.07,
              "warmup_teacher_temperature_epochs": 3}  # fmt: skip
    return DinoConfig(**{**values, **changes})


def small_task(**changes) -> Dino:
    torch.manual_seed(0)
    return Dino(Named(16), 16, config(**changes), num_classes=4, mean=[0.5], std=[0.2])


def batch(seed: int, images: int = 6, local: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"image": torch.randn(images, 2, 3, 16, 16, generator=draw), "local": torch.randn(images, local, 3, 8, 8, generator=draw)}


def test_loss_and_centre_are_lightlys_over_ten_steps():
    """Loss, gradients and centre, with a temperature that warms up and a student that moves."""
    task = small_task()
    theirs = lightly.loss.DINOLoss(32, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=3, student_temp=0.1)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    for step in range(TOTAL):
        progress, views = Progress(step, TOTAL, EPOCH), batch(step)
        large, small = views["image"].unbind(1), views["local"].unbind(1)
        with torch.no_grad():
            target = [task.teacher.head(task.teacher.backbone(v)) for v in large]
        scores = [task.student.head(task.student.backbone(v)) for v in (*large, *small)]
        expected = theirs(target, scores, epoch=step // EPOCH)
        expected.backward()
        wanted = [p.grad.clone() for p in task.parameters() if p.grad is not None]
        optimizer.zero_grad()

        loss = task(views, progress).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        found = [p.grad for p in task.parameters() if p.grad is not None]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        task.before_update(progress)
        torch.testing.assert_close(task.center, theirs.center.view(-1), atol=1e-5, rtol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        task.after_update(progress)


def test_micro_batches_move_the_centre_as_the_whole_batch_does():
    whole, cut, views = small_task(), small_task(), batch(0)
    progress = Progress(0, TOTAL, EPOCH)
    whole(views, progress)
    for i in range(2):
        cut({name: v[3 * i : 3 * i + 3] for name, v in views.items()}, progress)
    whole.before_update(progress)
    cut.before_update(progress)
    torch.testing.assert_close(whole.center, cut.center)
    torch.testing.assert_close(whole.spread, cut.spread)


def test_one_forward_a_size_gives_the_loss_of_one_forward_a_view():
    task, views = small_task(), batch(1)
    assert [v.shape[0] for v in views_by_size(views)] == [12, 18]
    grouped = task(views, Progress(0, TOTAL, EPOCH)).loss
    scores = torch.stack([task.student.head(task.student.backbone(v)) for v in (*views["image"].unbind(1), *views["local"].unbind(1))])
    teacher = torch.stack([task.teacher.head(task.teacher.backbone(v)) for v in views["image"].unbind(1)])
    apart = view_loss(scores, sharpened(teacher, task.center, 0.04), 0.1)
    torch.testing.assert_close(grouped, apart, atol=1e-5, rtol=1e-5)
    views["local"] = torch.randn(6, 3, 3, 16, 16)
    assert [v.shape[0] for v in views_by_size(views)] == [30], "views of one size go together, local or not"


# The paper's schedules, as its code lays them out: arrays over all steps or epochs of a run.


@pytest.mark.parametrize("step", [0, 500, 999])
def test_momentum_is_the_papers(step):
    array = 1 + 0.5 * (0.996 - 1) * (1 + np.cos(np.pi * np.arange(1000) / 1000))
    assert teacher_momentum(0.996, step, 1000) == pytest.approx(array[step], abs=1e-12)


@pytest.mark.parametrize("epoch", [0, 14, 15, 29, 30, 99])
def test_temperature_is_the_papers(epoch):
    array = np.concatenate([np.linspace(0.04, 0.07, 30), np.ones(70) * 0.07])
    assert teacher_temperature(0.04, 0.07, 30, epoch) == pytest.approx(array[epoch], abs=1e-12)
    assert teacher_temperature(0.03, 0.07, 1, 0) == 0.03
    assert teacher_temperature(0.03, 0.07, 0, 0) == 0.07


@pytest.mark.parametrize("step", [0, 5000, 9999])
def test_weight_decay_and_rate_are_the_papers(step):
    run = compose_run("experiment=dino_vit_s16", "dataset=synthetic")
    total, epoch = 10_000, 100
    decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * np.arange(total) / total))
    assert run.optimizer.weight_decay * run.optimizer.decay_factor(step / total) == pytest.approx(decay[step])
    peak, warmup = 0.0005 * run.loop.batch_size / 256, 10 * epoch
    cosine = 1e-6 + 0.5 * (peak - 1e-6) * (1 + np.cos(np.pi * np.arange(total - warmup) / (total - warmup)))
    rates = np.concatenate([np.linspace(0, peak, warmup), cosine])
    ours = run.optimizer.scaled_lr(run.loop.batch_size) * run.scheduler.build(total, epoch).factor(step)
    assert ours == pytest.approx(rates[step], rel=1e-6, abs=1e-12)


# The head


def test_prototypes_are_torchs_weight_normed_layer():
    torch.manual_seed(0)
    ours = Prototypes(8, 5, train_lengths=True)
    theirs: Any = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 5, bias=False))
    theirs.parametrizations.weight.original0.data = ours.weight_g.data.clone()
    theirs.parametrizations.weight.original1.data = ours.weight_v.data.clone()
    x = torch.randn(7, 8)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.weight_v.grad, theirs.parametrizations.weight.original1.grad)
    torch.testing.assert_close(ours.weight_g.grad, theirs.parametrizations.weight.original0.grad)


def test_the_head_is_what_the_paper_says():
    head = Head(16, 32, hidden_dim=24, bottleneck_dim=12, layers=3, train_lengths=False)
    assert [tuple(p.shape) for p in head.mlp.parameters()] == [(24, 16), (24,), (24, 24), (24,), (12, 24), (12,)]
    assert not head.last_layer.weight_g.requires_grad
    scores = head(torch.randn(100, 16))
    assert scores.abs().max() <= 1 + 1e-5, "cosines: unit vectors times unit prototypes"
    assert math.isclose(next(head.mlp.parameters()).std().item(), 0.02, rel_tol=0.2)


def test_the_last_layer_rests_and_the_teacher_follows():
    task = small_task(freeze_last_layer_epochs=1, norm_last_layer=False)
    for step in range(3):
        progress = Progress(step, TOTAL, EPOCH)
        task(batch(step), progress).loss.backward()
        task.before_update(progress)
        rests = [p.grad is None for p in task.student.head.last_layer.parameters()]
        assert rests == [step < EPOCH] * 2
        before = [p.clone() for p in task.teacher.parameters()]
        with torch.no_grad():
            for p in task.student.parameters():
                p.add_(1.0)
        task.after_update(progress)
        kept = teacher_momentum(0.9, step, TOTAL)
        for old, new, student in zip(before, task.teacher.parameters(), task.student.parameters(), strict=True):
            torch.testing.assert_close(new, kept * old + (1 - kept) * student)
    assert not any(p.requires_grad for p in task.teacher.parameters())


def test_the_last_layer_rests_once_in_a_run_of_stages():
    """A second stage of longer epochs, in steps, than the first was."""
    task = small_task(freeze_last_layer_epochs=1)
    progress = Progress(EPOCH, TOTAL, 3 * EPOCH, stage_start=EPOCH, epochs_before=1)
    task(batch(0), progress).loss.backward()
    task.before_update(progress)
    assert task.student.head.last_layer.weight_v.grad is not None


def test_the_teacher_draws_no_noise_and_normalises_by_the_batch():
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(Named(16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5))
    task = Dino(backbone, 16, config(), num_classes=0, mean=[0.5], std=[0.2]).train()
    x = batch(0)["image"][:, 0]
    torch.testing.assert_close(task.teacher.backbone(x), task.teacher.backbone(x))
    assert (task.student.backbone(x) == 0).any(), "the student's dropout is on"
    assert task.teacher.backbone[1].training
    assert not any(part.training for part in task.eval().modules())
