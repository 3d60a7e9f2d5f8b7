"""The same command finds the same directory; one process writes there; what it writes can be trusted."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import field, replace
from enum import Enum
from pathlib import Path

import pytest

from tasks.classification.config import ClassificationConfig
from trainer import lock, rundir
from trainer.config import DatasetConfig, LoggerConfig, LoopConfig, Mode, PrecisionConfig, Resume, RunConfig, SchedulerConfig, setting
from trainer.config.augmentation import AugmentationConfig
from trainer.config.model import TimmModel
from trainer.config.optimizer import AdamW, ParamRule, Sgd
from trainer.config.run import DebugConfig, DistributedConfig
from trainer.errors import ConfigError, Interrupted, Stopped, StorageError
from trainer.files import sha256_of, write_atomically
from trainer.identity import differences, identity
from trainer.rundir import RunDirectory, run_directory


@pytest.fixture
def run(tmp_path) -> RunConfig:
    """A run written by hand: no composition is needed for one."""
    return RunConfig(
        name="trial",
        version="s0",
        runs_dir=str(tmp_path / "runs"),
        task=ClassificationConfig(),
        model=TimmModel(name="vit_tiny_patch16_224", args={"b": 1, "a": 2}),
        dataset=DatasetConfig(image_size=32),
        augmentation=AugmentationConfig(hflip=0.5, crop_scale=None, val_crop=0.875),
        optimizer=AdamW(lr=1e-3, weight_decay=0.05, rules=[ParamRule(pattern="head", lr_factor=10)]),
        scheduler=SchedulerConfig(),
        precision=PrecisionConfig(autocast=None, tf32=False),
        distributed=DistributedConfig(mode=Mode.auto),
        loop=LoopConfig(),
        logger=LoggerConfig(),
        debug=DebugConfig(),
    )


def changed(run: RunConfig, key: str, value: object) -> RunConfig:
    """A copy of `run` with one dotted key set."""
    run = copy.deepcopy(run)
    *groups, name = key.split(".")
    node = run
    for group in groups:
        node = getattr(node, group)
    assert hasattr(node, name)
    setattr(node, name, value)
    return run


class TestIdentity:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("seed", 1),
            ("loop.batch_size", 65),
            ("loop.epochs", 3),
            ("optimizer.lr", 2e-3),
            ("optimizer.rules", []),
            ("model.name", "resnet18"),
            ("model.args", {"a": 2}),
            ("dataset.mean", [0.0, 0.0, 0.0]),
            ("augmentation.crop_scale", [0.1, 1.0]),
            ("precision.autocast", "bfloat16"),
            ("debug.overfit", True),
            ("optimizer", Sgd(lr=1e-3, weight_decay=0.05)),
        ],
    )
    def test_what_can_change_the_result_changes_it(self, run, key, value):
        assert identity(changed(run, key, value)) != identity(run)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("name", "other"),
            ("runs_dir", "/elsewhere"),
            ("resume", Resume.never),
            ("loop.accumulate", 4),
            ("loop.log_every", 1),
            ("loop.compile", True),
            ("loop.checkpoint_every_steps", 7),
            ("distributed.processes", 2),
            ("distributed.mode", Mode.local),
            ("dataset.num_workers", 3),
            ("logger.wandb.enabled", True),
            ("logger.wandb.tags", ["a"]),
            ("debug.anomaly", True),
        ],
    )
    def test_what_cannot_change_the_result_does_not(self, run, key, value):
        assert identity(changed(run, key, value)) == identity(run)

    def test_no_field_is_forgotten(self, run):
        """Every identity field of the whole tree, changed one at a time, changes the hash."""
        seen = {identity(run)}
        count = 0
        for key, _ in _leaves(run):
            other = identity(changed(run, key, "something else entirely"))
            assert other not in seen, key
            seen.add(other)
            count += 1
        assert count > 40

    def test_spelling_does_not_matter(self, run):
        assert identity(changed(run, "model.args", {"a": 2, "b": 1})) == identity(run)
        assert identity(changed(run, "model.args", {"a": 2.0, "b": 1})) == identity(run)
        assert identity(changed(run, "optimizer.lr", float("1e-3"))) == identity(changed(run, "optimizer.lr", float("0.00100")))
        assert identity(changed(run, "augmentation.val_crop", 1)) == identity(changed(run, "augmentation.val_crop", 1.0))
        assert identity(changed(run, "augmentation.crop_ratio", (0.75, 4 / 3))) == identity(run)

    def test_other_processes_agree(self, run):
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]);"
            "from trainer.config import *; from trainer.config.optimizer import AdamW; from trainer.identity import identity;"
            "print(identity(AdamW(lr=1e-3, weight_decay=0.05, no_decay=['x'])), 'torch' in sys.modules)"
        )
        for seed in ("0", "1"):
            root = str(Path(rundir.__file__).parents[1])
            done = subprocess.run(
                [sys.executable, "-c", code, root], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
            )
            assert done.stdout.split() == [identity(AdamW(lr=1e-3, weight_decay=0.05, no_decay=["x"])), "False"]

    def test_it_is_the_same_on_the_day_it_is_run_again(self):
        """A change of this value strands every run on users' disks: it needs a reason and a line in the changelog."""
        assert identity(AdamW(lr=1e-3, weight_decay=0.05)) == "3bda987a"

    def test_fields_and_groups_added_later_leave_old_runs_where_they_are(self):
        part = dataclasses.make_dataclass("Part", [("size", int, setting()), ("old", float, setting(0.5))])
        whole = dataclasses.make_dataclass("Whole", [("part", part, setting())])
        before = identity(whole(part(3)))

        extra = dataclasses.make_dataclass("Extra", [("on", bool, setting(False))])
        new_part = dataclasses.make_dataclass(
            "Part", [("size", int, setting()), ("old", float, setting(0.5)), ("new", list, setting([1.0]))]
        )
        new_fields = [("part", new_part, setting()), ("extra", extra, setting()), ("more", extra, field(default_factory=extra))]
        new_whole = dataclasses.make_dataclass("Whole", new_fields)

        assert identity(new_whole(new_part(3), extra())) == before
        assert identity(new_whole(new_part(3, new=[2.0]), extra())) != before
        assert identity(new_whole(new_part(3), extra(on=True))) != before
        assert identity(new_whole(new_part(3), extra(), extra(on=True))) != before

    def test_differences_see_what_the_hash_leaves_out(self, run):
        other = changed(changed(run, "optimizer.lr", 0.5), "loop.log_every", 3)
        assert differences(run, other) == [("optimizer.lr", 0.001, 0.5)]
        assert ("optimizer", "AdamW", "Sgd") in differences(run, changed(run, "optimizer", Sgd(lr=1e-3, weight_decay=0.05)))
        assert differences(run, copy.deepcopy(run)) == []


