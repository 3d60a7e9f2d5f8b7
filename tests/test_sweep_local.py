"""`python launch.py -m` on this host, from the command line to trained networks; and through Hydra's own sweeper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import SHORT
from tests.test_launch import Call
from trainer.launch.compose import compose_run
from trainer.launch.door import enter
from trainer.rundir import RunDirectory, run_directory
from trainer.sweep.manifest import Manifest, states

SMALL = ["model=timm", "model.name=test_vit2", "dataset.image_size=16"]


def test_two_jobs_trained_from_a_copy_of_the_code(tmp_path):
    line = ["-m", "seed=1,2", *SHORT, "loop.epochs=1", "hydra.launcher.code=snapshot", "hydra.launcher.slots=2", "runs_dir=runs"]
    call = Call("launch", *line, cwd=tmp_path)
    assert call.code == 0, call.out + call.err
    assert call.loaded == ""  # the jobs train, not the launcher
    (path,) = (tmp_path / "runs/run/sweeps").iterdir()
    manifest = Manifest.load(path)
    assert [state.state for state in states(manifest)] == ["completed", "completed"]
    for job in manifest.jobs:
        directory = manifest.directory(job)
        assert directory.read_status()["sweep"] == f"../sweeps/{manifest.sweep}"
        assert directory.read_config().logger.wandb.group == manifest.sweep
        assert str(path / "code" / "trainer") in directory.read_environment()["argv"][1]
        assert (directory.path / "checkpoints" / "model.safetensors").exists()
    assert "2 completed" in call.out
    assert (path / "code" / "launch.py").exists()
    again = Call("launch", *line, cwd=tmp_path)
    assert again.code == 0
    assert again.out.count("is finished already") == 0  # they were never handed to the pool
    assert "2 completed" in again.out


@pytest.fixture
def finished(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, value in ((1, 0.25), (2, 0.75)):
        run = compose_run(f"seed={seed}", *SMALL)
        directory = RunDirectory(run_directory(run))
        directory.write_config(run)
        directory.result_path.write_text(json.dumps({"metric": "val/top1", "mode": "max", "best": {"val/top1": value}}))
        directory.status("completed")
    return tmp_path


def test_a_launcher_by_itself_means_a_sweep_of_one(finished, capsys):
    assert enter(lambda: pytest.fail("Hydra is not needed"), ["hydra/launcher=local", "seed=1", *SMALL]) == 0
    assert "1 completed" in capsys.readouterr().out
    (path,) = finished.glob("runs/*/sweeps/*/manifest.json")
    assert len(Manifest.load(path).jobs) == 1


def test_hydras_sweeper_gets_the_best_metric_of_each_job(finished, monkeypatch):
    """What an optimising sweeper chooses by: batch after batch, in one manifest."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext

    from trainer.launch.compose import Composer

    with Composer() as composer:
        from hydra import compose

        config = compose("config", ["hydra/launcher=local", *SMALL], return_hydra_config=True)
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=composer.loader, callbacks=Callbacks()), task_function=print, config=config
        )
    lines = list(config.hydra.overrides.task)
    found = [launcher.launch([[*lines, f"seed={seed}"]], initial_job_idx=seed - 1) for seed in (1, 2)]
    assert [job.return_value for batch in found for job in batch] == [0.25, 0.75]
    (path,) = finished.glob("runs/*/sweeps/*/manifest.json")
    assert [(job.index, job.overrides, job.seed) for job in Manifest.load(path).jobs] == [(0, ["seed=1"], 1), (1, ["seed=2"], 2)]
