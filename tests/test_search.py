"""`hydra/sweeper=optuna`: proposals that follow from what is known, a launcher that may die, trials that are not worth going on with."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.processes import finish, logs, start_ranks
from tests.test_exact import MODELS
from tests.trainer.sweep import light_search
from tests.trainer.sweep.light import RAN, die_after_writing
from trainer.config.sweeper import OptunaSweeperConfig
from trainer.errors import ConfigError
from trainer.launch.jobs import plan
from trainer.launch.multirun import start_sweep, write_down
from trainer.launch.space import Axis, axes_of
from trainer.launch.study import Trial, is_hopeless, proposal
from trainer.rundir import RunDirectory
from trainer.sweep import drive, verbs
from trainer.sweep.manifest import FILE, Manifest, states

SERVER = [str(Path(light_search.__file__))]
RATE, DROP = "optimizer.lr=tag(log,interval(1e-4,1))", "model.drop_rate=interval(0,0.5)"
SMALL = ["model=timm", "model.name=test_vit2", "dataset.image_size=16", "name=found", "hydra/sweeper=optuna"]


def axes(*lines: str) -> list[Axis]:
    return [*axes_of(lines, OverridesParser.create()).values()]


def tried(space: list[Axis], count: int, known: list[Trial] | None = None, **settings) -> list[Trial]:
    """A search by itself: each trial ends before the next is asked for."""
    trials = list(known or [])
    while len(trials) < count:
        texts = proposal(space, trials, OptunaSweeperConfig(**settings), maximise=True)
        value = light_search.score(float(texts["optimizer.lr"]), float(texts["model.drop_rate"]))
        trials.append(Trial(texts, "completed", value))
    return trials


# What is tried


def test_proposals_lie_where_they_were_asked_for():
    space = axes(RATE, DROP, "loop.batch_size=int(tag(log,interval(1,1000)))", "loop.epochs=range(2,11,3)", "loop.grad=range(0.1,0.6,0.2)", "optimizer=sgd,adamw,lamb", "a=null,'x y'")  # fmt: skip
    trials: list[Trial] = []
    for n in range(30):
        texts = proposal(space, trials, OptunaSweeperConfig(n_startup_trials=5), maximise=False)
        trials.append(Trial(texts, ("completed", "failed", "pruned", "open")[n % 4], float(n), [1.0] * (n % 3)))
    column = {key: [trial.texts[key] for trial in trials] for key in trials[0].texts}
    assert all(1e-4 <= float(v) <= 1 for v in column["optimizer.lr"])
    assert all(1 <= int(v) <= 1000 for v in column["loop.batch_size"])
    assert set(column["loop.epochs"]) == {"2", "5", "8"}
    assert set(column["loop.grad"]) == {"0.1", "0.30000000000000004", "0.5"}
    assert set(column["optimizer"]) == {"sgd", "adamw", "lamb"}
    assert len(set(column["a"])) == 2
    rates = sorted(np.log10(float(v)) for v in column["optimizer.lr"][:5])
    assert rates[0] < -2 < rates[-1]  # on the scale that was asked for


def test_a_search_that_is_resumed_is_the_one_that_nothing_stopped():
    space = axes(RATE, DROP)
    whole = tried(space, 16, n_startup_trials=6)
    for cut in (0, 3, 9):
        assert tried(space, 16, whole[:cut], n_startup_trials=6) == whole
    assert tried(space, 16, n_startup_trials=6, seed=1) != whole


def test_it_finds_better_settings_than_chance_does():
    space = axes(RATE, DROP)

    def mean_of_last(startup: int, seed: int) -> float:
        return statistics.fmean(trial.value or 0 for trial in tried(space, 30, n_startup_trials=startup, seed=seed)[-10:])

    for seed in range(3):
        assert mean_of_last(8, seed) > mean_of_last(1000, seed)  # which draws them all at random


def test_the_median_is_that_of_the_completed_trials():
    generator = np.random.default_rng(0)
    space = axes(DROP)
    for _ in range(20):
        curves = generator.random((int(generator.integers(3, 6)), 4))
        known = [Trial({"model.drop_rate": "0.1"}, "completed", float(curve.max()), curve.tolist()) for curve in curves]
        open_ = generator.random(int(generator.integers(1, 5)))
        trial = Trial({"model.drop_rate": "0.2"}, "open", None, open_.tolist())
        worse = open_.max() < np.median(curves[:, len(open_) - 1])  # the best so far of the one, against where the others were by then
        settings = OptunaSweeperConfig(n_warmup_steps=0)
        assert is_hopeless(space, [*known, trial], trial, settings, maximise=True) == worse
        assert not is_hopeless(space, [*known[:2], trial], trial, settings, maximise=True)  # of two there is no median to speak of
        assert not is_hopeless(space, [*known, trial], trial, OptunaSweeperConfig(n_warmup_steps=9), maximise=True)


# A launcher, and one that dies


@pytest.fixture
def search(tmp_path: Path, monkeypatch):
    """A search whose jobs train nothing, on two slots."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drive, "Pool", functools.partial(drive.Pool, server=SERVER))

    def line(*overrides: str) -> list[str]:
        return [*SMALL, RATE, DROP, "hydra.launcher.slots=2", *overrides]

    return line


