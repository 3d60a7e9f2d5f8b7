"""Binary cross-entropy against timm's, on labels, mixed targets, smoothing and thresholds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from tasks.classification.losses import binary_cross_entropy
from trainer.config.fields import field_problems
from trainer.launch.compose import checked, compose

N, C = 6, 5


def logits() -> torch.Tensor:
    return torch.randn(N, C, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_on_labels_it_is_timms(smoothing: float, threshold: float | None, total: bool) -> None:
    labels = torch.arange(N) % C
    theirs = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold, sum_classes=total)
    x = logits()
    ours = binary_cross_entropy(x, labels, smoothing=smoothing, threshold=threshold, total=total)
    torch.testing.assert_close(ours, theirs(x, labels))


def test_on_mixed_targets_a_threshold_makes_both_classes_count() -> None:
    target = torch.zeros(N, C)
    target[:, 0], target[:, 1] = 0.7, 0.3
    x = logits()
    torch.testing.assert_close(binary_cross_entropy(x, target), BinaryCrossEntropy(smoothing=0)(x, target))
    both = (target > 0).float()
    torch.testing.assert_close(binary_cross_entropy(x, target, threshold=0.2), F.binary_cross_entropy_with_logits(x, both))


def keys(*overrides: str) -> set[str]:
    run, problems = checked(compose(overrides))
    assert run is not None
    return {problem.key for problem in [*problems, *field_problems(run)]}


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["task.bce_threshold=0.2"], "task.bce_threshold"),
        (["task.bce_sum=true"], "task.bce_sum"),
        (["task.loss=hinge"], "task.loss"),
        (["task.loss=bce", "task.bce_threshold=1.5"], "task.bce_threshold"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], key: Any) -> None:
    assert keys(*overrides) == {key}


def test_mesa_follows_the_network_and_pulls_towards_its_average() -> None:
    from tasks.classification.config import ClassificationConfig
    from tasks.classification.task import Classification
    from trainer.task import Progress

    torch.manual_seed(0)
    cfg = ClassificationConfig(mesa_weight=2.0, mesa_start=1, mesa_decay=0.9, mesa_temperature=5.0)
    task = Classification(torch.nn.Linear(4, C), cfg, classes=list("abcde"))
    task.train()
    follower = task.follower
    assert follower is not None and not follower.training and not any(p.requires_grad for p in follower.parameters())
    batch = {"image": torch.randn(N, 4), "label": torch.arange(N) % C}
    early, late = Progress(3, 100, 10), Progress(20, 100, 10)
    expected = None
    for progress in (early, late):
        before = follower.weight.clone()  # type: ignore[union-attr, operator]
        with torch.no_grad():
            task.model.weight.add_(1.0)  # type: ignore[operator, union-attr]
        task.after_update(progress)
        expected = task.model.weight if progress is early else 0.9 * before + 0.1 * task.model.weight  # type: ignore[operator, union-attr]
        torch.testing.assert_close(follower.weight, expected.detach())  # type: ignore[union-attr]
    plain = F.cross_entropy(task.model(batch["image"]), batch["label"])
    torch.testing.assert_close(task.training_step(batch, early).loss, plain)
    p, q = (net(batch["image"]).div(5).softmax(1) for net in (task.model, follower))
    kl = (q * (q.log() - p.log())).sum(1).mean()
    torch.testing.assert_close(task.training_step(batch, late).loss, plain + 2.0 * kl)
