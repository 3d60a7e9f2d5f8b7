"""A run that is done goes on, and what it no longer needs is deleted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.test_exact import MODELS, SHORT, assert_same_run, last, run, stop_after
from trainer.errors import ConfigError, Stopped
from trainer.launch import clean, extend
from trainer.launch.compose import compose_run
from trainer.launch.dispatch import dispatch
from trainer.lock import Lock
from trainer.run import train
from trainer.rundir import RunDirectory, run_directory

VIT = [*MODELS["vit"], "dataset.num_workers=0", "loop.ema_decay=0.9", "loop.checkpoint_every_steps=2"]


def test_an_extended_run_is_the_run_that_was_longer_from_the_start(tmp_path):
    """Bit for bit, where the schedule does not depend on the length; killed and resumed in the extension too."""
    steady = [*VIT, "scheduler=constant"]
    run(tmp_path / "long", *steady, "loop.epochs=5")
    run(tmp_path / "short", *steady)
    assert extend.main([str(tmp_path / "short"), "loop.epochs=5"]) == 0
    assert_same_run(tmp_path / "long", tmp_path / "short")
    result = json.loads((tmp_path / "short" / "result.json").read_text())
    assert result["steps"] == 15 and [row["epoch"] for row in result["history"]] == [1, 2, 3, 4, 5]
    assert RunDirectory(tmp_path / "short").read_config().loop.epochs == 5
    (extension,) = RunDirectory(tmp_path / "short").extensions()
    assert (extension["at_step"], extension["total_steps"], extension["overrides"]) == (9, 15, ["loop.epochs=5"])


STAGES = ["{epochs: 1, image_size: 8}", "{epochs: 1}", "{epochs: 2, batch_size: 24, lr_scale: 0.5}"]


def test_a_run_in_stages_takes_on_another_stage(tmp_path, monkeypatch):
    """Bit for bit the run that had it from the start; killed and resumed in the new stage."""
    network = [*VIT, "scheduler=onecycle", "loop.epochs=null"]
    whole = f"loop.stages=[{', '.join(STAGES)}]"
    run(tmp_path / "long", *network, whole)
    run(tmp_path / "short", *network, f"loop.stages=[{', '.join(STAGES[:2])}]")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped):
            extend.main([str(tmp_path / "short"), whole])
    assert last(tmp_path / "short")["step"] == 8 and len(RunDirectory(tmp_path / "short").read_config().loop.stages) == 3
    assert extend.main([str(tmp_path / "short"), whole]) == 0
    assert_same_run(tmp_path / "long", tmp_path / "short")
    for changed in ([STAGES[1], STAGES[0], STAGES[2]], [STAGES[0], "{epochs: 2}", STAGES[2], "{epochs: 1}"], STAGES[:2]):
        with pytest.raises(ConfigError, match=r"loop\.stages=. stages: the stages that an extended run has come first"):
            extend.main([str(tmp_path / "short"), f"loop.stages=[{', '.join(changed)}]"])


def test_an_extension_that_is_stopped_goes_on_by_either_command(tmp_path, monkeypatch, capsys):
    command = [*SHORT, *VIT, f"runs_dir={tmp_path}", "name=run"]
    first = compose_run(*command)
    directory = run_directory(first)
    for path in (directory, tmp_path / "unbroken"):
        train(first, RunDirectory(path))

    def extended(path: Path = directory) -> int:
        return extend.main([str(path), "loop.steps=14", "optimizer.lr=1e-4"])

    assert extended(tmp_path / "unbroken") == 0
    for step, go_on in (
        (10, extended),
        (11, lambda: dispatch(compose_run(*command))),
        (12, lambda: extend.main([str(directory), "loop.steps=14"])),
    ):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Stopped):
                go_on()
        assert ("was extended since" in capsys.readouterr().out) == (step == 11)
    assert extended() == 0
    assert last(directory)["step"] == 14 and len(RunDirectory(directory).extensions()) == 1
    assert_same_run(tmp_path / "unbroken", directory)
    assert dispatch(compose_run(*command)) == 0, "and then says that it is done"
    assert "finished" in capsys.readouterr().out


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("done") / "run"
    run(directory, *VIT)
    return directory


REFUSED = {
    "shorter": (["loop.epochs=2"], "loop.epochs=2: the run has 9 steps behind it already, and this is 6 in all\n    try: loop.epochs=6"),
    "the data": (["loop.epochs=5", "dataset=synthetic"], "dataset=SyntheticConfig: an extended run stays the run it is"),
    "the batch": (["loop.epochs=5", "loop.batch_size=8"], "loop.batch_size=8: an extended run stays"),
    "the seed": (["loop.epochs=5", "seed=1"], "seed=1: an extended run stays"),
    "the optimizer's memory": (["loop.epochs=5", "optimizer.weight_decay=0.5"], "optimizer.weight_decay=0.5: an extended run stays"),
    "another place": (["loop.epochs=5", "version=b"], "version=b: the run stays where it is"),
    "stages where there were none": (
        ["loop.stages=[{epochs: 3}, {epochs: 2}]", "loop.epochs=5"],
        "loop.stages=2 stages: this run has none",
    ),
    "no key": (["loop.epoch=5"], "loop.epoch=5: there is no such key\n    try: loop.epochs=5"),
    "a schedule that does not fit": (["loop.steps=12", "scheduler.warmup_steps=13"], "scheduler.warmup_steps=13"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_extension_cannot_change(case, done):
    arguments, message = REFUSED[case]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        extend.main([str(done), *arguments])
    assert RunDirectory(done).is_finished() and not RunDirectory(done).extensions()


def test_the_same_length_is_said_to_be_done(done, capsys):
    assert extend.main([str(done), "loop.epochs=3"]) == 0
    assert "This run is finished" in capsys.readouterr().out


def test_nothing_to_extend(tmp_path, done):
    with pytest.raises(ConfigError, match="no such directory"):
        extend.main([str(tmp_path / "nowhere"), "loop.epochs=5"])
    (tmp_path / "config.yaml").write_text((done / "config.yaml").read_text())
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        extend.main([str(tmp_path), "loop.epochs=5"])


def test_one_writer(done):
    lock = Lock(done)
    lock.acquire()
    try:
        with pytest.raises(ConfigError, match="is being written by"):
            extend.main([str(done), "loop.epochs=5"])
    finally:
        lock.release()
    assert not RunDirectory(done).extensions()


def test_the_best_is_of_one_metric_and_the_end_that_was_chosen(tmp_path):
    """Of an error, less is better; unless somebody says otherwise."""
    for mode, choose in (("min", min), ("max", max)):
        result = run(tmp_path / mode, *VIT, "loop.best_metric=val/loss", f"loop.best_mode={mode}")
        losses = {row["step"]: row["val/loss"] for row in result["history"]}
        assert (result["metric"], result["mode"], result["best"]["step"]) == (
            "val/loss",
            mode,
            choose(losses, key=lambda step: losses[step]),
        )
        best = torch.load(tmp_path / mode / "checkpoints" / "best.pt", weights_only=True)
        assert best["step"] == result["best"]["step"] and best["config"]["loop"]["best_mode"] == mode, "hyper-parameters are in it"


# --- clean --------------------------------------------------------------------------------------------------------------


def made(directory: Path, state: str) -> RunDirectory:
    """A run's files, with the sizes that matter: `epoch-0002` and `last` are one file."""
    found = RunDirectory(directory)
    found.checkpoints.mkdir(parents=True)
    for name, size in (("best", 1000), ("epoch-0001", 3000), ("previous", 5000), ("last", 7000)):
        (found.checkpoints / f"{name}.pt").write_bytes(bytes(size))
        (found.checkpoints / f"{name}.pt.sha256").write_text("")
    os.link(found.checkpoints / "last.pt", found.checkpoints / "epoch-0002.pt")
    (found.checkpoints / "old.pt.damaged").write_bytes(bytes(500))
    (found.checkpoints / "model.safetensors").write_bytes(bytes(10))
    (directory / "config.yaml").write_text("name: run\n")
    (directory / "status.json").write_text(json.dumps({"state": state}))
    (directory / "result.json").write_text("{}")
    return found


