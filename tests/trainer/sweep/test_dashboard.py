"""The dashboard in W&B: made by W&B's own report API, sent to a stand-in for its server, and brought up to date the second time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.many_runs import make_run, make_sweep
from tests.wandb_stub_server import StubServer
from trainer.errors import ConfigError
from trainer.sweep import dashboard

ROOT = Path(__file__).resolve().parents[3]


def dash(home: Path, server: StubServer, *options: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "HOME": str(home)}
    command = [sys.executable, "-m", "trainer", "dashboard", str(home), *options]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_curves_with_bands_parallel_coordinates_and_the_table(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces", reason="needs the extra views: pip install -e '.[views]'")
    home = make_sweep(tmp_path, [{"optimizer.lr": 1e-3, "model": "a"}, {"optimizer.lr": 3e-3, "model": "b"}], states={1: "failed"})
    with StubServer() as server:
        first = dash(home, server, "--project", "birds")
        assert first.returncode == 0, first.stderr
        again = dash(home, server, "--project", "birds")
        assert again.returncode == 0, again.stderr
        server.become("error")
    assert [view.get("id") for view in server.views] == [None, "VmlldzoxMjM="], "the same one, brought up to date"
    assert first.stdout.strip().splitlines()[-1] == json.loads((home / "dashboard.json").read_text())["url"]
    view = server.views[0]
    assert (view["projectName"], view["entityName"], view["displayName"]) == ("birds", "ent", "Sweep digits 2026-11-26_09-00-00")
    blocks = json.loads(view["spec"])["blocks"]
    assert any("seed 195 failed" in json.dumps(block) for block in blocks), "the table, with what is missing"
    (panels,) = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    (runs,) = panels["runSets"]
    assert [(f["key"]["name"], f["op"], f["value"]) for f in runs["filters"]["filters"]] == [
        ("group", "=", "2026-11-26_09-00-00"),
        ("jobType", "!=", "report"),
    ]
    assert [key["name"] for key in runs["grouping"]] == ["optimizer.value.lr", "model.value.name"]
    drawn = panels["panelBankSectionConfig"]["panels"]
    curves = [panel["config"] for panel in drawn if panel["viewType"] == "Run History Line Plot"]
    assert [curve["metrics"] for curve in curves] == [["val/top1"], ["val/top5"], ["val/loss"], ["train/loss"]]
    assert {(curve["xAxis"], curve["groupAgg"], curve["groupArea"]) for curve in curves} == {("global_step", "mean", "stddev")}
    (parallel,) = [panel["config"] for panel in drawn if panel["viewType"] == "Parallel Coordinates Plot"]
    assert [c["accessor"] for c in parallel["columns"]][:3] == ["config:optimizer.value.lr", "config:model.value.name", "summary:best/top1"]


def test_a_folder_is_no_group(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "s1", {}, 1)
    with pytest.raises(ConfigError, match="is no sweep: its runs are no group in W&B"):
        dashboard.main([str(tmp_path)])


def test_without_the_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ConfigError, match=r"W&B's report API is not installed\n.*trainyard\[views\]"):
        dashboard.main([str(make_sweep(tmp_path, [{}]))])
