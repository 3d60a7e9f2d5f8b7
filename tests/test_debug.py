"""`debug=tiny`: every task runs, small and out of the way, in a process where breakpoint() has the terminal."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.processes import SERVER
from trainer.engine import Engine
from trainer.launch.compose import CONF, compose_run
from trainer.launch.dispatch import dispatch
from trainer.rundir import RunDirectory

TASKS = sorted(p.stem for p in CONF.glob("task/*.yaml"))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_tiny(task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    images, elsewhere = [], []
    step = Engine.train_step

    def watched(self: Engine, *arguments):
        elsewhere.append(threading.current_thread() is not threading.main_thread() or bool(multiprocessing.active_children()))
        images.append(self.loop.batch_size)
        return step(self, *arguments)

    monkeypatch.setattr(Engine, "train_step", watched)
    run = compose_run(f"task={task}", "debug=tiny", "logger.plots=false")
    runs = 1 + len(list(run.task.prerequisites(run)))  # a teacher that is trained first is as tiny
    assert dispatch(run) == 0
    assert len(images) == runs * 2 * 10
    assert max(images) <= 8
    assert not any(elsewhere)
    results = list((tmp_path / "temporary").glob("*/*/*/result.json"))
    assert len(results) == runs and all(RunDirectory(result.parent).is_finished() for result in results)
    assert [p.name for p in tmp_path.iterdir()] == ["temporary"]


def test_tiny_again_is_a_run_of_its_own(tmp_path: Path):
    """Nobody debugs a run that is finished."""
    for _ in range(2):
        small = ["model=timm", "model.name=test_vit2", "loop.epochs=1", "loop.samples_per_epoch=8", "logger.plots=false"]
        assert dispatch(compose_run("debug=tiny", *small, f"runs_dir={tmp_path}")) == 0
    assert len(list(tmp_path.glob("*/*/result.json"))) == 2


def test_a_breakpoint_in_a_task_stops_there_and_goes_on(tmp_path: Path):
    process = SERVER.Process(target=_debug, args=(str(tmp_path),))
    process.start()
    process.join(120)
    said = (tmp_path / "terminal.txt").read_text()
    assert process.exitcode == 0, said
    assert "-> return inner(self, batch, progress)" in said and "-> return self.training_step(batch, progress)" in said  # where it stands
    assert "looking at [8, 3, 16, 16] at step 0" in said
    assert "step 20/20" in said
    (result,) = tmp_path.glob("*/*/result.json")
    assert RunDirectory(result.parent).is_finished()


def _debug(directory: str) -> None:
    from tasks.classification.task import Classification

    with open(f"{directory}/terminal.txt", "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdin = io.StringIO("up\np f\"looking at {list(batch['image'].shape)} at step {progress.step}\"\nc\n")
    inner, stops = Classification.training_step, []

    def training_step(self, batch, progress):
        if not stops:
            stops.append(progress.step)
            breakpoint()  # noqa: T100
        return inner(self, batch, progress)

    Classification.training_step = training_step
    small = ["model=timm", "model.name=test_vit", "model.patch_size=4", "dataset.image_size=16", "logger.plots=false"]
    code = dispatch(compose_run("debug=tiny", *small, f"runs_dir={directory}"))
    sys.stdout.flush()
    os._exit(code)