def the_sweep() -> Manifest:
    (path,) = Path("runs/found/sweeps").iterdir()
    return Manifest.load(path)


def started(manifest: Manifest) -> list[int]:
    """How often each job has begun."""
    return [len((manifest.directory(job).path / RAN).read_text().split()) for job in manifest.jobs]


def go(line: list[str]) -> int:
    made = plan(line)
    assert made is not None
    return start_sweep(made, ["launch.py", *line])


def test_a_search_from_its_command_line_to_its_best_trial(search, capsys):
    assert go(search("hydra.sweeper.n_trials=12", "hydra.sweeper.n_startup_trials=4")) == 0
    manifest = the_sweep()
    assert [state.state for state in states(manifest)] == ["completed"] * 12
    assert started(manifest) == [1] * 12
    values = [(manifest.directory(job).read_result() or {})["best"]["val/top1"] for job in manifest.jobs]
    best = max(range(12), key=lambda n: values[n])
    said = capsys.readouterr().out
    assert f"best of 12 completed trials: {' '.join(manifest.jobs[best].overrides)} with val/top1 {values[best]:.4f} (trial {best})" in said
    assert manifest.search["space"] == [RATE, DROP]
    assert verbs.resume([str(manifest.path)]) == 0  # there is nothing left
    assert len(the_sweep().jobs) == 12


def test_every_seed_of_a_trial(search):
    assert go(search("experiment=three_seeds", "name=found", "hydra.sweeper.n_trials=3")) == 0
    manifest = the_sweep()
    assert [job.seed for job in manifest.jobs] == [42, 195, 335] * 3
    assert [job.overrides[:2] for job in manifest.jobs[:3]] == [manifest.jobs[0].overrides[:2]] * 3


def _go_and_die(line: list[str], after: int) -> None:
    """Start the search or go on with it, and be killed after so many files were written."""
    die_after_writing(after)
    os._exit(verbs.resume([str(the_sweep().path)]) if Path("runs/found/sweeps").exists() else go(line))


def test_a_launcher_killed_between_any_two_writes(search, monkeypatch):
    """What is tried in the end is what a search tries that nothing has stopped, each once."""
    line = search("hydra.sweeper.n_trials=8", "hydra.sweeper.n_startup_trials=3", "hydra.sweeper.n_jobs=1")
    for after in range(1, 13):
        process = multiprocessing.get_context("fork").Process(target=_go_and_die, args=(line, after))
        process.start()
        process.join(60)
        assert not process.is_alive()
        for path in Path("runs/found/sweeps").glob(f"*/{FILE}"):
            Manifest.load(path)  # whole, every time
        for path in [path for path in Path("runs/found/sweeps").glob("*") if not (path / FILE).exists()]:
            path.rmdir()  # killed before its manifest: nothing of it would ever run
            path.parent.rmdir()
    assert verbs.resume([str(the_sweep().path)]) == 0
    manifest = the_sweep()
    assert [state.state for state in states(manifest)] == ["completed"] * 8
    times = [job.overrides for job in manifest.jobs]
    assert all(count == 1 for count in started(manifest)[:-1]), started(manifest)
    monkeypatch.chdir(Path.cwd().parent)
    (Path("unbroken")).mkdir()
    monkeypatch.chdir("unbroken")
    assert go(line) == 0
    assert [job.overrides for job in the_sweep().jobs] == times


def test_a_trial_that_is_worse_than_the_median_ends_and_is_not_started_again(search, monkeypatch, capsys):
    monkeypatch.setenv(light_search.SLOW, "1.0")
    assert go([*SMALL, "optimizer.lr=choice(1e-2,2e-2,3e-2,4e-2,1e-8)", "hydra.sweeper.n_trials=5", "hydra.launcher.slots=2", "hydra.sweeper.pruner=median"]) == 0  # fmt: skip
    manifest = the_sweep()
    found = dict(zip([job.overrides[0] for job in manifest.jobs], states(manifest), strict=True))
    bad = found.pop("optimizer.lr=1e-08")  # the others are done before anybody has looked
    assert (bad.state, {state.state for state in found.values()}) == ("pruned", {"completed"})
    assert "is worse than the median" in (bad.reason or "")
    assert "1 pruned" in capsys.readouterr().out
    assert verbs.resume([str(manifest.path)]) == 0
    assert started(the_sweep()) == [1] * 5


def test_it_gives_up_where_everything_fails(search, capsys):
    assert go(search("optimizer.weight_decay=0.5", "hydra.sweeper.max_failures=3", "hydra.launcher.slots=1")) == 1
    assert len(the_sweep().jobs) == 3
    assert "the last 3 trials have failed" in capsys.readouterr().out


