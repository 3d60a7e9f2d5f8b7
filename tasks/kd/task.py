"""Knowledge distillation: a student, what its teachers say of the same images, and a loss between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.kd import losses
from tasks.kd.config import KdConfig
from trainer.evaluation import Mean
from trainer.labels import Labelled, best_five, competitors, label_scores
from trainer.probe import Asked
from trainer.task import Batch, Progress, StepOutput, Task

if TYPE_CHECKING:
    from tasks.kd.teachers import Answer, Teacher


class Said(NamedTuple):
    """What the student says of images."""

    logits: Tensor  # [N, C]
    to_teacher: Tensor  # [N, C] of the head that listens to the teacher: the distillation token's, or the same
    features: Tensor | None  # [N, D] where somebody asks for them


class Kd(Task):
    def __init__(
        self, model: nn.Module, cfg: KdConfig, teachers: Sequence[Teacher], classes: Sequence[str], *, student_width: int = 0, labelled: bool = True
    ) -> None:  # fmt: skip
        """`classes`: none where features are all there is. `labelled`: whether the data say which of them an image is of."""
        super().__init__()
        self.model = model
        self.cfg = cfg
        self.classes, self.labelled = list(classes), labelled
        self.competing: Tensor | None = None  # [C] bool; None = all classes
        self.main_metric, self.higher_is_better = ("val/top1", True) if labelled else ("val/loss", False)
        # In a plain list: what is no part of this module is neither saved nor averaged, and DDP does not see it.
        self.teachers = list(teachers)
        self.asked = (Asked(model),)
        widths = [t.width for t in teachers] if cfg.uses_features else []
        self.projections = nn.ModuleList([nn.Identity() if w == student_width else nn.Linear(student_width, w) for w in widths])
        if cfg.method == "deit":
            model.set_distilled_training(True)  # type: ignore[operator]
        # With one voice alone in the loss, the part of the network that only the other one speaks to gets no gradient.
        self.find_unused_parameters = cfg.weight in (0.0, 1.0) and cfg.method in ("deit", "embedding")

    def never_trained(self) -> Sequence[str]:
        """Rebuilt to be used, a student has no teachers to project its features for."""
        return () if self.teachers else ("projections",)

    def compiled_parts(self) -> Sequence[nn.Module]:
        """What is called: with features, it is not the networks' own forward passes. TorchScript is compiled already, in its own way."""
        ours = self.asked[0] if self.cfg.uses_features else self.model
        return [ours, *(t.called for t in self.teachers if not isinstance(t.network, torch.jit.ScriptModule))]

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        said, weight = self._student(batch["image"]), self.cfg.weight
        loss, metrics = torch.zeros((), device=said.logits.device), {}
        if weight < 1:
            # Mixup and cutmix leave soft targets [N, C] beside the labels.
            target = batch.get("target", batch["label"])
            labels = F.cross_entropy(said.logits.float(), target, label_smoothing=self.cfg.label_smoothing)
            loss, metrics["loss_labels"] = (1 - weight) * labels, labels.detach()
        if self.teachers:
            taught = self._weighted(said, batch["image"]).mean()
            loss, metrics["loss_teacher"] = loss + taught, taught.detach()
        if self.labelled:
            truth = batch["target"].argmax(1) if "target" in batch else batch["label"]
            metrics["top1"] = (said.logits.detach().argmax(1) == truth).float().mean()
        return StepOutput(loss, metrics)

    def _student(self, images: Tensor) -> Said:
        features, output = self.asked[0](images) if self.cfg.uses_features else (None, self.model(images))
        logits, to_teacher = output if isinstance(output, tuple) else (output, output)
        return Said(logits, to_teacher, features)

    def _weighted(self, said: Said, images: Tensor) -> Tensor:
        """The teachers' part of the loss of each image, [N], with its weights; the mean over teachers."""
        parts = []
        for i, teacher in enumerate(self.teachers):
            answer = teacher(images)
            part = self.cfg.weight * self._distance(said, answer, i) if self.cfg.weight > 0 else 0.0
            if self.cfg.feature_weight > 0:
                part = part + self.cfg.feature_weight * self._apart(said, answer, i)
            parts.append(part)
        return torch.stack(parts).mean(0)

    def _distance(self, said: Said, answer: Answer, i: int) -> Tensor:
        """From teacher `i` by the method's own measure, [N]."""
        if self.cfg.method == "embedding":
            return self._apart(said, answer, i)
        assert answer.logits is not None
        if self.cfg.method == "soft":
            return losses.soft(said.to_teacher, answer.logits, self.cfg.temperature)
        return losses.hard(said.to_teacher, answer.logits)

    def _apart(self, said: Said, answer: Answer, i: int) -> Tensor:
        """Between the features of both, [N]."""
        assert said.features is not None
        assert answer.features is not None
        return losses.embedding(self.projections[i](said.features), answer.features, normalize=self.cfg.normalize_features)

    def evaluator(self) -> Mean:
        return Labelled(self._scores, self.classes) if self.labelled else Mean(self._distances)

    def _scores(self, batch: Batch) -> dict[str, Tensor]:
        return label_scores(self.model(batch["image"]), batch, self.competing)

    def _distances(self, batch: Batch) -> dict[str, Tensor]:
        """Without labels: how far the student is from its teachers, for each image."""
        return {"loss": self._weighted(self._student(batch["image"]), batch["image"])} if self.teachers else {}

    def restrict(self, classes: Sequence[int]) -> None:
        self.competing = competitors(classes, len(self.classes), next(self.model.parameters()).device)

    def predict(self, batch: Batch) -> Sequence[Sequence[Mapping[str, Any]]]:
        return best_five(self.model(batch["image"]), self.classes, self.competing)
