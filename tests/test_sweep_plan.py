"""`plan`: what a sweep would be and cost, without starting it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.launch import jobs, multirun, plan
from trainer.launch.compose import compose_run
from trainer.rundir import RunDirectory, run_directory
from trainer.sweep import estimate
from trainer.sweep.estimate import History

SMALL = ["model=timm", "model.name=test_vit2", "dataset.image_size=16", "loop.steps=100", "loop.batch_size=36"]


@pytest.fixture
def finished(tmp_path: Path, monkeypatch):
    """A finished run that took 36 images a second on two ranks."""
    monkeypatch.chdir(tmp_path)
    run = compose_run("seed=1", *SMALL)
    directory = RunDirectory(run_directory(run))
    directory.write_config(run)
    directory.result_path.write_text(json.dumps({"images_per_second": 36.0}))
    directory.write_environment({"ranks": 2})
    directory.status("completed")
    return directory


def test_cost_from_a_run_like_it(finished):
    cost = History().cost(compose_run("seed=2", "optimizer.lr=0.5", *SMALL), ranks=2)
    assert cost.images == 3600
    assert cost.hours == pytest.approx(100 / 3600)
    assert cost.gpu_hours == pytest.approx(200 / 3600)
    assert cost.disk and cost.disk > 100
    other = History().cost(compose_run("seed=2", *SMALL), ranks=4)
    assert other.hours == pytest.approx(50 / 3600)  # as if twice as many were twice as fast
    assert "from 2 ranks" in other.source
    assert History().cost(compose_run(*SMALL, "dataset.image_size=32"), ranks=2).hours is None
    assert History().cost(compose_run(*SMALL[:-1], "loop.batch_size=12"), ranks=2).hours is None


def test_the_table(finished, capsys):
    assert plan.main(["-m", "seed=1,2,3", *SMALL, "hydra.launcher.slots=1"]) == 0
    said = capsys.readouterr().out
    assert "seed=1" in said and "completed" in said
    assert "2 to run, 1 finished already" in said
    assert "about 0.1 GPU hours" in said  # two runs of 3,600 images at 18 a second
    assert not list(Path("runs").glob("*/sweeps"))
    assert plan.main(["seed=1,2,3", *SMALL, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["state"], row["overrides"]) for row in rows] == [("completed", ["seed=1"]), ("new", ["seed=2"]), ("new", ["seed=3"])]
    assert rows[1]["images"] == 3600


def test_a_budget(finished, capsys):
    assert plan.main(["seed=2,3", *SMALL, "--budget=0.01"]) == 2
    assert "more than the budget of 0.01" in capsys.readouterr().err
    assert plan.main(["seed=2,3", *SMALL, "--budget=1"]) == 0


def test_nothing_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert plan.main(["seed=2,3", *SMALL]) == 0
    assert "2 cannot be estimated: no finished run like it in runs/" in capsys.readouterr().out


def test_a_budget_that_cannot_be_judged_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(multirun, "drive", lambda manifest, jobs: 0)
    made = jobs.plan(["seed=2,3", *SMALL, "hydra.launcher.budget=0.01"])
    assert made is not None
    assert multirun.start_sweep(made, []) == 0
    assert "hydra.launcher.budget=0.01: 2 of 2 jobs cannot be estimated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "alike"),
    [
        (["optimizer.lr=0.5", "seed=9", "task.label_smoothing=0.1", "augmentation.hflip=0.3", "loop.steps=50"], True),
        (["loop.compile=true"], False),
        (["task.loss=bce"], False),
        (["loop.batch_size=2"], False),
        (["dataset.image_size=24"], False),
    ],
)
def test_which_runs_take_as_long(overrides, alike):
    assert estimate._is_alike(compose_run(*SMALL), compose_run(*SMALL, *overrides)) is alike


def test_a_probe_where_nothing_is_known(tmp_path, monkeypatch, capsys):
    """Jobs of one kind are tried out once, and nothing is left of it."""
    monkeypatch.chdir(tmp_path)
    probes = []
    started = plan.subprocess.run
    monkeypatch.setattr(plan.subprocess, "run", lambda *arguments, **more: probes.append(1) or started(*arguments, **more))
    assert plan.main(["seed=2,3", *SMALL, "--probe=3"]) == 0
    said = capsys.readouterr().out
    assert "from a short probe on this host" in said
    assert "cannot be estimated" not in said
    assert len(probes) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--probe=many", "--probe=0", "--budget=-1"])
def test_bad_options(option):
    with pytest.raises(ConfigError, match=f"{option}: is a number of"):
        plan.main(["seed=2,3", *SMALL, option])


def test_a_search(finished, capsys):
    line = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "optimizer.lr=interval(0.1,0.2)", "seed=1,2", *SMALL]
    assert plan.main([*line, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["hours"] for row in rows] == [pytest.approx(200 / 3600)] * 12  # on one rank
    assert plan.main([*line, "--budget=0.1"]) == 2
    assert "a search of 6 trials over optimizer.lr=interval(0.1,0.2)" in capsys.readouterr().out


@pytest.mark.parametrize(("terminal", "answer", "starts"), [(False, "", False), (True, "n", False), (True, "y", True)])
def test_a_sweep_above_its_budget_asks(finished, monkeypatch, terminal, answer, starts):
    asked = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: terminal)
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    monkeypatch.setattr(multirun, "drive", lambda manifest, jobs: 0)
    made = jobs.plan(["seed=2,3", *SMALL, "hydra.launcher.budget=0.01"])
    assert made is not None
    if starts:
        assert multirun.start_sweep(made, []) == 0
    else:
        with pytest.raises(ConfigError, match=r"the budget is 0\.01\n.*try: hydra\.launcher\.budget=1"):
            multirun.start_sweep(made, [])
    assert len(asked) == terminal
    assert bool(list(Path("runs").glob("*/sweeps"))) == starts
    enough = jobs.plan(["seed=2,3", *SMALL, "hydra.launcher.budget=2"])
    assert enough is not None
    assert multirun.start_sweep(enough, []) == 0