def test_old_checkpoints_of_what_is_done_go(tmp_path, capsys):
    finished, failed = made(tmp_path / "a" / "s0", "completed"), made(tmp_path / "b" / "s0", "failed")
    before = sorted(p for p in tmp_path.rglob("*"))
    assert clean.main([str(tmp_path), "--dry-run"]) == 0
    assert sorted(p for p in tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert (
        "3 checkpoints would be deleted, 0.0 MB; 1 finished runs, 1 others left alone" in said
        and f"{failed}: not finished, left alone" in said
    )
    assert clean.space_of(clean.superfluous(finished)) == 3000 + 5000 + 500, "epoch-0002 lives on as last"
    assert clean.main([str(tmp_path)]) == 0
    assert {p.name for p in finished.checkpoints.iterdir()} == {
        "best.pt",
        "best.pt.sha256",
        "last.pt",
        "last.pt.sha256",
        "model.safetensors",
    }
    assert len(list(failed.checkpoints.iterdir())) == 11
    assert clean.main([str(finished)]) == 0 and "0 checkpoints deleted" in capsys.readouterr().out


def test_a_run_that_is_being_written_is_left_alone(tmp_path, capsys):
    finished = made(tmp_path / "a", "completed")
    lock = Lock(finished.path)
    lock.acquire()
    try:
        assert clean.main([str(tmp_path)]) == 0
    finally:
        lock.release()
    assert (finished.checkpoints / "epoch-0001.pt").exists() and "left alone" in capsys.readouterr().out


def test_no_run_to_clean(tmp_path):
    with pytest.raises(ConfigError, match="there is no run in it"):
        clean.main([str(tmp_path)])
    with pytest.raises(ConfigError, match="there is no such directory"):
        clean.main([str(tmp_path / "nowhere")])
