"""The journal: what was written is on disk at once, in whole lines, and a resumed run goes on as if it had never stopped."""

from __future__ import annotations

import csv
import json
import logging
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from tests.thresholds import JOURNAL_OVER_JSON_LINE
from trainer.errors import Interrupted, Stopped, StorageError
from trainer.log.journal import Journal, ending
from trainer.log.record import parse, read_rows

STEPS_PER_EPOCH, LOG_EVERY, TOTAL = 4, 2, 24
MOMENTS = ("seconds", "epoch_seconds", "timestamp")  # what differs between two runs that are equal


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def train(directory: Path, until: int, start: int = 0) -> None:
    """Log like a run that goes on from `start`: a line every 2 steps, a validation an epoch; new columns appear on the way."""
    with Journal(directory) as journal:
        journal.rewind(start)
        for step in range(start + 1, until + 1):
            epoch, samples = step / STEPS_PER_EPOCH, step * 8
            if step % LOG_EVERY == 0:
                scalars = {"train/loss": 1 / step, "train/top1": step / 100, "train/lr": 0.1, "system/images_per_second": 5.0}
                if step > 10:
                    scalars["train/skipped_steps"] = 1
                journal.write(step, epoch, samples, scalars)
            if step % STEPS_PER_EPOCH == 0:
                scores = {"val/loss": 2 / step} | ({"val/top1": 0.5} if step > 8 else {})
                journal.write(step, epoch, samples, scores)
                journal.epoch({"epoch": epoch, "step": step, **scores, "is_best": step == 12})


def without_moments(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in MOMENTS}


def content(directory: Path) -> tuple[list[dict[str, Any]], ...]:
    record = [without_moments(row) for row in read_rows(directory / "metrics.jsonl")]
    return record, *([without_moments(row) for row in rows_of(directory / name)] for name in ("batches.csv", "epochs.csv"))


@settings(max_examples=40)  # each waits for the disk a dozen times
@given(killed_after=some.integers(1, TOTAL), saved=some.integers(0, TOTAL), torn=some.tuples(*[some.integers(0, 60)] * 3))
def test_a_resumed_run_writes_what_an_unbroken_one_does(
    tmp_path_factory: pytest.TempPathFactory, killed_after: int, saved: int, torn: tuple[int, int, int]
) -> None:
    saved = saved % (killed_after + 1) // STEPS_PER_EPOCH * STEPS_PER_EPOCH
    unbroken, resumed = tmp_path_factory.mktemp("unbroken"), tmp_path_factory.mktemp("resumed")
    train(unbroken, TOTAL)
    train(resumed, killed_after)
    for name, count in zip(("metrics.jsonl", "batches.csv", "epochs.csv"), torn, strict=True):
        path = resumed / name
        if path.exists():  # killed in the middle of the next line
            line = path.read_bytes().splitlines()[-1]
            with open(path, "ab") as file:
                file.write(line[:count])
    train(resumed, TOTAL, start=saved)
    assert content(resumed) == content(unbroken)


def test_a_kill_loses_no_row_that_was_written(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.log.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1])); journal.rewind(0)\n"
        "for step in range(1, 10**9): journal.write(step, step / 10, step, {'train/loss': 1 / step}); print(step, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = 0
        while seen < 500:
            seen = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        seen = max([seen, *(int(line) for line in process.stdout if line.endswith("\n"))])
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert [row["step"] for row in map(parse, lines) if row] == list(range(1, len(lines) + 1))
    assert len(lines) >= seen and len((tmp_path / "batches.csv").read_text().splitlines()) >= seen + 1


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    values = {"train/loss": math.nan, "train/a": math.inf, "train/b": -math.inf, "train/c": np.float32(0.5), "train/d": np.int64(3)}
    with Journal(tmp_path) as journal:
        journal.write(1, 0.1, 8, values)
    line = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (strict["train/loss"], strict["train/a"], strict["train/b"]) == ("NaN", "Infinity", "-Infinity")
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(row["train/loss"]) and row["train/a"] == math.inf and row["train/b"] == -math.inf
    assert (row["train/c"], row["train/d"]) == (0.5, 3)
    (cells,) = rows_of(tmp_path / "batches.csv")
    assert math.isnan(float(cells["train/loss"])) and float(cells["train/b"]) == -math.inf and cells["train/c"] == "0.5"


def test_the_record_begins_each_row_with_where_the_run_is(tmp_path: Path) -> None:
    train(tmp_path, 4)
    assert all(list(row)[:4] == ["step", "epoch", "samples", "seconds"] for row in read_rows(tmp_path / "metrics.jsonl"))
    assert list(rows_of(tmp_path / "batches.csv")[0])[:3] == ["epoch", "step", "train/loss"]


