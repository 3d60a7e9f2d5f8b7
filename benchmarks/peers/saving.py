"""How long a checkpoint of ViT-B/16 and its AdamW, 1.04 GB, holds training up: ours, torch.save, and copying alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PARAMETERS = 86_567_656  # of ViT-B/16
TENSORS = 150


def state() -> dict[str, Any]:
    """The bytes of a ViT-B/16, its AdamW moments and step counts; what they say does not matter."""
    torch.set_num_threads(1)
    size = PARAMETERS // TENSORS

    def weights() -> dict[str, torch.Tensor]:
        return {f"blocks.{i}.weight": torch.full((size,), 1.0 / (i + 1)) for i in range(TENSORS)}

    moments = zip(weights().values(), weights().values(), strict=True)
    return {
        "task": weights(),
        "optimizers": [{"state": {i: {"step": torch.tensor(1.0), "exp_avg": m, "exp_avg_sq": v} for i, (m, v) in enumerate(moments)}}],
        "step": 1,
    }


def ours() -> Callable[[], float]:
    """The time until `save` returns. The file is written behind it, and waited for between the measurements."""
    from trainer.checkpoint import Writer

    saved = state()
    directory = tempfile.TemporaryDirectory()
    writer = Writer(Path(directory.name))
    writer.prepare(saved)
    writer.wait()

    def block(_directory: object = directory) -> float:
        started = time.perf_counter()
        writer.save(saved, ["last"])
        stall = time.perf_counter() - started
        writer.wait()
        return stall * 1e3

    return block


def torch_save() -> Callable[[], float]:
    """The call that most training scripts make: no temporary file, no fsync, nothing verified."""
    saved = state()
    directory = tempfile.TemporaryDirectory()
    path = Path(directory.name) / "last.pt"

    def block(_directory: object = directory) -> float:
        started = time.perf_counter()
        torch.save(saved, path)
        return (time.perf_counter() - started) * 1e3

    return block


def copy() -> Callable[[], float]:
    """The limit: the same bytes, copied into memory that has been touched before."""
    source = torch.ones(3 * PARAMETERS)
    target = torch.zeros(3 * PARAMETERS)

    def block() -> float:
        started = time.perf_counter()
        target.copy_(source)
        return (time.perf_counter() - started) * 1e3

    torch.set_num_threads(1)
    block()
    return block
