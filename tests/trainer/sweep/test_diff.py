"""What `diff` finds between two runs, and that it finds nothing where there is nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks.peers.many_runs import make_run, make_sweep
from trainer.errors import ConfigError
from trainer.rundir import RunDirectory
from trainer.sweep import sweep_diff
from trainer.sweep.diff import differences, main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunDirectory, RunDirectory]:
    return make_run(tmp_path / "a", {"optimizer.lr": 1e-3}, 42), make_run(tmp_path / "b", {"optimizer.lr": 3e-3, "loop.log_every": 7}, 195)


def environment(run: RunDirectory, **content) -> None:
    run.environment_path.write_text(json.dumps(content))


def test_a_run_does_not_differ_from_itself(runs, capsys) -> None:
    assert not any(differences(runs[0], runs[0]).values())
    assert main([str(runs[0]), str(runs[0])]) == 0
    said = capsys.readouterr().out
    for part in ("configuration", "code", "environment", "results"):
        assert f"{part}: the same" in said


def test_configuration_and_results(runs, capsys) -> None:
    found = differences(*runs)
    assert found["config"] == {"seed": [42, 195], "optimizer.lr": [0.001, 0.003]}
    assert found["without_effect"] == {"version": ["s42", "s195"], "loop.log_every": [50, 7]}
    a, b = (run.read_result() for run in runs)
    assert a and b and found["metrics"]["best val/top1"] == [a["best"]["val/top1"], b["best"]["val/top1"]]
    assert main([*map(str, runs)]) == 0
    said = capsys.readouterr().out
    gap = b["best"]["val/top1"] - a["best"]["val/top1"]
    assert f"{100 * gap:+.2f} pp" in said and "optimizer.lr" in said and "settings that cannot change a result" in said
    assert main(["--json", *map(str, runs)]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_environment(runs) -> None:
    environment(
        runs[0],
        argv=["a"],
        time="then",
        versions={"torch": "2.14.0", "python": "3.11"},
        ranks=1,
        hardware={"gpus": []},
        previous=[{"ranks": 8}],
    )
    environment(
        runs[1], argv=["b"], time="now", versions={"torch": "2.15.0", "python": "3.11", "timm": "1"}, ranks=2, hardware={"gpus": []}
    )
    assert differences(*runs)["environment"] == {"versions.torch": ["2.14.0", "2.15.0"], "ranks": [1, 2], "versions.timm": [None, "1"]}


def test_code(runs) -> None:
    done = subprocess.run(["git", "log", "--format=%H", "-2", "--", "trainer"], cwd=ROOT, capture_output=True, text=True)
    commits = done.stdout.split() if done.returncode == 0 else []
    now, then = (*commits, "b" * 40, "a" * 40)[:2]
    patch = "diff --git a/trainer/engine.py b/trainer/engine.py\n+1\n"
    environment(runs[0], git={"commit": then, "code": "1", "diff": "", "untracked": {}})
    environment(runs[1], git={"commit": now, "code": "2", "diff": patch, "untracked": {"tasks/new.py": "00"}})
    told = differences(*runs)["code"]
    assert told[0] == f"commit {then[:10]}, then {now[:10]}"
    assert told[-2:] == ["uncommitted in the first: nothing", "uncommitted in the second: tasks/new.py, trainer/engine.py"]
    assert len(commits) < 2 or any("changed" in line for line in told), "git's own summary, where it knows the commits"
    environment(runs[1], git=None)
    assert differences(*runs)["code"] == ["unknown: a run outside of a git repository"]


def test_a_commit_from_a_file_is_no_option_for_git(runs, tmp_path: Path) -> None:
    environment(runs[0], git={"commit": f"--output={tmp_path / 'written'}", "code": "1"})
    environment(runs[1], git={"commit": "HEAD", "code": "2"})
    differences(*runs)
    assert not (tmp_path / "written").exists()


def test_data(runs) -> None:
    environment(runs[0], data={"train": "1", "val": "2"})
    environment(runs[1], data={"train": "1", "val": "3"})
    assert differences(*runs)["data"] == ["the val data"]


def test_runs_that_have_not_much(runs, capsys) -> None:
    runs[0].result_path.unlink()
    runs[0].environment_path.unlink()
    assert main([*map(str, runs)]) == 0
    assert "results" in capsys.readouterr().out


def test_what_is_no_run(runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run directory: it holds no config\.yaml"):
        main([str(runs[0]), str(tmp_path)])
    runs[0].config_path.write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        main([*map(str, runs)])


# Sweeps


def test_two_sweeps(tmp_path: Path, capsys) -> None:
    """One arm that both have, one of each alone; a seed is missing in one of them."""
    a = make_sweep(tmp_path / "a", [{"optimizer.lr": 1e-3}, {"optimizer.lr": 1e-4}], seeds=(1, 2, 3, 4))
    b = make_sweep(tmp_path / "b", [{"optimizer.lr": 1e-3}, {"optimizer.lr": 3e-3}], seeds=(1, 2, 3, 4), states={1: "failed"})
    content = json.loads((b / "manifest.json").read_text()) | {"base": ["optimizer=sgd"]}
    (b / "manifest.json").write_text(json.dumps(content))
    gains = {1: 0.01, 3: 0.02, 4: 0.03}
    for index, seed in ((0, 1), (2, 3), (3, 4)):
        path = tmp_path / "b" / content["jobs"][index]["directory"] / "result.json"
        result = json.loads(path.read_text())
        result["best"]["val/top1"] += gains[seed]
        path.write_text(json.dumps(result))
    found = sweep_diff.differences(a, b)
    (arm,) = found["arms"]
    test: Any = stats.ttest_1samp(list(gains.values()), 0)
    assert (arm["a"]["n"], arm["b"]["n"], arm["difference"]["n"]) == (4, 3, 3)
    assert (arm["difference"]["difference"], arm["difference"]["p"]) == pytest.approx((0.02, test.pvalue))
    assert found["only"] == [["lr=0.0001"], ["lr=0.003"]] and found["base"] == [[], ["optimizer=sgd"]]
    assert main([str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert "B alone: optimizer=sgd" in said and "+2.00 pp" in said and "only in A: lr=0.0001" in said and "0 of 1 arms moved" in said


def test_a_sweep_and_a_run(runs, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", [{}], seeds=(1,))
    with pytest.raises(ConfigError, match="is a sweep, and the other is none"):
        main([str(runs[0]), str(sweep)])


def test_sweeps_without_results(tmp_path: Path) -> None:
    sweeps = [make_sweep(tmp_path / name, [{}], seeds=(1,), states={0: "queued"}) for name in "ab"]
    with pytest.raises(ConfigError, match="neither sweep has a completed run yet"):
        main([*map(str, sweeps)])
