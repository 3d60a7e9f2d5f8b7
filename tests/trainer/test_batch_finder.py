"""The fewest micro-batches that fit: found by trying, without a trace, and kept by a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.test_exact import MODELS, SHORT, assert_same_run, last, run, stop_after
from trainer.engine import Engine
from trainer.errors import ConfigError, Stopped

VIT = [*MODELS["vit"], "dataset.num_workers=0", "loop.ema_decay=0.9", "model.drop_rate=0.3"]


def memory_for(monkeypatch: pytest.MonkeyPatch, images: int, error: type[Exception] = torch.OutOfMemoryError, words: str = "") -> list[int]:
    """A device on which no more than so many images fit; the sizes that were tried."""
    original, tried = Engine._forward, []

    def forward(self, batch, progress):
        tried.append(len(batch["image"]))
        if len(batch["image"]) > images:
            raise error(words or "CUDA out of memory")
        return original(self, batch, progress)

    monkeypatch.setattr(Engine, "_forward", forward)
    return tried


def test_it_is_the_run_with_as_many_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    tried = memory_for(monkeypatch, 5)
    run(tmp_path / "found", *VIT, "loop.batch_finder=true")
    assert tried[:3] == [16, 8, 4], "16 and 8 do not fit, 4 does"
    assert "micro-batches of 4 images fit: loop.accumulate=4" in capsys.readouterr().out
    run(tmp_path / "given", *VIT, "loop.accumulate=4")
    assert_same_run(tmp_path / "found", tmp_path / "given")


def test_a_run_that_goes_on_keeps_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    memory_for(monkeypatch, 5)
    staged = [*VIT, "loop.batch_finder=true", "loop.stages=[{epochs: 1, batch_size: 8}, {epochs: 2}]"]
    run(tmp_path / "unbroken", *staged)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Stopped):
            run(tmp_path / "broken", *staged)
    assert last(tmp_path / "broken")["accumulate"] == 4
    memory_for(monkeypatch, 100)  # more memory now, which must not matter
    run(tmp_path / "broken", *staged)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_a_cpu_says_it_in_other_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    memory_for(monkeypatch, 8, RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    run(tmp_path, *VIT, "loop.batch_finder=true", "loop.epochs=1")
    assert last(tmp_path)["accumulate"] == 2


def test_what_never_fits_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    memory_for(monkeypatch, 0)
    with pytest.raises(ConfigError, match="not even one image at a time"):
        run(tmp_path, *VIT, "loop.batch_finder=true")


def test_another_error_is_not_taken_for_a_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    memory_for(monkeypatch, 0, RuntimeError, "shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(tmp_path, *VIT, "loop.batch_finder=true")


def test_two_ranks_find_it_together(tmp_path: Path):
    from tests.processes import finish, logs, start_ranks

    overrides = [*SHORT, *VIT, "loop.epochs=1", "loop.accumulate=2"]
    found = start_ranks(tmp_path / "found", [*overrides, "loop.batch_finder=true"], 2)
    given = start_ranks(tmp_path / "given", overrides, 2)
    assert finish([*found, *given]) == [0] * 4, logs(tmp_path / "found")
    assert_same_run(tmp_path / "found", tmp_path / "given")
