"""Supervised image classification with softmax cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.classification.config import ClassificationConfig
from trainer.evaluation import Mean, scores_of_logits
from trainer.task import Batch, Progress, StepOutput, Task


class Classification(Task):
    main_metric = "val/top1"
    higher_is_better = True

    def __init__(self, model: nn.Module, cfg: ClassificationConfig, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = cfg.label_smoothing
        self.num_classes = num_classes

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        labels = batch["label"]  # [N]
        logits = self.model(batch["image"])  # [N, C]
        # Mixup and cutmix leave soft targets [N, C] beside the labels; accuracy is then against the stronger partner.
        target = batch.get("target", labels)
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        with torch.no_grad():
            hard = labels if target is labels else target.argmax(1)
            top1 = (logits.argmax(1) == hard).float().mean()
        return StepOutput(loss, {"top1": top1})

    def evaluator(self) -> Mean:
        return Mean(self.scores)

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """Loss and accuracies of each image, [N] each."""
        return scores_of_logits(self.model(batch["image"]), batch["label"])
