"""DINO, iBOT and DINOv2: self-distillation between a student and the average of its past, the teacher.

Sources: arXiv:2104.14294 (DINO), arXiv:2111.07832 (iBOT: hidden patches too), arXiv:2304.07193 (DINOv2: balanced assignments,
features kept apart, a head for patches).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.dino.across_ranks import balanced, koleo
from tasks.dino.config import DinoConfig
from tasks.dino.evaluation import Labelled, Unlabelled
from tasks.dino.head import Head
from tasks.dino.loss import entropy, patch_loss, sharpened, view_loss
from tasks.dino.network import MaskToken, Network
from tasks.dino.schedule import teacher_momentum, teacher_temperature
from trainer.data.augment import Augmentation
from trainer.evaluation import all_sum
from trainer.task import Batch, Progress, StepOutput, Task


class Dino(Task):
    """What is evaluated and exported is the teacher's backbone: it is better than the student's at any time (DINO, sec. 5.2)."""

    main_metric = "val/knn_top1"
    higher_is_better = True

    center: Tensor  # [K] of the teacher's scores of views
    patch_center: Tensor  # [K] of those of hidden patches
    spread: Tensor  # [] of the teacher's features in the last step

    def __init__(
        self, backbone: nn.Module, width: int, cfg: DinoConfig, *, num_classes: int, mean: Sequence[float], std: Sequence[float],
        views: Augmentation | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.cfg, self.parts, self.width, self.num_classes = cfg, cfg.parts, width, num_classes
        self.mean, self.std, self.views = mean, std, views
        separate = self.parts.patch_weight > 0 and self.parts.separate_heads
        self.student = Network(backbone, self._head(), self._head() if separate else None)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(cfg.out_dim))
        self.register_buffer("spread", torch.ones(()))
        if self.parts.patch_weight:
            self.mask_token = MaskToken(backbone)
            self.register_buffer("patch_center", torch.zeros(cfg.out_dim))
        self.sums: list[Tensor] = []  # one of each micro-batch of this step, see `_remember`

    def _head(self) -> Head:
        cfg = self.cfg
        return Head(
            self.width, cfg.out_dim, hidden_dim=cfg.hidden_dim, bottleneck_dim=cfg.bottleneck_dim, layers=cfg.head_layers,
            train_lengths=not cfg.norm_last_layer, batch_norm=cfg.head_batch_norm,
        )  # fmt: skip

    def augmentation(self, *, train: bool) -> Augmentation | None:
        return self.views if train else None

    def network(self) -> nn.Module:
        return self.teacher.backbone

    def compiled_parts(self) -> Sequence[nn.Module]:
        networks = (self.student.backbone, self.teacher.backbone)
        # Where patches are looked at, it is not the network's own forward that runs, but the parts of it.
        return [block for network in networks for block in network.blocks] if self.parts.patch_weight else networks

    def train(self, mode: bool = True) -> Dino:
        """The teacher draws no noise. Its batch normalisation uses the batch's own statistics, as the original's does."""
        super().train(mode)
        for part in self.teacher.modules():
            part.training = mode and isinstance(part, nn.modules.batchnorm._BatchNorm)
        return self

    # --- a step ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        if self.parts.patch_weight:
            return self._with_patches(batch, progress)
        views, images = views_by_size(batch), batch["image"].shape[0]
        with torch.no_grad():
            features = self.teacher.backbone(views[0][: 2 * images])  # [2 N, D]
            said = self.teacher.head(features)  # [2 N, K]
        seen = [self.student.backbone(v) for v in views]
        return self._compared(seen, features, said, images, progress)

    def _with_patches(self, batch: Batch, progress: Progress) -> StepOutput:
        """The student sees the large views with some patches hidden, and says what the teacher says of those too."""
        large, *small = (v.transpose(0, 1).flatten(0, 1) for v in (batch["image"], batch.get("local")) if v is not None)
        images, hidden = batch["image"].shape[0], batch["mask"].transpose(0, 1).flatten(0, 1).flatten(1)  # [2 N, T]
        with torch.no_grad():
            features, patches = self.teacher.tokens(large)
            said, said_of_patches = self.teacher.head(features), self.teacher.patch_scores(patches[hidden])  # [M, K]
        with self.mask_token.hiding(hidden):
            pooled, patches = self.student.tokens(large)
        output = self._compared([pooled, *map(self.student.backbone, small)], features, said, images, progress, said_of_patches)
        scores = self.student.patch_scores(patches[hidden])  # [M, K]
        with torch.autocast(scores.device.type, enabled=False):
            target = self._answers(said_of_patches, self.patch_center, progress)
            weight = (1 / hidden.sum(1, keepdim=True).clamp(min=1)).expand_as(hidden)[hidden]
            loss = patch_loss(scores, target, weight, self.cfg.student_temperature, len(hidden))
        output.metrics = {"patch_loss": loss.detach(), **output.metrics}
        output.loss = output.loss + self.parts.patch_weight * loss
        return output

    def _compared(
        self, seen: list[Tensor], features: Tensor, said: Tensor, images: int, progress: Progress, of_patches: Tensor | None = None
    ) -> StepOutput:
        """The student's features of all views against what the teacher said of the large ones."""
        scores = self.student.head(torch.cat(seen))  # [V N, K]
        with torch.autocast(scores.device.type, enabled=False):
            self._remember(said, features, of_patches)
            answers = self._answers(said, self.center, progress).unflatten(0, (2, images))
            loss = view_loss(scores.unflatten(0, (-1, images)), answers, self.cfg.student_temperature)
            metrics = self._signs(answers, progress)
            if self.parts.koleo_weight:
                apart = koleo(seen[0][:images]) + koleo(seen[0][images : 2 * images])  # view by view
                metrics = {"view_loss": loss.detach(), "koleo": apart.detach(), **metrics}
                loss = loss + self.parts.koleo_weight * apart
        return StepOutput(loss, metrics)

    def _answers(self, scores: Tensor, center: Tensor, progress: Progress) -> Tensor:
        """The teacher's probabilities [N, K]."""
        if self.parts.centering == "sinkhorn":
            return balanced(scores, self.temperature(progress))
        return sharpened(scores, center, self.temperature(progress))

    def temperature(self, progress: Progress) -> float:
        """The teacher's."""
        cfg, epoch = self.cfg, int(progress.epoch)  # of the run, whatever stage it is in
        return teacher_temperature(cfg.warmup_teacher_temperature, cfg.teacher_temperature, cfg.warmup_teacher_temperature_epochs, epoch)

    def _signs(self, answers: Tensor, progress: Progress) -> dict[str, Tensor]:
        """What shows a collapse, and where the schedules are. All stay on the device, so that logging waits for nothing."""
        constant = self.center.new_tensor
        return {
            "teacher_entropy": entropy(answers).mean(),  # nats; log(out_dim) where all prototypes are alike
            "center_norm": self.center.norm(),
            "feature_std": self.spread.clone(),
            "teacher_momentum": constant(teacher_momentum(self.cfg.momentum, progress.step, progress.total)),
            "teacher_temperature": constant(self.temperature(progress)),
        }

    # --- what moves between steps -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _remember(self, said: Tensor, features: Tensor, of_patches: Tensor | None) -> None:
        unit = F.normalize(features.float(), dim=-1)
        sums = [said.float().sum(0), unit.sum(0), unit.square().sum(0), said.new_full((1,), len(said), dtype=torch.float32)]
        if of_patches is not None:
            sums += [of_patches.float().sum(0), said.new_full((1,), len(of_patches), dtype=torch.float32)]
        self.sums.append(torch.cat(sums))

    def before_update(self, progress: Progress) -> None:
        """The centres move by the whole step's scores, of all ranks and micro-batches (DINO, eq. 4). Here, so that a step that is
        skipped for a bad gradient leaves them alone as it does all buffers."""
        sums, out_dim = all_sum(torch.stack(self.sums).sum(0)), self.cfg.out_dim
        self.sums = []
        scores, first, second, count, *patches = sums.split(
            [out_dim, self.width, self.width, 1, *[out_dim, 1] * ("patch_center" in self._buffers)]
        )
        self.center.lerp_(scores / count, 1 - self.cfg.center_momentum)
        self.spread.copy_(spread_of(first, second, count))
        if patches:
            scores, count = patches
            moved = self.patch_center.lerp(scores / count.clamp(min=1), 1 - self.cfg.center_momentum)
            torch.where(count > 0, moved, self.patch_center, out=self.patch_center)  # a batch may have no hidden patch
        if progress.epoch < self.cfg.freeze_last_layer_epochs:
            for parameter in (p for layer in self.student.last_layers for p in layer.parameters()):
                parameter.grad = None  # without a gradient an optimizer does not decay it either

    @torch.no_grad()
    def after_update(self, progress: Progress) -> None:
        momentum = teacher_momentum(self.cfg.momentum, progress.step, progress.total)
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)

    # --- validation -------------------------------------------------------------------------------------------------------

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
