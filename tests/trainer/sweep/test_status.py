"""What `status` says of jobs that run, wait, fail, and only pretend to run."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers.many_runs import make_run, make_sweep
from trainer.errors import ConfigError
from trainer.rundir import RunDirectory
from trainer.sweep.found import find
from trainer.sweep.status import Line, as_json, lines_of, main, short_names, table

ROOT = Path(__file__).resolve().parents[3]
ARMS = [{"optimizer.lr": 1e-3}, {"optimizer.lr": 3e-3}]


def run_of(home: Path, index: int) -> RunDirectory:
    return RunDirectory(home.parents[3] / json.loads((home / "manifest.json").read_text())["jobs"][index]["directory"])


def status(*paths: Path) -> list[Line]:
    return lines_of(find(paths, "status"))


def test_states(tmp_path: Path) -> None:
    home = make_sweep(tmp_path, ARMS, states={1: "failed", 2: "missing", 3: "queued", 4: "preempted", 5: "cancelled"})
    assert [line.state for line in status(home)] == ["completed", "failed", "missing", "queued", "preempted", "cancelled"]
    assert status(home)[1].reason == "Diverged: the loss was not finite for 10 steps in a row"
    assert str(status(home)[2].reason).endswith(" is gone")


def test_a_run_whose_process_is_gone_does_not_run(tmp_path: Path) -> None:
    home = make_sweep(tmp_path, ARMS, states={0: "running", 1: "running"})
    with run_of(home, 1).claim():
        gone, alive = status(home)[:2]
    assert (gone.state, gone.reason) == ("interrupted", "its process is gone")
    assert alive.state == "running"
    said = "\n".join(table("", [gone, alive], limit=None, width=200, colour=False))
    assert "its process is gone, silent for " in said


def test_time_left_and_the_last_score(tmp_path: Path) -> None:
    home = make_sweep(tmp_path, ARMS, states={0: "running"}, epochs=10)
    with run_of(home, 0).claim():
        line = status(home)[0]
    assert (line.step, line.total_steps, line.epoch) == (110, 220, 5.0)
    assert line.eta == pytest.approx(11.0), "as long again as the first half took"
    last = json.loads(run_of(home, 0).metrics_path.read_text().splitlines()[-1])
    assert (line.metric, line.value) == ("val/top1", last["val/top1"])


def test_a_record_that_is_being_written(tmp_path: Path) -> None:
    home = make_sweep(tmp_path, ARMS, states={0: "running"})
    path = run_of(home, 0).metrics_path
    path.write_text(path.read_text() + '{"step": 999, "epo')
    assert status(home)[0].epoch == 15.0
    path.write_text("")
    assert status(home)[0].value is None


@pytest.mark.parametrize("content", ["", "[]", '"running"', '{"state": 7}'])
def test_a_damaged_status(content: str, tmp_path: Path) -> None:
    home = make_sweep(tmp_path, ARMS)
    run_of(home, 0).status_path.write_text(content)
    assert len(list(table("", status(home), limit=None, width=100, colour=True))) == 9


def test_runs_that_no_sweep_started(tmp_path: Path, capsys) -> None:
    make_run(tmp_path / "runs" / "a" / "s42-x", {}, 42)
    make_run(tmp_path / "runs" / "b" / "s7-y", {}, 7, state="failed")
    assert main(["--once", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert "a/s42-x" in said and "b/s7-y" in said and "1 completed  1 failed" in said


def test_json(tmp_path: Path, capsys) -> None:
    home = make_sweep(tmp_path, ARMS, states={1: "failed"})
    assert main(["--json", str(home)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counts"] == {"completed": 5, "failed": 1} and len(told["jobs"]) == 6
    assert told == json.loads(json.dumps(as_json(find([home]), status(home))))
    assert told["jobs"][1]["overrides"] == ["seed=195", "optimizer.lr=0.001"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds neither runs nor a sweep\n.*python -m trainer status runs"):
        main([str(tmp_path)])


def test_what_needs_a_look_is_shown_where_not_all_fits(tmp_path: Path) -> None:
    home = make_sweep(tmp_path, [{"optimizer.lr": 0.001 * i} for i in range(1, 11)], states={17: "failed", 29: "queued"}, epochs=2)
    shown = list(table("", status(home), limit=6, width=120, colour=False))
    assert [line for line in shown if "Diverged" in line] and shown[-1] == "… and 24 more; --once shows all"
    assert all(len(line) <= 120 for line in shown)


def test_settings_are_called_by_their_short_names() -> None:
    assert short_names(["optimizer.lr", "loop.epochs", "seed"]) == {"optimizer.lr": "lr", "loop.epochs": "epochs", "seed": "seed"}
    assert short_names(["model.name", "dataset.name"]) == {"model.name": "model.name", "dataset.name": "dataset.name"}


def test_live_on_a_terminal_until_all_have_ended(tmp_path: Path) -> None:
    home = make_sweep(tmp_path, ARMS, states={0: "running"}, epochs=2)
    leader, follower = pty.openpty()
    with run_of(home, 0).claim() as run:
        command = [sys.executable, "-m", "trainer", "status", "--every", "0.2", str(home)]
        watching = subprocess.Popen(
            command, cwd=ROOT, stdout=follower, stderr=follower, env={**os.environ, "TERM": "xterm", "COLUMNS": "140"}
        )
        said = _read_until(leader, "running")
        assert "1 running" in said
        run.status("completed", step=44)
        run.write_result(
            dict.fromkeys(("history", "steps", "samples", "seconds", "images_per_second", "parameters"))
            | {"metric": "val/top1", "mode": "max", "best": {}, "last": {}}
        )
    assert watching.wait(30) == 0, "it leaves when nothing can go on any more"
    assert "6 completed" in _read_until(leader, "6 completed")
    os.close(leader)
    os.close(follower)


def _read_until(handle: int, text: str, seconds: float = 30.0) -> str:
    said, end = "", time.monotonic() + seconds
    while text not in said and time.monotonic() < end:
        said += os.read(handle, 65536).decode(errors="replace")
    return said
