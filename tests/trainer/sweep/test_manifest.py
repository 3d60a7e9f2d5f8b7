"""The list of jobs: whole or not there, refused where it was edited, and no better informed than the run directories."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.lock import Busy
from trainer.rundir import RunDirectory
from trainer.sweep import cluster
from trainer.sweep.manifest import FILE, Job, Manifest, counts, driving, new_directory, relative_directory, states


def job(index: int, **more) -> Job:
    return Job(index, [f"seed={index}"], {}, index, f"runs/digits/s{index}-0123abcd", **more)


@pytest.fixture
def sweep(tmp_path: Path) -> Manifest:
    path = new_directory(tmp_path / "runs" / "digits" / "sweeps")
    manifest = Manifest(path, path.name, "digits", "2026-01-01T00:00:00+00:00", ["launch.py", "-m"], "local", ["loop.epochs=1"])
    manifest.jobs = [job(0), job(1, job_id="12_1", state="failed", reason="because", attempts=2)]
    manifest.save()
    return manifest


def test_what_is_saved_is_what_is_loaded(sweep):
    assert Manifest.load(sweep.path) == sweep == Manifest.load(sweep.path / FILE)
    assert sweep.directory(sweep.jobs[0]).path == sweep.root / "runs/digits/s0-0123abcd"
    content = json.loads((sweep.path / FILE).read_text())
    assert content["version"] == 1
    assert content["jobs"][1] == {"index": 1, "overrides": ["seed=1"], "group": {}, "seed": 1, "directory": "runs/digits/s1-0123abcd",
                                  "job_id": "12_1", "state": "failed", "reason": "because", "attempts": 2, "resources": {}}  # fmt: skip


def test_it_moves_with_the_runs(sweep, tmp_path):
    (tmp_path / "runs").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere" / "runs")
    moved = Manifest.load(tmp_path / "elsewhere" / "runs" / "digits" / "sweeps" / sweep.sweep)
    assert moved.directory(moved.jobs[0]).path == tmp_path / "elsewhere/runs/digits/s0-0123abcd"
    assert relative_directory(Path("/far/away"), moved.root) == "/far/away"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "[]", "lists no jobs"),
        (lambda text: text.replace('"version": 1', '"version": 7'), "version 7"),
        (lambda text: text.replace('"state": "failed"', '"state": "fialed"'), "jobs[1].state is 'fialed'"),
        (lambda text: text.replace('"seed": 1', '"seed": "one"'), "jobs[1].seed is 'one'"),
        (lambda text: text.replace('"launcher": "local"', '"launcher": null'), "launcher must be text"),
    ],
)
def test_a_damaged_one_is_refused_in_words(sweep, damage, says):
    (sweep.path / FILE).write_text(damage((sweep.path / FILE).read_text()))
    with pytest.raises(ConfigError, match=re.escape(says)):
        Manifest.load(sweep.path)


def test_no_manifest(tmp_path):
    with pytest.raises(ConfigError, match="is not a sweep"):
        Manifest.load(tmp_path)


def test_sweeps_of_the_same_second(tmp_path):
    paths = [new_directory(tmp_path / "sweeps") for _ in range(5)]
    assert len(set(paths)) == 5


def test_one_launcher_at_a_time(sweep):
    with driving(sweep.path), pytest.raises(Busy, match="is being driven by process"), driving(sweep.path):
        pass
    with driving(sweep.path):
        pass


def _rewrite(path: str) -> None:
    manifest = Manifest.load(path)
    for n in range(100_000):
        manifest.jobs[0].attempts = n
        manifest.save()


def test_kill_9_at_any_moment_leaves_it_whole(sweep):
    for wait in (0.0, 0.001, 0.003, 0.007, 0.013):
        process = multiprocessing.get_context("fork").Process(target=_rewrite, args=(str(sweep.path),))
        process.start()
        time.sleep(0.02 + wait)
        process.kill()
        process.join()
        assert len(Manifest.load(sweep.path).jobs) == 2


# States


def _be_running(directory: RunDirectory) -> None:
    with directory.claim():
        os._exit(9)


def test_the_run_directory_has_the_last_word(sweep):
    directory = sweep.directory(sweep.jobs[0])
    assert [s.state for s in states(sweep)] == ["queued", "failed"]
    directory.status("queued", job_id="12_0")
    assert states(sweep, {"12_1": "RUNNING"})[0].state == "queued"
    sweep.jobs[0].job_id = "12_0"
    assert states(sweep, {"12_0": "CANCELLED"})[0].state == "cancelled"  # SLURM knows what never began
    with directory.claim():
        directory.status("running", step=3, total_steps=9)
        found = states(sweep)[0]
        assert (found.state, found.step, found.total_steps) == ("running", 0, None)  # numbers come with the heartbeat
        directory.status("failed", reason="Diverged: nan")
    assert (states(sweep)[0].state, states(sweep)[0].reason) == ("failed", "Diverged: nan")
    directory.status("completed")
    assert states(sweep)[0].state == "interrupted"  # without a result it is not
    directory.result_path.write_text("{}")
    assert states(sweep)[0].state == "completed"
    assert counts(states(sweep)) == {"completed": 1, "failed": 1}


def test_a_run_whose_process_is_gone_does_not_run(sweep):
    process = multiprocessing.get_context("fork").Process(target=_be_running, args=(sweep.directory(sweep.jobs[0]),))
    process.start()
    process.join()
    assert sweep.directory(sweep.jobs[0]).read_status()["state"] == "running"
    assert (states(sweep)[0].state, states(sweep)[0].reason) == ("interrupted", "its process is gone")
    sweep.jobs[0].job_id = "7"
    assert states(sweep, {"7": "PENDING"})[0].state == "queued"  # SLURM starts it again
    assert (states(sweep, {"7": "NODE_FAIL"})[0].state, states(sweep, {"7": "NODE_FAIL"})[0].reason) == ("failed", "SLURM says NODE_FAIL")


def test_a_job_that_slurm_has_lost_is_not_waited_for(sweep, monkeypatch):
    """Cancelled while it was queued, on a cluster without accounting: it has left the queue, and nobody says how."""
    answers = {"squeue": "12_0|PENDING|\n", "sacct": None}
    monkeypatch.setattr(cluster, "run", lambda *command, **more: answers[command[0]])
    assert cluster.words(["12_0", "12_1", None]) == {"12_0": "PENDING", "12_1": "GONE"}
    sweep.jobs[1].state, sweep.jobs[1].reason = "queued", None
    found = states(sweep, cluster.words(["12_1"]))[1]
    assert (found.state, found.is_final) == ("interrupted", True)
    answers["sacct"] = "12_1|CANCELLED by 0\n"
    assert cluster.words(["12_1"]) == {"12_1": "CANCELLED"}
    answers["squeue"] = answers["sacct"] = None  # no answer is no news
    assert cluster.words(["12_1"]) == {}