def test_it_ends_where_there_is_nothing_else_to_try(search):
    assert go([*SMALL, "optimizer.lr=0.01,0.02", "model.drop_rate=0,0.1", "hydra.launcher.slots=2"]) == 0
    assert len({tuple(job.overrides) for job in the_sweep().jobs}) == len(the_sweep().jobs) == 4


def test_cancelled_it_starts_nothing_new(search, monkeypatch):
    monkeypatch.setenv(light_search.SLOW, "0.3")
    line = [*SMALL, "optimizer.lr=interval(1e-7,2e-7)", "hydra.launcher.slots=2"]
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(go(line)))
    process.start()
    while not list(Path("runs/found").glob(f"*/{RAN}")):
        assert process.is_alive()
    assert verbs.cancel([str(the_sweep().path)]) == 0
    process.join(30)
    found = [state.state for state in states(the_sweep())]
    assert set(found) == {"cancelled"}
    assert len(found) < 6


# Ended by a search, a run is whole


def test_a_pruned_run_ends_at_a_step_boundary_on_all_ranks(tmp_path):
    """With no failure, and with a checkpoint, from which the same command goes on."""
    short = [*MODELS["vit"], "loop.batch_size=16", "loop.samples_per_epoch=48", "loop.epochs=3", "loop.log_every=1", "loop.max_validation_batches=2",
             "logger.plots=false", "dataset.num_workers=0"]  # fmt: skip
    directory = RunDirectory(tmp_path / "run")
    slowly = {"TRAINYARD_CHECKPOINT_FAULT": "sync:0.3"}
    ranks = start_ranks(directory.path, [*short, "loop.checkpoint_every_steps=1"], 2, slowly)
    while not directory.metrics_path.exists() or '"step": 2' not in directory.metrics_path.read_text():
        assert all(rank.is_alive() for rank in ranks), logs(directory.path)
    directory.ask_to_prune("worse than the median")
    for rank in ranks:
        os.kill(rank.pid or 0, signal.SIGTERM)
    assert finish(ranks) == [0, 0], logs(directory.path)
    status = directory.read_status()
    assert (status["state"], status["reason"]) == ("pruned", "worse than the median")
    assert not directory.result_path.exists()
    assert finish(start_ranks(directory.path, short, 2)) == [0, 0], logs(directory.path)
    assert directory.is_finished()
    assert directory.asked_to_prune() is None


# What is wrong


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "has nothing to search"),
        ([RATE, "hydra.sweeper.n_trails=3"], "try: hydra.sweeper.n_trials=3"),
        ([RATE, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: must be >= 1"),
        ([RATE, "hydra.sweeper.pruner=hyperband"], "must be one of none, median"),
        ([RATE, "hydra.sweeper.n_jobs=90"], "more trials at a time than the 20"),
        ([RATE, "hydra/launcher=basic"], "does not run searches"),
        ([RATE, "hydra.launcher.canary=true"], "jobs that are known beforehand"),
        ([RATE, "+sweep.random=3"], "says which jobs there are"),
        ([RATE, "loop.epochs=1,2", "+sweep.zip=[optimizer.lr,loop.epochs]"], "says which jobs there are"),
        ([RATE, "loop.best_metric=train/loss", "hydra.sweeper.pruner=median"], "compares validations"),
        (["optimizer.lr=interval(0.1,0.01)"], "the lower end comes first"),
        (["optimizer.lr=interval(-1,0.1)"], "must be > 0 (job 0 of 2"),
        (["optimizer.lrr=interval(0.1,0.2)"], "there is no such key"),
        (["optimizer=adamw,sdg"], "try: optimizer=sgd"),
        (["loop.epochs=tag(log,range(1,9))"], "only an interval has a logarithmic scale"),
    ],
)
def test_bad_searches(overrides, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(says)):
        plan([*SMALL, *overrides])
    assert not list(tmp_path.iterdir())


def test_an_edited_search_is_refused_in_words(search):
    assert go(search("hydra.sweeper.n_trials=1")) == 0
    path = the_sweep().path / FILE
    whole = json.loads(path.read_text())
    for damage in (
        {"space": None},
        {"space": ["optimizer.lr=0.1"]},
        {"space": ["optimizer.lr=interval(0.5,0.6)"]},  # where its first trial does not lie
        {"n_trials": "many"},
        {"pruner": "hyperband"},
        {"repeats": [["seed=1"], ["seed=2"]]},
        {"repeats": []},
    ):
        path.write_text(json.dumps({**whole, "search": {**whole["search"], "n_trials": 2, **damage}}))
        with pytest.raises(ConfigError, match="search"):
            verbs.resume([str(path.parent)])


def test_a_search_needs_optuna_and_no_torch(search, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match=re.escape('".[optuna]"')):
        plan(search())


def test_written_down_before_its_first_trial(search):
    made = plan(search("hydra.sweeper.n_trials=2"))
    assert made is not None
    manifest = write_down(made, ["launch.py"])
    assert manifest.jobs == []
    assert verbs.resume([str(manifest.path)]) == 0
    assert len(the_sweep().jobs) == 2