def _leaves(config, at=""):
    for f in dataclasses.fields(config):
        key, value = f"{at}.{f.name}" if at else f.name, getattr(config, f.name)
        if not f.metadata.get("identity", True):
            continue
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, key)
        else:
            yield key, value


class TestPlace:
    def test_the_same_command_finds_the_same_directory(self, run, tmp_path):
        path = run_directory(run)
        assert path == tmp_path / "runs" / "trial" / f"s0-{identity(run)}"
        assert not path.exists()  # asking where it is makes nothing
        RunDirectory(path).create()
        assert run_directory(copy.deepcopy(run)) == path
        assert run_directory(changed(run, "loop.accumulate", 2)) == path

    def test_never_makes_a_new_one_beside_it(self, run):
        run = replace(run, resume=Resume.never)
        first = run_directory(run)
        assert [run_directory(run).name for _ in range(2)] == [f"{first.name}-2", f"{first.name}-3"]

    def test_never_gives_each_of_many_at_once_its_own(self, run):
        run = replace(run, resume=Resume.never)
        got: list[Path] = []
        threads = [threading.Thread(target=lambda: got.append(run_directory(run))) for _ in range(16)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(set(got)) == 16 and all(p.is_dir() for p in got)

    def test_must_wants_a_checkpoint(self, run):
        run = replace(run, resume=Resume.must)
        with pytest.raises(ConfigError, match="resume=must"):
            run_directory(run)
        directory = RunDirectory(run_directory(replace(run, resume=Resume.auto)))
        directory.checkpoints.mkdir(parents=True)
        (directory.checkpoints / "last.pt").touch()
        assert run_directory(run) == directory.path

    @pytest.mark.parametrize("name", ["", "../up", "/abs", "a/../b", ".hidden", "-v"])
    def test_a_name_stays_inside_runs_dir(self, run, name):
        with pytest.raises(ConfigError, match="name"):
            run_directory(replace(run, name=name))
        with pytest.raises(ConfigError, match="version"):
            run_directory(replace(run, version=name))


class TestStatus:
    def test_from_start_to_end(self, run, tmp_path):
        directory = RunDirectory(tmp_path / "r")
        with directory.claim():
            first = directory.read_status()
            assert first["state"] == "running" and first["pid"] == os.getpid() and first["host"]
            assert set(first) == {"state", "step", "total_steps", "heartbeat", "host", "pid", "job_id", "reason"}
            assert directory.live_writer() is not None
            directory.status("running", step=3, total_steps=10)
            directory.status("completed")
            assert directory.read_status()["step"] == 3
        assert directory.read_status()["state"] == "completed"
        assert directory.live_writer() is None
        assert not directory.is_finished()  # there is no result
        directory.write_result(dict.fromkeys(rundir.RESULT_KEYS))
        assert directory.is_finished()

    def test_numbers_reach_the_disk_with_the_heartbeat(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
        directory = RunDirectory(tmp_path / "r")
        with directory.claim():
            before = directory.read_status()["heartbeat"]
            directory.status("running", step=5)
            deadline = time.monotonic() + 10
            while directory.read_status()["step"] != 5:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert directory.read_status()["heartbeat"] > before

    def test_saying_the_step_is_cheap(self, tmp_path):
        """At every log line, so far below a millisecond: nothing is written."""
        directory = RunDirectory(tmp_path / "r")
        with directory.claim():
            times = []
            for step in range(100):
                started = time.perf_counter()
                directory.status("running", step=step)
                times.append(time.perf_counter() - started)
        assert sorted(times)[50] < 1e-4

    @pytest.mark.parametrize(
        ("error", "state"),
        [
            (RuntimeError("boom"), "failed"),
            (Stopped("told"), "preempted"),
            (Interrupted("ctrl-c"), "interrupted"),
            (KeyboardInterrupt(), "interrupted"),
        ],
    )
    def test_how_it_ended_is_written_down(self, tmp_path, error, state):
        directory = RunDirectory(tmp_path / "r")
        with pytest.raises(type(error)), directory.claim():
            raise error
        status = directory.read_status()
        assert status["state"] == state and type(error).__name__ in status["reason"]
        with directory.claim():  # the next start forgets the reason
            assert directory.read_status()["reason"] is None

    def test_a_full_disk_at_the_end_does_not_hide_what_ended_the_run(self, tmp_path, monkeypatch):
        def full(path, *_, **__):
            raise StorageError(f"cannot write {path}: the disk is full")

        def doomed_run():
            with RunDirectory(tmp_path / "r").claim():
                monkeypatch.setattr(rundir, "write_atomically", full)
                monkeypatch.setattr(lock, "write_atomically", full)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            doomed_run()

    def test_what_was_said_before_an_error_stands(self, tmp_path):
        directory = RunDirectory(tmp_path / "r")

        def cancelled_run():
            with directory.claim():
                directory.status("cancelled", reason="by hand")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            cancelled_run()
        assert directory.read_status()["state"] == "cancelled"

    def test_a_launcher_marks_a_job_it_does_not_run(self, tmp_path):
        directory = RunDirectory(tmp_path / "r")
        directory.status("queued", job_id="12")
        assert directory.read_status()["state"] == "queued" and directory.read_status()["job_id"] == "12"
        directory.status("cancelled", reason="asked to")
        assert directory.read_status()["job_id"] == "12"

    def test_two_writers(self, tmp_path):
        directory = RunDirectory(tmp_path / "r")
        with directory.claim():
            with pytest.raises(lock.Busy), RunDirectory(tmp_path / "r").claim():
                pass
            with pytest.raises(lock.Busy, match=str(os.getpid())):
                RunDirectory(tmp_path / "r").refuse_second_writer()
            assert directory.read_status()["state"] == "running"  # the refused one left no trace
        directory.refuse_second_writer()

    def test_a_writer_that_was_displaced_stops(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
        directory = RunDirectory(tmp_path / "r")

        def displaced_run():
            with directory.claim():
                (tmp_path / "r" / ".lock-000009").write_text("{}")
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline:
                    directory.status("running", step=1)
                    time.sleep(0.02)

        with pytest.raises(StorageError, match="taken over"):
            displaced_run()

    def test_many_readers_never_see_half_a_status(self, tmp_path):
        directory = RunDirectory(tmp_path / "r")
        stop, torn = threading.Event(), []

        def read():
            while not stop.is_set():
                try:
                    json.loads(directory.status_path.read_text())
                except ValueError:
                    torn.append(1)

        directory.status("queued")
        reader = threading.Thread(target=read)
        reader.start()
        for step in range(200):
            write_atomically(directory.status_path, json.dumps({"state": "running", "step": step, "padding": "x" * 5000}), durable=False)
        stop.set()
        reader.join()
        assert not torn


class TestFiles:
    def test_config_round_trip(self, run, tmp_path):
        directory = RunDirectory(tmp_path / "r")
        directory.write_config(run)
        again = directory.read_config()
        assert again == run and identity(again) == identity(run)
        assert directory.changes(run) == []
        assert directory.changes(changed(run, "loop.epochs", 4)) == [("loop.epochs", None, 4)]

    def test_no_config_is_no_run(self, tmp_path):
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            RunDirectory(tmp_path).read_config()

    def test_a_broken_config_is_a_storage_error(self, tmp_path):
        (tmp_path / "config.yaml").write_text("a: [")
        with pytest.raises(StorageError, match=r"config\.yaml"):
            RunDirectory(tmp_path).read_config()

    def test_json_is_json(self, tmp_path):
        directory = RunDirectory(tmp_path)
        directory.write_result(dict.fromkeys(rundir.RESULT_KEYS) | {"best": {"val/loss": float("nan")}, "history": [{"x": float("inf")}]})

        def refuse(constant):
            raise AssertionError(constant)

        result = json.loads(directory.result_path.read_text(), parse_constant=refuse)
        assert result["best"]["val/loss"] is None and directory.read_result() == result

    def test_write_atomically(self, tmp_path):
        path = tmp_path / "x"
        write_atomically(path, "one")
        write_atomically(path, b"two", durable=False)
        assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["x"]
        assert sha256_of(path) == sha256_of(path, from_disk=True)
        with pytest.raises(StorageError, match="runs_dir"):
            write_atomically(path / "under a file", "three")
        assert path.read_text() == "two"

    def test_a_directory_that_cannot_be_made_is_exit_5(self, tmp_path, run):
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="runs_dir") as refused:
            RunDirectory(tmp_path / "file" / "r").create()
        assert refused.value.exit_code == 5
        with pytest.raises(StorageError):
            run_directory(replace(run, runs_dir=str(tmp_path / "file"), resume=Resume.never))


def test_an_enum_and_a_path_have_one_spelling():
    class Colour(Enum):
        red = "r"

    config = dataclasses.make_dataclass("Config", [("colour", Colour, setting()), ("path", Path, setting())])
    assert identity(config(Colour.red, Path("a/b"))) == identity(config("red", "a/b"))
