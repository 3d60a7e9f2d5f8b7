"""Runs on shards that are read from front to back: nothing of them is exactly resumable, but everything else holds."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.any_task import SEEN, STOP, seen
from tests.layouts import VAL, webdataset
from tests.processes import finish, logs, start_ranks
from tests.test_exact import last
from trainer.data import loader
from trainer.errors import ConfigError
from trainer.launch import bench_loader, show_batch
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory

SHORT = ["dataset=webdataset", "dataset.image_size=16", "augmentation=none", "loop.batch_size=8", "loop.log_every=1", "loop.progress=none",
         "loop.max_validation_batches=null", "logger.plots=false"]  # fmt: skip
LABEL = "not exactly resumable"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images in shards to train on, 10 to validate on."""
    root = tmp_path_factory.mktemp("shards") / "data"
    webdataset(root)
    return root


def splits(shards: Path) -> dict[str, list[str]]:
    return {name: entry["filenames"] for name, entry in json.loads((shards / "_info.json").read_text())["splits"].items()}


def test_two_ranks_train_on_a_stream_stop_and_go_on(shards, tmp_path):
    assert len(splits(shards)["train"]) >= 4, "one for each reader"
    run = [*SHORT, f"dataset.path={shards}", "loop.samples_per_epoch=16", "loop.epochs=40", "dataset.num_workers=2"]
    stream = [*run, "dataset.streaming=true"]
    # What validation has to see: the same images, read by number.
    batch, _ = show_batch.first_batch(compose_run(*run, f"loop.batch_size={VAL}", "loop.samples_per_epoch=null"), train=False)
    expected = sorted(batch["image"].double().flatten(1).sum(1).tolist())
    assert len(set(expected)) == VAL

    directory = tmp_path / "run"
    environment = {SEEN: str(tmp_path / "first"), STOP: "6"}
    assert finish(start_ranks(directory, stream, 2, environment, any_task=True)) == [75, 75], logs(directory)
    stopped = last(directory)["step"]
    assert 6 < stopped < 80 and LABEL in logs(directory)
    for log in directory.parent.glob(f"{directory.name}.*.log"):
        log.unlink()
    assert finish(start_ranks(directory, stream, 2, {SEEN: str(tmp_path / "second")}, any_task=True)) == [0, 0], logs(directory)
    assert last(directory)["step"] == 80 and last(directory)["samples"] == 640 and LABEL in logs(directory)
    for part, steps in (("first", range(stopped)), ("second", range(stopped, 80))):
        ranks = seen(tmp_path / part, 2)
        for rows in ranks:
            assert [row["step"] for row in rows if row["step"] is not None] == [*steps], "as many steps on every rank"
            assert all(len(row["pixels"]) == 4 for row in rows if row["step"] is not None), "and as many images"
        passes = list(zip(*map(validations, ranks), strict=True))
        if part == "first" and ranks[0][-1]["step"] is None:
            passes.pop()  # the stop may have come in the middle of it
        assert len(passes) > 1, "several validations by the same workers"
        for both in passes:
            assert sorted(v for mine in both for v in mine) == expected, "every image once, each time"


def validations(rows: list[dict[str, Any]]) -> list[list[float]]:
    """What a rank saw in each pass of validation."""
    return [[v for row in some for v in row["pixels"]] for trains, some in groupby(rows, lambda row: row["step"] is not None) if not trains]


def test_the_loader_is_measured_with_no_more_workers_than_there_are_shards(shards, capsys, monkeypatch):
    monkeypatch.setattr(bench_loader, "default_workers", lambda: [0, 1, 64])
    run = [*SHORT, f"dataset.path={shards}", "dataset.streaming=true"]
    assert bench_loader.main([*run, "--prefetch", "2", "--seconds", "0.1"]) == 0
    measured = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdigit()]
    assert measured == ["0", "1"]
    with pytest.raises(ConfigError, match=r"64 readers are more than the \d+ training shards"):
        bench_loader.main([*run, "--workers", "64", "--seconds", "0.1"])


def test_as_many_workers_as_there_are_cores_but_no_more_than_shards(shards, tmp_path, monkeypatch, caplog):
    """dataset.num_workers=auto, on a machine with more cores than shards: found out only where the run is."""
    monkeypatch.setattr(loader, "available_cores", lambda: 64)
    started = []
    original = loader.Pool
    monkeypatch.setattr(
        loader, "Pool", lambda reading, layout, workers, *rest: started.append(workers) or original(reading, layout, 1, *rest)
    )
    run = compose_run(*SHORT, f"dataset.path={shards}", "dataset.streaming=true", "loop.samples_per_epoch=16", "loop.epochs=1")
    assert run.dataset.num_workers == "auto"
    train(run, RunDirectory(tmp_path / "run"))
    assert started == [len(splits(shards)["train"]), loader.MOST_WORKERS] and LABEL in caplog.text
