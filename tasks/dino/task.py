"""DINO: self-distillation between a student and the average of its past, the teacher (arXiv:2104.14294)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.dino.config import DinoConfig
from tasks.dino.evaluation import Labelled, Unlabelled
from tasks.dino.head import Head
from tasks.dino.loss import entropy, sharpened, view_loss
from tasks.dino.schedule import teacher_momentum, teacher_temperature
from trainer.evaluation import all_sum
from trainer.task import Batch, Progress, StepOutput, Task


class Network(nn.Module):
    """A backbone and what projects its features."""

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head


class Dino(Task):
    """What is evaluated and exported is the teacher's backbone: it is better than the student's at any time (sec. 5.2)."""

    main_metric = "val/knn_top1"
    higher_is_better = True

    center: Tensor  # [K] of the teacher's scores
    spread: Tensor  # [] of the teacher's features in the last step

    def __init__(
        self, backbone: nn.Module, width: int, cfg: DinoConfig, *, num_classes: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.cfg, self.width, self.num_classes = cfg, width, num_classes
        self.mean, self.std = mean, std
        head = Head(
            width, cfg.out_dim, hidden_dim=cfg.hidden_dim, bottleneck_dim=cfg.bottleneck_dim, layers=cfg.head_layers,
            train_lengths=not cfg.norm_last_layer,
        )  # fmt: skip
        self.student = Network(backbone, head)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(cfg.out_dim))
        self.register_buffer("spread", torch.ones(()))
        self.sums: list[Tensor] = []  # of this step's micro-batches, [K + 2 D + 1] each: scores, features, their squares, how many

    def network(self) -> nn.Module:
        return self.teacher.backbone

    def compiled_parts(self) -> Sequence[nn.Module]:
        return [self.student.backbone, self.teacher.backbone]

    def train(self, mode: bool = True) -> Dino:
        """The teacher draws no noise. Its batch normalisation uses the batch's own statistics, as the original's does."""
        super().train(mode)
        for part in self.teacher.modules():
            part.training = mode and isinstance(part, nn.modules.batchnorm._BatchNorm)
        return self

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        views = views_by_size(batch)
        images = batch["image"].shape[0]
        with torch.no_grad():
            features = self.teacher.backbone(views[0][: 2 * images])  # [2 N, D]
            target = self.teacher.head(features)  # [2 N, K]
        scores = self.student.head(torch.cat([self.student.backbone(v) for v in views]))  # [V N, K]
        with torch.autocast(scores.device.type, enabled=False):
            self._remember(target, features)
            teacher = sharpened(target, self.center, self.temperature(progress)).unflatten(0, (2, images))
            loss = view_loss(scores.unflatten(0, (-1, images)), teacher, self.cfg.student_temperature)
        return StepOutput(loss, self._signs(teacher, progress))

    def temperature(self, progress: Progress) -> float:
        """The teacher's."""
        cfg = self.cfg
        epoch = int(progress.step // progress.steps_per_epoch)
        return teacher_temperature(cfg.warmup_teacher_temperature, cfg.teacher_temperature, cfg.warmup_teacher_temperature_epochs, epoch)

    def _signs(self, teacher: Tensor, progress: Progress) -> dict[str, Tensor]:
        """What shows a collapse, and where the schedules are. Constants on the device, so that logging waits for nothing."""
        constant = self.center.new_tensor
        return {
            "teacher_entropy": entropy(teacher).mean(),  # nats; log(out_dim) where all prototypes are alike
            "center_norm": self.center.norm(),
            "feature_std": self.spread.clone(),
            "teacher_momentum": constant(teacher_momentum(self.cfg.momentum, progress.step, progress.total)),
            "teacher_temperature": constant(self.temperature(progress)),
        }

    @torch.no_grad()
    def _remember(self, target: Tensor, features: Tensor) -> None:
        unit = F.normalize(features.float(), dim=-1)
        counts = target.new_full((1,), target.shape[0], dtype=torch.float32)
        self.sums.append(torch.cat([target.float().sum(0), unit.sum(0), unit.square().sum(0), counts]))

    def before_update(self, progress: Progress) -> None:
        """The centre moves by the whole step's scores, of all ranks and micro-batches (eq. 4). Here, so that a step that is
        skipped for a bad gradient leaves it alone as it does all buffers."""
        sums = all_sum(torch.stack(self.sums).sum(0))
        self.sums = []
        scores, first, second, count = sums.split([self.cfg.out_dim, self.width, self.width, 1])
        self.center.lerp_(scores / count, 1 - self.cfg.center_momentum)
        self.spread.copy_(spread_of(first, second, count))
        if progress.step < self.cfg.freeze_last_layer_epochs * progress.steps_per_epoch:
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None  # without a gradient an optimizer does not decay it either

    @torch.no_grad()
    def after_update(self, progress: Progress) -> None:
        momentum = teacher_momentum(self.cfg.momentum, progress.step, progress.total)
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)

    def evaluator(self) -> Unlabelled:
        return Labelled(self) if self.num_classes else Unlabelled(self)

    def probabilities(self, features: Tensor) -> Tensor:
        """What the teacher would say of features [N, D] seen in validation, [N, K], at the temperature it ends with."""
        with torch.autocast(features.device.type, enabled=False):
            return sharpened(self.teacher.head(features.float()), self.center, self.cfg.teacher_temperature)


def views_by_size(batch: Batch) -> list[Tensor]:
    """All views of one size in one batch, view by view, the large ones first: [V N, C, S, S] each."""
    large, small = batch["image"], batch.get("local")  # [N, 2, C, S, S], [N, V, C, s, s]
    if small is not None and small.shape[2:] == large.shape[2:]:
        large, small = torch.cat([large, small], dim=1), None
    return [views.transpose(0, 1).flatten(0, 1) for views in (large, small) if views is not None]


def spread_of(first: Tensor, second: Tensor, count: Any) -> Tensor:
    """Standard deviation of unit vectors [D] from their sums and sums of squares, averaged over dimensions, [].

    1 where they point everywhere alike, 0 where all are the same (arXiv:2011.10566, sec. 4.1, there without the factor sqrt(D)).
    """
    variance = (second / count - (first / count).square()).clamp_min(0)
    return variance.sqrt().mean() * first.shape[0] ** 0.5
