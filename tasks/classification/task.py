"""Supervised image classification."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.classification.config import ClassificationConfig
from tasks.classification.losses import binary_cross_entropy, divergence
from trainer.labels import Labelled, best_five, competitors, label_scores
from trainer.task import Batch, Progress, StepOutput, Task


class Classification(Task):
    main_metric = "val/top1"
    higher_is_better = True

    def __init__(self, model: nn.Module, cfg: ClassificationConfig, classes: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.cfg = cfg
        self.follower: nn.Module | None = None  # MESA's average of the network
        if cfg.mesa_weight:
            self.follower = copy.deepcopy(model).requires_grad_(False)
            self.held = (self.follower,)
        self.classes = list(classes)
        self.tta = cfg.tta
        self.competing: Tensor | None = None  # [C] bool; None = all classes

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        labels = batch["label"]  # [N]
        logits = self.model(batch["image"])  # [N, C]
        # Mixup and cutmix leave soft targets [N, C] beside the labels; accuracy is then against the stronger partner.
        target = batch.get("target", labels)
        loss = self.loss(logits, target)
        mesa = self.mesa(batch, logits, progress)
        if mesa is not None:
            loss = loss + self.cfg.mesa_weight * mesa
        with torch.no_grad():
            hard = labels if target is labels else target.argmax(1)
            top1 = (logits.argmax(1) == hard).float().mean()
        return StepOutput(loss, {"top1": top1} if mesa is None else {"top1": top1, "loss_mesa": mesa.detach()})

    def mesa(self, batch: Batch, logits: Tensor, progress: Progress) -> Tensor | None:
        """[] how far the predictions are from those of the network's average; 0 until it begins, None where it is off."""
        if self.follower is None:
            return None
        if progress.epoch < self.cfg.mesa_start:
            return logits.new_zeros(())
        with torch.no_grad():
            reference = self.follower(batch["image"])  # [N, C]
        return divergence(logits, reference, self.cfg.mesa_temperature)

    def after_update(self, progress: Progress) -> None:
        if self.follower is None:
            return
        # Until it is needed it is the network itself: an average that began with the first weights would be of no use.
        decay = self.cfg.mesa_decay if progress.epoch >= self.cfg.mesa_start else 0.0
        own, theirs = self.model.state_dict(), self.follower.state_dict()
        with torch.no_grad():
            for name, average in theirs.items():
                if average.is_floating_point():
                    average.lerp_(own[name], 1 - decay)
                else:
                    average.copy_(own[name])

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        cfg = self.cfg
        if cfg.loss == "bce":  # in fp32: small probabilities of many classes vanish in 16 bits
            return binary_cross_entropy(
                logits.float(), target, smoothing=cfg.label_smoothing, threshold=cfg.bce_threshold, total=cfg.bce_sum
            )
        return F.cross_entropy(logits, target, label_smoothing=cfg.label_smoothing)

    def evaluator(self) -> Labelled:
        return Labelled(self.scores, self.classes)

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """Loss, accuracies and details of each image, [N] each."""
        return label_scores(self.logits(batch["image"]), batch, self.competing)

    def logits(self, images: Tensor) -> Tensor:
        """Log-probabilities up to a constant, [N, C]: the network's own, or those of the mean over test-time views."""
        views = views_of(images, self.tta)
        if len(views) == 1:
            return self.model(images)
        return torch.stack([self.model(view).float().log_softmax(1) for view in views]).logsumexp(0)

    def restrict(self, classes: Sequence[int]) -> None:
        self.competing = competitors(classes, len(self.classes), next(self.model.parameters()).device)

    def predict(self, batch: Batch) -> list[list[dict[str, Any]]]:
        return best_five(self.logits(batch["image"]), self.classes, self.competing)


def views_of(images: Tensor, kind: str) -> list[Tensor]:
    """Views of images [N, C, S, S], of the same size, whose predictions are averaged."""
    if kind == "none":
        return [images]
    views = [images]
    if kind == "crops":
        size = images.shape[-1]
        larger = F.interpolate(images, size=round(size * 8 / 7), mode="bilinear", align_corners=False)
        rest = larger.shape[-1] - size
        views += [larger[..., y : y + size, x : x + size] for y, x in ((0, 0), (0, rest), (rest, 0), (rest, rest), (rest // 2, rest // 2))]
    return [turned for view in views for turned in (view, view.flip(-1))]
