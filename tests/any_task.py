"""A task for tests that learns a number from whatever a sample has, so that every dataset can be trained on before its own task exists."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.config import RunConfig, TaskConfig
from trainer.evaluation import Mean
from trainer.task import Batch, DataInfo, Progress, StepOutput, Task

KILL = "TRAINYARD_TEST_KILL_AT"  # kill -9 this process in the middle of that optimizer step
STOP = "TRAINYARD_TEST_STOP_AT"  # SIGTERM to this process in the middle of that optimizer step; the next ones wait for the ranks to agree
SEEN = "TRAINYARD_TEST_SEEN"  # the path, without its ending, of what every process writes about its batches


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
        if int(os.environ.get(STOP, progress.step + 1)) <= progress.step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.03)
        see(batch, progress.step)
        return StepOutput(self.errors(batch).mean())

    def evaluator(self) -> Mean:
        def measured(batch: Batch) -> dict[str, Tensor]:
            see(batch, None)
            return {"loss": self.errors(batch)}

        return Mean(measured)


def see(batch: Batch, step: int | None) -> None:
    """Write down which samples make up a batch of an optimizer step, or of validation."""
    if SEEN in os.environ:
        real = slice(batch["count"])  # one sample stands in for an empty share
        line = {"step": step, "index": batch["index"][real].tolist(), "pixels": batch["image"][real].double().flatten(1).sum(1).tolist()}
        with open(f"{os.environ[SEEN]}.{os.environ.get('RANK', '0')}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def seen(path: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """What the processes of a run of `ranks` ranks have written, rank by rank."""
    return [[json.loads(line) for line in Path(f"{path}.{rank}.jsonl").read_text().splitlines()] for rank in range(ranks)]


def samples_by_step(path: Path, ranks: int) -> dict[int, list[int]]:
    """The samples of every optimizer step, as the order of training has them: ranks take turns."""
    steps: list[dict[int, list[int]]] = [
        {row["step"]: row["index"] for row in rows if row["step"] is not None} for rows in seen(path, ranks)
    ]
    assert all(mine.keys() == steps[0].keys() for mine in steps), "every rank takes the same steps"
    return {step: interleaved([mine[step] for mine in steps]) for step in steps[0]}


def interleaved(shares: Sequence[Sequence[int]]) -> list[int]:
    """Of the shares of ranks 0 … n - 1, every n-th sample each, the whole."""
    whole = [0] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


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
