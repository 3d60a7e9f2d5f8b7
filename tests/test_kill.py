"""kill -9 at any moment costs time, never results."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.processes import finish, logs, start
from tests.test_exact import MODELS, SHORT, assert_same_run, last

LONG = [*SHORT, *MODELS["vit"], "model.drop_rate=0.3", "augmentation.mixup=0.8", "loop.ema_decay=0.9",
        "loop.samples_per_epoch=160", "loop.epochs=12", "loop.checkpoint_every_steps=3"]  # fmt: skip
KILLS = 10


def checkpoint(directory: Path) -> float:
    path = directory / "checkpoints" / "last.pt"
    return path.stat().st_mtime if path.exists() else 0.0


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_ten_times_at_random_moments(workers, tmp_path):
    """Each kill comes at a random moment after that start has written its first checkpoint, so every start gets somewhere."""
    overrides = [*LONG, f"dataset.num_workers={workers}"]
    assert finish([start(tmp_path / "unbroken", overrides)]) == [0], logs(tmp_path / "unbroken")
    directory, moments, steps = tmp_path / "killed", random.Random(workers), []
    for _ in range(KILLS):
        before, process = checkpoint(directory), start(directory, overrides)
        end = time.monotonic() + 60
        while checkpoint(directory) == before and process.is_alive() and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.08))
        process.kill()
        assert finish([process]) == [-signal.SIGKILL], f"kill {len(steps)} came too late to interrupt it\n{logs(directory)}"
        steps.append(last(directory)["step"])
    assert steps == sorted(steps) and steps[0] > 0 and steps[-1] < 120
    assert finish([start(directory, overrides)]) == [0], logs(directory)
    assert_same_run(tmp_path / "unbroken", directory)


@pytest.mark.parametrize("point", ["write", "sync", "sidecar", "rename"])
def test_killed_inside_a_checkpoint_write(point, tmp_path, monkeypatch):
    overrides = [*SHORT, *MODELS["batchnorm"], "loop.ema_decay=0.9", "dataset.num_workers=0"]
    assert finish([start(tmp_path / "unbroken", overrides)]) == [0], logs(tmp_path / "unbroken")
    fault = {"TRAINYARD_CHECKPOINT_FAULT": f"{point}:kill:2"}  # in the second checkpoint of three
    assert finish([start(tmp_path / "killed", overrides, environment=fault)]) == [-signal.SIGKILL]
    assert finish([start(tmp_path / "killed", overrides)]) == [0], logs(tmp_path / "killed")
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")
