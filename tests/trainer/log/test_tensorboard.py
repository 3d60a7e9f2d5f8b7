"""TensorBoard events, read back with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.config import LoggerConfig, RunConfig
from trainer.config.logger import TensorboardConfig
from trainer.log import open_journal

RUN = RunConfig(name="demo", version="s0", logger=LoggerConfig(plots=False, tensorboard=TensorboardConfig(enabled=True)))


def test_scalars_and_pictures_and_what_a_resumed_run_takes_back(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "batch.png")
    for start, steps, loss in ((0, 10, 1.0), (6, 9, 2.0)):
        with open_journal(tmp_path, RUN, True) as journal:
            journal.rewind(start)
            for step in range(start + 1, steps + 1):
                journal.write(step, step / 5, step, {"train/loss": loss, "val/top1": 0.5})
            journal.images(steps, [tmp_path / "batch.png"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(step, 1.0 if step <= 6 else 2.0) for step in range(1, 10)]
    assert set(events.Tags()["scalars"]) == {"train/loss", "val/top1", "run/epoch", "run/seconds"}
    assert [event.step for event in events.Images("previews/batch")] == [9]


def test_without_permission_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file stands where the directory should be")
    with open_journal(tmp_path, RUN, True) as journal:
        journal.rewind(0)
        journal.write(1, 1, 1, {"train/loss": 1.0})
    (record,) = caplog.records
    assert record.message.startswith("TensorBoard failed") and "metrics.jsonl" in record.message