def test_epochs_hold_means_and_totals_over_their_steps(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.rewind(0)
        journal.write(3, 0.6, 3, {"train/loss": 2.0, "train/lr": 0.5})  # the mean of steps 1 to 3
        journal.write(5, 1.0, 5, {"train/loss": 4.0, "train/lr": 0.4})  # and of 4 and 5
        journal.write(5, 1.0, 5, {"val/top1": 0.25})
        journal.epoch({"epoch": 1, "step": 5, "is_best": True, "checkpoint": "checkpoints/best.pt"})
        journal.write(10, 2.0, 10, {"train/loss": 1.0, "train/lr": 0.3})
        journal.epoch({"epoch": 2, "step": 10, "val/top1": 0.2, "is_best": False})
    first, second = rows_of(tmp_path / "epochs.csv")
    assert (float(first["train/loss_total"]), float(first["train/loss"])) == (14.0, 14.0 / 5)
    assert (first["val/top1"], first["train/lr"], first["is_best"], first["checkpoint"]) == ("0.25", "0.4", "True", "checkpoints/best.pt")
    assert (float(second["train/loss_total"]), second["val/top1"], second["checkpoint"]) == (5.0, "0.2", "")
    assert second["timestamp"].startswith("20") and float(second["seconds"]) >= float(second["epoch_seconds"]) >= 0


def test_time_goes_on_over_resumes(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.rewind(0)
        journal.before = 100.0
        journal.write(1, 0.1, 8, {"train/loss": 1.0})
        journal.write(2, 0.2, 16, {"train/loss": 1.0})
    with Journal(tmp_path) as journal:
        journal.rewind(1)
        journal.write(2, 0.2, 16, {"train/loss": 1.0})
        assert 100.0 <= journal.seconds() < 200.0
    seconds = [row["seconds"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert len(seconds) == 2 and seconds == sorted(seconds)
    with Journal(tmp_path) as journal:
        journal.rewind(1, seconds=500.0)
        assert 500.0 <= journal.seconds() < 600.0


def test_a_full_disk_ends_the_run_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with Journal(tmp_path) as journal, pytest.raises(StorageError, match="disk is full"):
        journal.write(1, 1, 1, {"train/loss": 1.0})


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from trainer.log.journal import Journal\n"
        "from trainer.errors import StorageError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "journal = Journal(Path(sys.argv[1]), csv=False); journal.rewind(0)\n"
        "try:\n    for step in range(1, 100): journal.write(step, step / 10, step, {'train/loss': 1 / step})\n"
        "except StorageError: print(step)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert all(parse(line) for line in lines) and len(lines) == int(said) - 1 > 5


@pytest.mark.parametrize("resumed", [True, False])
def test_a_sheet_that_cannot_be_written_is_dropped_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, resumed: bool) -> None:
    (tmp_path / "batches.csv").mkdir()
    with caplog.at_level(logging.WARNING), Journal(tmp_path) as journal:
        if resumed:
            journal.rewind(0)
        for step in (1, 2, 3):
            journal.write(step, step, step, {"train/loss": 1.0})
    (record,) = caplog.records
    assert "batches.csv cannot be written" in record.message
    assert len(list(read_rows(tmp_path / "metrics.jsonl"))) == 3


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path, silent=True) as journal:
        journal.rewind(0)
        journal.write(1, 1, 1, {"train/loss": 1.0})
        journal.epoch({"epoch": 1, "step": 1})
        journal.images(1, [tmp_path / "a.png"])
    assert not list(tmp_path.iterdir())


def test_text_in_cells_stays_in_its_cell(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.epoch({"epoch": 1, "step": 1, "checkpoint": 'a, "b"\nc'})
        journal.epoch({"epoch": 2, "step": 2, "val/new": 1.5})  # a new column: the file is written anew
        journal.rewind(1)
    (row,) = rows_of(tmp_path / "epochs.csv")
    assert row["checkpoint"] == 'a, "b" c' and row["val/new"] == ""


def test_how_a_run_ended() -> None:
    errors = [None, Stopped("told to"), Interrupted("by hand"), KeyboardInterrupt(), RuntimeError("bug")]
    assert [ending(error) for error in errors] == ["completed", "preempted", "interrupted", "interrupted", "failed"]


def test_a_row_costs_little_more_than_its_json(tmp_path: Path) -> None:
    scalars = {f"train/metric_{i}": 1 / (i + 3) for i in range(8)} | {"train/loss": 2.302585092994046}
    row = {"step": 1, "epoch": 0.1, "samples": 64, "seconds": 1.234, **scalars}
    encode = json.JSONEncoder(allow_nan=False).encode
    bare, ours = [], []
    with open(tmp_path / "bare", "ab", buffering=0) as file, Journal(tmp_path) as journal:
        journal.rewind(0)
        for step in range(3000):  # interleaved, so that a busy machine slows both
            began = time.perf_counter_ns()
            file.write((encode(row) + "\n").encode())
            between = time.perf_counter_ns()
            journal.write(step, step / 100, step, scalars)
            ours.append(time.perf_counter_ns() - between)
            bare.append(between - began)
    assert median(ours) <= JOURNAL_OVER_JSON_LINE * median(bare)
