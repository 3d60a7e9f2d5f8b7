"""The pool: slots, crashes, signals, canaries, and a launcher that dies at any moment. Its jobs are scripts, so that it is the pool that is tested."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from tests.trainer.sweep import light
from trainer.sweep import verbs
from trainer.sweep.manifest import Manifest, driving, states
from trainer.sweep.pool import CANCEL, Pool
from trainer.sweep.slots import Slot, slots_for

SERVER = light.SERVER


def run(manifest: Manifest, slots: int = 2, said: list[str] | None = None, **more) -> int:
    pool = Pool(manifest, [Slot()] * slots, say=(said if said is not None else []).append, server=SERVER, **more)
    with driving(manifest.path):
        return pool.run([job for job in manifest.jobs if job.state != "completed"])


def times(manifest: Manifest, index: int) -> list[float]:
    ran = manifest.directory(manifest.jobs[index]).path / light.RAN
    return [float(line) for line in ran.read_text().split()] if ran.exists() else []


def how(manifest: Manifest) -> list[str]:
    return [state.state for state in states(Manifest.load(manifest.path))]


def test_every_job_runs_once_and_a_finished_one_not_again(sweep):
    manifest, said = sweep(*["work 0"] * 6), []
    assert run(manifest, said=said) == 0
    assert how(manifest) == ["completed"] * 6
    assert [len(times(manifest, n)) for n in range(6)] == [1] * 6
    assert [job.attempts for job in Manifest.load(manifest.path).jobs] == [1] * 6
    assert any("[3] seed=3 completed: best val/top1 0.5" in line for line in said)
    assert run(manifest) == 0
    assert [len(times(manifest, n)) for n in range(6)] == [1] * 6


def test_the_next_job_starts_when_a_slot_frees(sweep):
    manifest = sweep("after s3-00000000", "work 0", "work 0", "work 0")  # the first goes on until the last has begun
    assert run(manifest) == 0
    assert times(manifest, 3)[0] < times(manifest, 0)[0] + 60


def test_one_crash_touches_no_other(sweep):
    manifest, said = sweep("crash", "work 0.3", "raise", "diverge", "work 0"), []
    assert run(manifest, said=said) == 128 + 9
    assert how(manifest) == ["failed", "completed", "failed", "failed", "completed"]
    reasons = [state.reason or "" for state in states(manifest)]
    assert "killed by SIGKILL (out of memory?)" in reasons[0]
    assert reasons[2].startswith("RuntimeError: the weights are gone")
    assert reasons[3].startswith("Diverged: nan")
    assert "RuntimeError: the weights are gone" in (manifest.path / "logs" / "0002.log").read_text()
    assert any("[2] seed=2 failed: RuntimeError: the weights are gone" in line for line in said)


def test_a_job_does_what_it_has_promised_for_its_end(sweep):
    manifest = sweep("promise")
    assert run(manifest) == 0
    assert (manifest.directory(manifest.jobs[0]).path / light.LEFT).read_text() == "at the end"
    assert "a thread has ended" in (manifest.path / "logs" / "0000.log").read_text()


@pytest.mark.parametrize(("number", "code", "state"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "preempted")])
def test_a_signal_stops_all_of_them(sweep, number, code, state):
    manifest = sweep("work 60", "work 60", "work 60")

    def tell():
        while len(times(manifest, 0)) + len(times(manifest, 1)) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=tell, daemon=True).start()
    assert run(manifest) == code
    assert how(manifest) == [state, state, "queued"]
    assert all(manifest.directory(job).live_writer() is None for job in manifest.jobs)


def test_cancelling_through_the_manifests_folder(sweep):
    manifest = sweep("work 60", "work 0.2", "work 0", "work 60")

    def ask():
        while not times(manifest, 0):
            time.sleep(0.02)
        (manifest.path / CANCEL).write_text(json.dumps([0, 3]))

    threading.Thread(target=ask, daemon=True).start()
    assert run(manifest) != 0
    assert how(manifest) == ["cancelled", "completed", "completed", "cancelled"]
    assert not times(manifest, 3)


def test_canary(sweep):
    manifest = sweep("count 60", "work 0", "work 0")  # a step every 50 ms
    assert run(manifest, canary_steps=20) == 0
    began = times(manifest, 0)[0]
    assert began + 20 * 0.05 <= min(times(manifest, 1)[0], times(manifest, 2)[0]) < began + 60 * 0.05, "not before step 20, nor at its end"
    bad = sweep("diverge", "work 0", "work 0")
    for job in bad.jobs:  # the same directories: nothing is finished there
        manifest.directory(job).result_path.unlink()
        (manifest.directory(job).path / light.RAN).unlink()
        manifest.directory(job).status("queued")
    assert run(bad, canary_steps=20) == 4
    assert how(bad) == ["failed", "held", "held"]
    assert not times(bad, 1)


# A launcher that dies


def _resume_and_die(path: str, after: int) -> None:
    """`python -m trainer resume`, killed after so many writes."""
    light.die_after_writing(after)
    os._exit(verbs.resume([path]))


def in_a_process(target: Callable[..., None], *arguments: object) -> int | None:
    """Its exit code."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def test_twenty_deaths_of_the_launcher(sweep, light_jobs):
    """Killed after its first write, its second … : `resume` finds a whole manifest, and completes what is left, once."""
    manifest = sweep(*["work 0.05"] * 48)
    finished: dict[int, float] = {}
    for death in range(20):
        left = 48 - len(finished)  # `resume` marks each as queued; then the manifest is written for every start
        assert in_a_process(_resume_and_die, str(manifest.path), (1, left + 1)[death % 2] + death // 2) == -signal.SIGKILL
        for job in Manifest.load(manifest.path).jobs:  # whole, every time
            result = manifest.directory(job).result_path
            if result.exists():
                finished.setdefault(job.index, result.stat().st_mtime)
    assert 0 < len(finished) < 48, "some were done by then, and some are left"
    assert verbs.resume([str(manifest.path)]) == 0
    assert how(manifest) == ["completed"] * 48
    for index, when in finished.items():  # what was done was not done again
        assert manifest.directory(manifest.jobs[index]).result_path.stat().st_mtime == when
        assert max(times(manifest, index)) <= when


def test_the_jobs_of_a_killed_launcher_stop_and_are_waited_for(sweep, light_jobs):
    manifest = sweep("save 30", "work 0")
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(run(manifest)))
    process.start()
    while not times(manifest, 0):
        time.sleep(0.02)
    process.kill()
    process.join()
    assert how(manifest)[0] == "running", "it is saving"
    (manifest.directory(manifest.jobs[0]).path / light.SCRIPT).write_text("work 0")
    assert verbs.resume([str(manifest.path)]) == 0
    assert how(manifest) == ["completed", "completed"]
    assert len(times(manifest, 0)) == 2


