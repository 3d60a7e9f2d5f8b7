"""Supervised image classification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.classification.config import ClassificationConfig
from tasks.classification.losses import binary_cross_entropy
from trainer.evaluation import Mean
from trainer.task import Batch, Progress, StepOutput, Task


class Classification(Task):
    main_metric = "val/top1"
    higher_is_better = True

    def __init__(self, model: nn.Module, cfg: ClassificationConfig, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.cfg = cfg
        self.num_classes = num_classes

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        labels = batch["label"]  # [N]
        logits = self.model(batch["image"])  # [N, C]
        # Mixup and cutmix leave soft targets [N, C] beside the labels; accuracy is then against the stronger partner.
        target = batch.get("target", labels)
        loss = self.loss(logits, target)
        with torch.no_grad():
            hard = labels if target is labels else target.argmax(1)
            top1 = (logits.argmax(1) == hard).float().mean()
        return StepOutput(loss, {"top1": top1})

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        cfg = self.cfg
        if cfg.loss == "bce":  # in fp32: small probabilities of many classes vanish in 16 bits
            return binary_cross_entropy(
                logits.float(), target, smoothing=cfg.label_smoothing, threshold=cfg.bce_threshold, total=cfg.bce_sum
            )
        return F.cross_entropy(logits, target, label_smoothing=cfg.label_smoothing)

    def evaluator(self) -> Mean:
        return Mean(self.scores)

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """Loss and accuracies of each image, [N] each."""
        labels = batch["label"]
        logits = self.model(batch["image"]).float()  # [N, C]
        ranked = logits.topk(min(5, self.num_classes), dim=1).indices  # [N, 5]
        hits = ranked == labels.unsqueeze(1)
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "top1": hits[:, 0].float(),
            "top5": hits.any(1).float(),
        }
