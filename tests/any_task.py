"""A task for tests that learns a number from whatever a sample has, so that every dataset can be trained on before its own task exists."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.config import RunConfig, TaskConfig
from trainer.evaluation import Mean
from trainer.task import Batch, DataInfo, Progress, StepOutput, Task

KILL = "TRAINYARD_TEST_KILL_AT"  # kill -9 this process in the middle of that optimizer step


@dataclass
class AnyTaskConfig(TaskConfig):
    needs: ClassVar[frozenset[str]] = frozenset({"image"})

    def build(self, run: RunConfig, data: DataInfo) -> AnyTask:
        return AnyTask(data.channels)


class AnyTask(Task):
    """Batch normalisation and dropout on purpose: the hard cases of exact resumption."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, 1)
        )  # fmt: skip

    def errors(self, batch: Batch) -> Tensor:
        """[N]"""
        return (self.model(batch["image"]).squeeze(1) - number(batch)).square()

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        if os.environ.get(KILL) == str(progress.step):
            os.kill(os.getpid(), signal.SIGKILL)
        return StepOutput(self.errors(batch).mean())

    def evaluator(self) -> Mean:
        return Mean(lambda batch: {"loss": self.errors(batch)})


def number(batch: Batch) -> Tensor:
    """Something of each sample's annotation, [N]: a resumed run that pairs images and boxes wrongly learns something else."""
    if "label" in batch:
        return batch["label"].float()
    if "boxes" in batch:
        return torch.stack([boxes.sum() / 1000 + len(boxes) for boxes in batch["boxes"]])
    return batch["image"].mean((1, 2, 3))


def with_any_task(run: RunConfig) -> RunConfig:
    run.task = AnyTaskConfig()
    return run
