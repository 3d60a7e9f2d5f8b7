"""Whole runs: what is on disk afterwards, and the switches of the loop, each seen to do what it says."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from tests.test_exact import MODELS, SHORT, assert_same_run, last, run
from trainer.engine import Engine
from trainer.errors import ConfigError, Diverged, Interrupted, Stopped
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory

VIT, BATCHNORM = [*MODELS["vit"], "dataset.num_workers=0"], [*MODELS["batchnorm"], "dataset.num_workers=0"]


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_mixed_batches_of_odd_numbers_train_to_the_last_image(accumulate, tmp_path):
    """Batches of 15, 15, 15 and 1; or in three micro-batches of 5, and the last one of a single image."""
    result = run(tmp_path, *VIT, "augmentation=basic", "augmentation.mixup=0.8", "augmentation.cutmix=1.0", "loop.batch_size=15", "loop.samples_per_epoch=46",
                 "loop.drop_last=false", f"loop.accumulate={accumulate}")  # fmt: skip
    assert (result["steps"], result["samples"]) == (12, 138)
    losses = [row["train/loss"] for row in rows(tmp_path) if "train/loss" in row]
    assert len(losses) == 12 and all(0 < loss < 5 for loss in losses)


def test_every_file_of_a_finished_run(tmp_path):
    overrides = [*VIT, "logger.plots=true", "loop.ema_decay=0.9"]
    result = run(tmp_path, *overrides)
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert names >= {"config.yaml", "environment.json", "metrics.jsonl", "epochs.csv", "batches.csv", "status.json", "result.json", "train.log",
                     "checkpoints/last.pt", "checkpoints/last.pt.sha256", "checkpoints/best.pt", "checkpoints/best.pt.sha256",
                     "checkpoints/epoch-0003.pt", "checkpoints/model.safetensors", "plots/loss.png", "plots/metrics.png"}  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["metric"] == "val/top1" and result["mode"] == "max" and result["steps"] == 9 and result["samples"] == 144
    assert [row["epoch"] for row in result["history"]] == [1, 2, 3]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "completed" and status["step"] == status["total_steps"] == 9
    assert RunDirectory(tmp_path).read_config() == compose_run(*SHORT, *overrides)
    record = rows(tmp_path)
    assert [r["step"] for r in record if "train/loss" in r] == list(range(1, 10))
    assert all({"step", "epoch", "samples", "seconds"} <= r.keys() for r in record)
    with (tmp_path / "epochs.csv").open() as file:
        assert [float(r["epoch"]) for r in csv.DictReader(file)] == [1, 2, 3]


@pytest.mark.parametrize("network", [VIT, BATCHNORM], ids=["vit", "batchnorm"])
def test_stopped_in_the_middle_of_a_validation(network, tmp_path, monkeypatch):
    """The validation is abandoned, the weights are saved, and the next start validates before it goes on."""
    overrides = [*network, "loop.max_validation_batches=6"]
    run(tmp_path / "unbroken", *overrides)
    with monkeypatch.context() as patch:
        original, calls = Engine._laid_out, []

        def laid_out(self, batch):
            calls.append(1)
            if not self.state.task.training and self.state.step == 6 and len(calls) % 3 == 0:
                os.kill(os.getpid(), signal.SIGUSR2)
            return original(self, batch)

        patch.setattr(Engine, "_laid_out", laid_out)
        with pytest.raises(Stopped, match="SIGUSR2"):
            run(tmp_path / "broken", *overrides)
    saved = last(tmp_path / "broken")
    assert (saved["step"], saved["validated"]) == (6, 3)
    run(tmp_path / "broken", *overrides)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_an_interrupt_and_a_deadline_save_too(tmp_path, monkeypatch):
    original = Engine.train_step

    def train_step(self, stream):
        original(self, stream)
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", train_step)
        with pytest.raises(Interrupted):
            run(tmp_path, *VIT)
    assert last(tmp_path)["step"] == 2 and RunDirectory(tmp_path).read_status()["state"] == "interrupted"
    with pytest.raises(Stopped, match="time is up"):
        run(tmp_path, *VIT, "loop.max_hours=1e-9")
    assert last(tmp_path)["step"] == 3 and RunDirectory(tmp_path).read_status()["state"] == "preempted"


def poisoned(monkeypatch, steps) -> None:
    original = Engine._forward

    def forward(self, batch, progress):
        if progress.step in steps:
            batch["image"][0, 0, 0, 0] = float("nan")
        return original(self, batch, progress)

    monkeypatch.setattr(Engine, "_forward", forward)


@pytest.mark.parametrize("network", [VIT, BATCHNORM], ids=["vit", "batchnorm"])
def test_a_bad_step_is_skipped_and_counted(network, tmp_path, monkeypatch, caplog):
    poisoned(monkeypatch, {4})
    result = run(tmp_path, *network, "loop.ema_decay=0.9")
    saved = last(tmp_path)
    assert saved["skipped"] == 1 and saved["step"] == 9
    assert all(v.isfinite().all() for v in [*saved["task"].values(), *saved["ema"].values()] if v.is_floating_point())
    assert result["last"]["val/loss"] == result["last"]["val/loss"]
    assert "1 step(s) whose gradients were not finite" in caplog.text


def test_divergence_ends_with_4_and_names_the_batch(tmp_path, monkeypatch):
    poisoned(monkeypatch, range(4, 100))
    with pytest.raises(Diverged, match=r"3 steps in a row, from step 4 on.*digits/\d+") as caught:
        run(tmp_path, *VIT, "loop.max_bad_steps=3", "loop.log_every=4")
    assert caught.value.exit_code == 4
    status = RunDirectory(tmp_path).read_status()
    assert status["state"] == "failed" and "not finite" in status["reason"]


def test_another_learning_rate_would_diverge_for_real(tmp_path):
    with pytest.raises(Diverged):
        run(tmp_path, *VIT, "optimizer=sgd", "optimizer.lr=1e30", "loop.max_bad_steps=2")


SWITCHES = {
    # other convolutions add up in another order, and batch normalisation over few values magnifies that
    "channels_last": (BATCHNORM, ["loop.channels_last=true"], 1e-3),
    "activation_checkpointing": (VIT, ["loop.activation_checkpointing=true"], 0.0),
    "deterministic": (BATCHNORM, ["loop.deterministic=true"], 0.0),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_speed_and_memory_change_no_result(switch, tmp_path):
    network, overrides, tolerance = SWITCHES[switch]
    sgd = ["optimizer=sgd", "optimizer.lr=0.01"]  # Adam divides small gradients by small numbers and makes their rounding large
    run(tmp_path / "plain", *network, *sgd)
    try:
        run(tmp_path / "switched", *network, *sgd, *overrides)
    finally:
        torch.use_deterministic_algorithms(False)
    a, b = last(tmp_path / "plain")["task"], last(tmp_path / "switched")["task"]
    assert max((a[k].double() - b[k].double()).abs().max().item() for k in a) <= tolerance


def test_compile_that_fails_falls_back_with_one_warning(tmp_path, monkeypatch, caplog):
    def broken(self, *args, **kwargs):
        def call(*a, **k):
            raise BackendCompilerFailed(lambda: None, RuntimeError("no compiler on this machine"), None)

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    run(tmp_path / "compiled", *VIT, "loop.compile=true")
    monkeypatch.undo()
    run(tmp_path / "plain", *VIT)
    assert_same_run(tmp_path / "plain", tmp_path / "compiled")
    assert sum("torch.compile" in r.message for r in caplog.records if r.levelno == logging.WARNING) == 1


@pytest.mark.slow
def test_compiled_training_agrees_with_eager(tmp_path):
    run(tmp_path / "plain", *VIT)
    run(tmp_path / "compiled", *VIT, "loop.compile=true")
    a, b = last(tmp_path / "plain")["task"], last(tmp_path / "compiled")["task"]
    assert a.keys() == b.keys()
    assert max((a[k].double() - b[k].double()).abs().max().item() for k in a) < 1e-4


def test_overfit_drives_one_batch_to_zero_loss(tmp_path):
    result = train(
        compose_run(*VIT, "debug=overfit", "loop.progress=none", "logger.plots=false", "optimizer.lr=3e-3"), RunDirectory(tmp_path)
    )
    assert result["last"]["val/top1"] == 1.0 and result["last"]["val/loss"] < 0.05


def test_anomaly_logs_the_norm_of_every_gradient(tmp_path):
    train(compose_run(*SHORT, *VIT, "debug=anomaly"), RunDirectory(tmp_path))
    assert not torch.is_anomaly_enabled()
    first = next(r for r in rows(tmp_path) if "train/loss" in r)
    norms = [v for k, v in first.items() if k.startswith("train/grad_norm/")]
    assert len(norms) > 10
    # what the optimizer gets: clipped to loop.max_grad_norm=1
    assert sum(n * n for n in norms) ** 0.5 == pytest.approx(min(first["train/grad_norm"], 1.0), rel=1e-3)


def test_profile_writes_a_trace(tmp_path, capsys):
    train(compose_run(*SHORT, *VIT, "debug=profile", "loop.samples_per_epoch=320"), RunDirectory(tmp_path))
    assert json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    assert "Self CPU" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(tmp_path, *VIT, "loop.epochs=1")
    with pytest.raises(ConfigError, match=r"(?s)of another model \(missing: model.conv1.*resume=never"):
        run(tmp_path, *BATCHNORM, "loop.epochs=2")
