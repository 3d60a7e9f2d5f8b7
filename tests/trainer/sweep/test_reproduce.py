"""`reproduce`: a run repeats itself to the last bit, and a run that cannot is told by how much, and why."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.test_exact import MODELS, stop_after
from tests.test_exact import SHORT as EXACT
from trainer.errors import ConfigError, Stopped
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory
from trainer.sweep.found import REPRODUCTION, find
from trainer.sweep.reproduce import distance_of, main

SHORT = [*MODELS["vit"], *EXACT, "dataset.num_workers=0", "model.drop_rate=0.1", "logger.wandb.resume_id=first", "distributed.processes=1"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "name" / "s0-first")
    train(compose_run(*SHORT), run)
    return run


def test_a_run_repeats_itself_to_the_last_bit(first: RunDirectory, capsys) -> None:
    assert main([str(first), "--tolerance", "0"]) == 0
    second = RunDirectory(f"{first}-reproduced")
    said = capsys.readouterr().out
    assert "identical: every number of 12 rows of the record; the weights are the same, bit for bit" in said
    distance = distance_of(first, second)
    assert (distance.rows, distance.largest, distance.same_weights) == (12, 0.0, True)
    assert second.read_config().logger.wandb.resume_id is None, "it logs to a W&B run of its own"
    assert [run.directory.path for run in find([first.path.parent]).runs] == [first.path], "a repetition is no seed of its own"
    assert main([str(first)]) == 0
    assert "has run already" in capsys.readouterr().out


def test_a_stopped_repetition_goes_on(first: RunDirectory, tmp_path: Path, monkeypatch) -> None:
    second = tmp_path / "again"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            main([str(first), "--out", str(second)])
    assert RunDirectory(second).read_status()["step"] == 5
    assert main([str(first), "--out", str(second), "--tolerance", "0"]) == 0


def test_a_run_that_comes_out_otherwise(first: RunDirectory, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other"
    run = compose_run(*SHORT, "optimizer.lr=0.0011")
    train(run, RunDirectory(other))
    (other / REPRODUCTION).write_text(json.dumps({"of": str(first.path)}))
    environment = json.loads((other / "environment.json").read_text())
    environment["versions"]["torch"] = "9.9.9"
    (other / "environment.json").write_text(json.dumps(environment))
    capsys.readouterr()
    assert main([str(first), "--out", str(other), "--tolerance", "1e-9"]) == 1
    said = capsys.readouterr().out
    assert "largest difference in 12 rows: " in said and "the final weights differ" in said
    assert "versions.torch: " in said and "9.9.9" in said
    assert main([str(first), "--out", str(other), "--tolerance", "1e9"]) == 0


def test_half_a_record_is_compared_as_far_as_it_goes(first: RunDirectory, tmp_path: Path) -> None:
    second = RunDirectory(tmp_path / "half")
    second.create()
    lines = first.metrics_path.read_text().splitlines(keepends=True)
    second.metrics_path.write_text("".join(lines[:5]) + lines[5][:20])
    assert distance_of(first, second).rows == 5
    rows = [json.loads(line) for line in lines[:5]]
    rows[2]["train/loss"] = "NaN"
    second.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert distance_of(first, second).largest == float("inf"), "a number against none"


def test_a_directory_that_holds_something_else_is_left_alone(first: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="is there already, and is no repetition of"):
        main([str(first), "--out", str(tmp_path / "mine")])
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        main([str(tmp_path)])