# Slots


def test_cores_and_gpus_are_divided(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("trainer.surroundings.granted_cores", lambda: float("inf"))
    monkeypatch.setattr("trainer.surroundings.visible_gpus", lambda: 0)
    assert [slot.cores for slot in slots_for({}, 100)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [slot.cores for slot in slots_for({"slots": 2}, 100)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [slot.cores for slot in slots_for({}, 1)] == [()]
    assert [slot.cores for slot in slots_for({"cores_per_job": 3}, 9)] == [(0, 1, 2), (3, 4, 5)]
    monkeypatch.setattr("trainer.surroundings.visible_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot.environment for slot in slots_for({}, 9)] == [{"CUDA_VISIBLE_DEVICES": str(n)} for n in range(4)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [slot.gpus for slot in slots_for({"gpus_per_job": 2}, 9)] == [("4", "5"), ("6", "7")]
    assert [slot.cores for slot in slots_for({"gpus_per_job": 2}, 9)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [slot.gpus for slot in slots_for({"gpus_per_job": 0, "slots": 1}, 9)] == [()]  # none is not any


def test_a_job_gets_its_slot(sweep):
    manifest = sweep("work 0")
    core = min(os.sched_getaffinity(0))
    pool = Pool(manifest, [Slot((core,), ("3",))], say=lambda text: None, server=SERVER)
    assert pool.run(manifest.jobs) == 0
    assert (manifest.directory(manifest.jobs[0]).path / light.CORES).read_text() == f"[{core}] 3"
