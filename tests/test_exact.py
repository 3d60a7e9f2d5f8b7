"""The promise that carries the rest: a run that was stopped and started again ends in the very same weights, bit for bit.

Shown on the hard cases: transformers and batch normalisation, dropout, mixup, an average of weights, fp16, micro-batches,
with workers and without.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainer.engine import Engine
from trainer.errors import Stopped
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory

MODELS = {
    "vit": ["model=timm", "model.name=test_vit", "model.patch_size=4", "dataset.image_size=16"],
    "batchnorm": ["model=timm", "model.name=test_resnet", "dataset.image_size=32"],
}
FEATURES = {
    "plain": [],
    "dropout": ["model.drop_rate=0.3", "model.drop_path_rate=0.2"],
    "mixup": ["augmentation.mixup=0.8", "augmentation.cutmix=1.0", "augmentation.erasing=0.5"],
    "ema": ["loop.ema_decay=0.9"],
    "fp16": ["precision=fp16"],
    "accumulate": ["loop.accumulate=2"],
    "everything": [
        "model.drop_rate=0.3",
        "augmentation.mixup=0.8",
        "augmentation.cutmix=1.0",
        "loop.ema_decay=0.9",
        "loop.accumulate=2",
        "precision=bf16",
    ],
}
SHORT = ["loop.batch_size=16", "loop.samples_per_epoch=48", "loop.epochs=3", "loop.log_every=1", "loop.progress=none", "logger.plots=false",
         "loop.max_validation_batches=2", "task.label_smoothing=0.1", "loop.max_grad_norm=1.0"]  # fmt: skip


def run(directory: Path, *overrides: str):
    return train(compose_run(*SHORT, *overrides), RunDirectory(directory))


def last(directory: Path) -> dict:
    return torch.load(directory / "checkpoints" / "last.pt", weights_only=True)


def assert_same(a, b, at: str = "") -> None:
    """Two checkpoints, to the last bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{at}: differs by {(a.double() - b.double()).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}[{i}]")
    else:
        assert a == b or a != a, f"{at}: {a} != {b}"


STATE = ("task", "ema", "optimizers", "scaler", "step", "samples", "skipped")


def assert_same_run(a: Path, b: Path) -> None:
    left, right = last(a), last(b)
    for key in STATE:
        assert_same(left[key], right[key], key)
    timeless = lambda row: {k: v for k, v in row.items() if not k.startswith("system/") and "seconds" not in k}  # noqa: E731
    rows = [[timeless(json.loads(line)) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (a, b)]
    assert rows[0] == rows[1]


def assert_close_runs(a: Path, b: Path) -> None:
    """The same losses at every logged step and the same weights, to rounding."""
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (a, b)]
    losses = [torch.tensor([row["train/loss"] for row in found if "train/loss" in row]) for found in rows]
    assert len(losses[0]) > 1
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    left, right = last(a)["task"], last(b)["task"]
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A real SIGTERM, in the middle of that optimizer step."""
    original = Engine.train_step

    def train_step(self, stream):
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, stream)

    monkeypatch.setattr(Engine, "train_step", train_step)


def stopped_and_resumed(run: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, *overrides: str) -> None:
    """`run(directory, *overrides)` once without a stop, in `unbroken`, and once stopped after this step, in `broken`: the same bits."""
    run(tmp_path / "unbroken", *overrides)
    with monkeypatch.context() as patch:
        stop_after(patch, after)
        with pytest.raises(Stopped):
            run(tmp_path / "broken", *overrides)
    run(tmp_path / "broken", *overrides)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.parametrize(("model", "feature", "workers"), list(itertools.product(MODELS, FEATURES, [0, 2])))
def test_a_stopped_run_ends_in_the_same_bits(model, feature, workers, tmp_path, monkeypatch):
    overrides = [*MODELS[model], *FEATURES[feature], f"dataset.num_workers={workers}"]
    run(tmp_path / "unbroken", *overrides)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            run(tmp_path / "broken", *overrides)
    assert last(tmp_path / "broken")["step"] == 5, "it stopped at the step boundary after the signal, in the middle of an epoch"
    run(tmp_path / "broken", *overrides)
    assert last(tmp_path / "broken")["step"] == 9
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")
