"""Every way in which a job on SLURM ends, and what is said of it: by the run directory, by SLURM, by the manifest. Real SLURM, light jobs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import light_job
from tests.slurm.conftest import LARGEST_ARRAY, started
from tests.thresholds import FAILURE_SECONDS
from tests.trainer.sweep import light, light_search
from trainer.config.launcher import SlurmLauncherConfig
from trainer.errors import ConfigError, Problem
from trainer.launch.jobs import plan
from trainer.launch.multirun import plain, start_sweep
from trainer.sweep import cluster, snapshot, verbs
from trainer.sweep import slurm as ours
from trainer.sweep import watch as watching
from trainer.sweep.drive import CODE
from trainer.sweep.manifest import Job, Manifest, driving, new_directory, states
from trainer.sweep.watch import watch

SCRIPT = Path(light_job.__file__)


@pytest.fixture(autouse=True)
def _light_jobs(monkeypatch):
    """Jobs that train nothing start in a fraction of a second, and what becomes of them is asked as often."""
    monkeypatch.setattr(watching, "_ASKING_SLURM", 1.0)
    written = ours.script
    monkeypatch.setattr(ours, "script", lambda *a, **k: written(*a, **k).replace("-m trainer start", str(SCRIPT)))


@pytest.fixture
def sweep(tmp_path: Path):
    def make(*scripts: str, resources: Sequence[dict[str, Any]] = (), **settings) -> Manifest:
        path = new_directory(tmp_path / "runs" / "digits" / "sweeps")
        launcher = plain(SlurmLauncherConfig(**settings))
        manifest = Manifest(path, path.name, "digits", "", [], "slurm", [], settings=launcher, cwd=str(tmp_path))
        manifest.jobs = [Job(n, [f"seed={n}"], {}, n, f"runs/digits/{path.name}/s{n}-00000000") for n in range(len(scripts))]
        for job, own in zip(manifest.jobs, resources, strict=False):
            job.resources = own
        for job, script in zip(manifest.jobs, scripts, strict=True):
            manifest.directory(job).create()
            manifest.directory(job).config_path.write_text("")
            (manifest.directory(job).path / light.SCRIPT).write_text(script)
        manifest.save()
        return manifest

    return make


def submit(manifest: Manifest) -> list[str]:
    with driving(manifest.path):
        ours.submit(manifest, manifest.jobs)
    return [str(job.job_id) for job in manifest.jobs]


def how(manifest: Manifest) -> list[str]:
    manifest = Manifest.load(manifest.path)
    return [state.state for state in states(manifest, cluster.words([job.job_id for job in manifest.jobs]))]


def path(manifest: Manifest, index: int = 0) -> Path:
    return manifest.directory(manifest.jobs[index]).path


def times(manifest: Manifest, index: int) -> list[float]:
    ran = path(manifest, index) / light.RAN
    return [float(line) for line in ran.read_text().split()] if ran.exists() else []


def runs(manifest: Manifest, index: int = 0) -> int:
    """How often a job has started."""
    return len(times(manifest, index))


def test_honest_states(slurm, sweep):
    """Done, diverged, crashed, and an error that nobody foresaw; SLURM says FAILED of what failed."""
    manifest = sweep("work 0", "diverge", "crash", "raise")
    ids = submit(manifest)
    assert [slurm.comes(job, "COMPLETED", "FAILED") for job in ids] == ["COMPLETED", "FAILED", "FAILED", "FAILED"]
    assert how(manifest) == ["completed", "failed", "failed", "failed"]
    reasons = [state.reason or "" for state in states(manifest)]
    assert reasons[1] == "Diverged: nan"
    assert "killed" in reasons[2]
    assert "the weights are gone" in reasons[3]
    for n in range(4):  # each task's own, so that a run stops in time for its last checkpoint
        end = float((path(manifest, n) / "end0").read_text())
        assert 3000 < end - times(manifest, n)[0] <= 3601


def test_stopped_by_a_signal_it_is_queued_again_and_goes_on(slurm, sweep):
    manifest = sweep("work 60", "work 60")
    first, second = submit(manifest)
    slurm.until(lambda: runs(manifest) and runs(manifest, 1), "both running")
    (manifest.directory(manifest.jobs[0]).path / light.SCRIPT).write_text("work 0")
    slurm("scancel", "--signal=USR2", first)
    slurm.until(lambda: how(manifest)[0] == "preempted", "the first preempted")
    slurm.at_once(first, path(manifest))
    slurm.comes(first, "COMPLETED")
    assert (runs(manifest), runs(manifest, 1)) == (2, 1)  # this array task, and no other
    assert how(manifest) == ["completed", "running"]
    slurm("scancel", second)
    slurm.comes(second, "CANCELLED")
    slurm.until(lambda: how(manifest)[1] == "cancelled", "the second cancelled")
    assert slurm.word(second) == "CANCELLED"  # and not queued again


def test_preempted_by_an_urgent_job(slurm, sweep):
    """Real preemption sends SIGTERM and nothing else, and takes the nodes away."""
    manifest = sweep("work 60", "work 60")
    first, second = submit(manifest)
    slurm.until(lambda: runs(manifest) and runs(manifest, 1), "both running")
    for index in range(2):
        (path(manifest, index) / light.SCRIPT).write_text("work 0")
    slurm("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    slurm.until(lambda: how(manifest) == ["preempted", "preempted"], "both preempted")
    for index, job in enumerate((first, second)):
        slurm.at_once(job, path(manifest, index))
    assert [slurm.comes(job, "COMPLETED") for job in (first, second)] == ["COMPLETED"] * 2
    assert how(manifest) == ["completed", "completed"]
    assert (runs(manifest), runs(manifest, 1)) == (2, 2)


def test_not_queued_again_more_often_than_allowed(slurm, sweep):
    manifest = sweep("work 60", max_requeues=0)
    (job,) = submit(manifest)
    slurm.until(lambda: runs(manifest), "it runs")
    slurm("scancel", "--signal=USR1", job)
    slurm.comes(job, "FAILED")
    assert how(manifest) == ["failed"]
    assert "hydra.launcher.max_requeues=0" in (states(manifest)[0].reason or "")


def test_a_rank_killed_on_the_other_node_ends_the_job(slurm, sweep):
    manifest = sweep("work 60", nodes=2)
    (job,) = submit(manifest)
    other = path(manifest) / "rank1"
    slurm.until(lambda: runs(manifest) and other.exists() and len(other.read_text().split()) == 3, "both ranks")
    hosts = {(path(manifest) / f"rank{rank}").read_text().split()[0] for rank in range(2)}
    assert len(hosts) == 2
    os.kill(int(other.read_text().split()[2]), signal.SIGKILL)
    slurm.comes(job, "FAILED", seconds=FAILURE_SECONDS)
    assert how(manifest) == ["failed"]


def test_started_once_more_when_it_is_done_it_ends_at_once(slurm, sweep):
    manifest = sweep("work 0")
    submit(manifest)
    slurm.until(lambda: how(manifest) == ["completed"], "done")
    with driving(manifest.path):
        ours._submit(manifest, manifest.jobs, held=False, canary=False)
    slurm.comes(str(manifest.jobs[0].job_id), "COMPLETED", seconds=FAILURE_SECONDS)
    assert runs(manifest) == 1


def test_the_controller_restarts_and_accounting_is_away(slurm, sweep, monkeypatch):
    """A job that ends while slurmctld is down is known to have ended; nobody waits for sacct."""
    manifest = sweep("work 2", "crash")
    first, _ = submit(manifest)
    slurm.until(lambda: runs(manifest), "it runs")
    which = cluster.shutil.which
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None if name == "sacct" else which(name))
    os.kill(int((slurm.folder / "run" / "slurmctld.pid").read_text()), signal.SIGTERM)
    slurm.until(lambda: states(manifest)[0].state == "completed", "the first done without a controller")
    subprocess.run(["/usr/sbin/slurmctld"], check=True, capture_output=True)
    assert watch(Manifest.load(manifest.path)) == 1
    assert how(manifest) == ["completed", "failed"]
    slurm.comes(first, "COMPLETED")


def test_a_launcher_killed_after_sbatch_queues_nothing_twice(slurm, sweep, capsys):
    manifest = sweep("work 4", "work 4", "work 0")
    submit(manifest)
    slurm.until(lambda: runs(manifest) and runs(manifest, 1), "both running")
    for job in manifest.jobs:  # what the manifest says where the launcher died before it was told the ids
        job.job_id = None
    manifest.save()
    assert verbs.resume([str(manifest.path)]) == 0
    assert "nothing to start" in capsys.readouterr().out
    manifest = Manifest.load(manifest.path)
    slurm.until(lambda: how(manifest) == ["completed"] * 3, "all done")
    assert [runs(manifest, n) for n in range(3)] == [1, 1, 1]


def test_where_the_queue_does_not_answer_nothing_is_queued(slurm, sweep, monkeypatch):
    """Whoever cannot ask what is in the queue must not put it there a second time."""
    manifest = sweep("work 3")
    (job,) = submit(manifest)
    monkeypatch.setattr(cluster, "queue", lambda: None)
    manifest.jobs[0].job_id = None  # as where the launcher died before it was told
    manifest.save()
    for verb in (verbs.resume, verbs.retry):
        with pytest.raises(ConfigError, match="does not say what it has in its queue"):
            verb([str(manifest.path)])
    slurm.comes(job, "COMPLETED")
    assert runs(manifest) == 1


def test_a_second_copy_of_a_running_job_says_nothing_of_the_first(slurm, sweep):
    manifest = sweep("work 60")
    (first,) = submit(manifest)
    slurm.until(lambda: runs(manifest), "it runs")
    with driving(manifest.path):
        ours._submit(manifest, manifest.jobs, held=False, canary=False)
    slurm.comes(str(manifest.jobs[0].job_id), "FAILED")
    assert manifest.directory(manifest.jobs[0]).read_status()["state"] == "running"
    slurm("scancel", first)
    slurm.comes(first, "CANCELLED")


def _submit_and_die(manifest: Manifest, after: int) -> None:
    """Queue the jobs, and be killed after so many files were written, or as sbatch has answered."""
    light.die_after_writing(after)
    submit(manifest)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_launcher_killed_between_any_two_writes_queues_everything_once(slurm, sweep, capsys):
    sweeps = []
    for after in range(1, 9):
        manifest = sweep("work 0", "work 0", resources=[{}, {"timeout_min": 5}])  # two arrays
        process = multiprocessing.get_context("fork").Process(target=_submit_and_die, args=(manifest, after))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        verbs.resume([str(manifest.path)])
        sweeps.append(Manifest.load(manifest.path))
    for manifest in sweeps:
        slurm.until(lambda manifest=manifest: how(manifest) == ["completed"] * 2, "both done")
        assert [runs(manifest, n) for n in range(2)] == [1, 1]


def test_more_jobs_than_an_array_may_have(slurm, sweep):
    manifest = sweep(*["work 0"] * (LARGEST_ARRAY + 2))
    assert cluster.largest_array() == LARGEST_ARRAY
    arrays = [job.split("_")[0] for job in submit(manifest)]
    assert sorted(Counter(arrays).values()) == [2, LARGEST_ARRAY]
    slurm.until(lambda: how(manifest) == ["completed"] * len(arrays), "all done")
    assert [runs(manifest, n) for n in range(len(arrays))] == [1] * len(arrays)


def test_a_node_fails(slurm, sweep):
    """SLURM queues the job again, and it goes on elsewhere; the others do not notice."""
    manifest = sweep("work 60", "work 60")
    for job in manifest.jobs:
        job.resources = {"exclude": f"n{2 - job.index}"}  # the first on n1, the second on n2
    first, second = submit(manifest)
    slurm.until(lambda: runs(manifest) and runs(manifest, 1), "both running")
    for index in range(2):
        (path(manifest, index) / light.SCRIPT).write_text("work 0")
    slurm("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    try:
        slurm.until(lambda: how(manifest)[0] in ("queued", "preempted"), "the first queued again")
        slurm("scontrol", "update", f"jobid={first}", "excnodelist=")
        slurm.at_once(first, path(manifest))
        slurm.comes(first, "COMPLETED")
    finally:
        slurm("scontrol", "update", "nodename=n1", "state=resume")
    assert (path(manifest) / "rank0").read_text().split()[:2] == ["n2", "1"]
    assert (runs(manifest), runs(manifest, 1)) == (2, 1)
    slurm("scancel", second)
    slurm.until(lambda: how(manifest) == ["completed", "cancelled"], "the second cancelled")


def test_jobs_run_the_code_as_it_was(slurm, sweep):
    manifest = sweep("work 0", code="snapshot")
    snapshot.take(manifest.path / CODE)
    (job,) = submit(manifest)
    slurm.comes(job, "COMPLETED")
    assert Path((path(manifest) / "code").read_text()).is_relative_to(manifest.path / CODE)


def test_without_accounting(tmp_path, sweep):
    """Nothing knows what became of a job that is gone; nobody waits for it to be known."""
    with started(tmp_path / "sandbox", SLURM_ACCT="none") as slurm:
        manifest = sweep("work 0", "crash", "work 60", "work 60")
        ids = submit(manifest)
        slurm.until(lambda: runs(manifest, 2) and runs(manifest, 3), "the last ones running")
        slurm("scancel", ids[2])
        verbs.cancel([str(manifest.path), "3"])
        assert watch(Manifest.load(manifest.path)) == 1
        assert how(manifest) == ["completed", "failed", "interrupted", "cancelled"]


def test_a_search_goes_on_when_its_launcher_is_killed(slurm, tmp_path, monkeypatch):
    """Trials as they come, those that are not worth it ended for good, and none started twice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(light_search.SLOW, "1.5")
    line = ["model=timm", "model.name=test_vit2", "dataset.image_size=16", "hydra/sweeper=optuna", "optimizer.lr=choice(1e-2,2e-2,3e-2,4e-2,1e-8)",
            "hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=2", "hydra.sweeper.pruner=median", "hydra/launcher=slurm",
            "hydra.launcher.wait=true", "name=found"]  # fmt: skip

    def go() -> None:
        made = plan(line)
        assert made is not None
        start_sweep(made, ["launch.py", *line])

    process = multiprocessing.get_context("fork").Process(target=go)
    process.start()
    slurm.until(lambda: list(Path("runs/found").glob(f"*/{light.RAN}")), "the first trial running")
    process.kill()
    process.join()
    (home,) = Path("runs/found/sweeps").iterdir()
    assert verbs.resume([str(home), "--wait"]) == 0
    manifest = Manifest.load(home)
    found = dict(zip([job.overrides[0] for job in manifest.jobs], how(manifest), strict=True))
    assert found == {f"optimizer.lr={rate}": "completed" for rate in ("0.01", "0.02", "0.03", "0.04")} | {"optimizer.lr=1e-08": "pruned"}
    assert [runs(manifest, n) for n in range(5)] == [1] * 5
    bad = manifest.jobs[[job.overrides[0] for job in manifest.jobs].index("optimizer.lr=1e-08")]
    slurm.comes(str(bad.job_id), "COMPLETED")  # and is not queued again


def test_a_cancelled_canary_keeps_nobody_waiting_for_ever(slurm, sweep):
    manifest = sweep("count 1200", "work 0", "work 0", canary=True, canary_steps=1000)
    first, *others = submit(manifest)
    slurm.until(lambda: runs(manifest), "the first running")
    slurm("scancel", first)
    slurm.until(lambda: cluster.words([first]).get(first) == "CANCELLED", "the first gone")
    assert runs(manifest, 1) == 0
    verbs.resume([str(manifest.path)])
    assert [slurm.comes(job, "COMPLETED") for job in others] == ["COMPLETED"] * 2
    assert how(manifest) == ["cancelled", "completed", "completed"]


def test_canary(slurm, sweep):
    manifest = sweep("count 100", "work 0", "work 0", canary=True, canary_steps=20)  # 20 steps a second
    bad = sweep("diverge", "work 0", canary=True)
    ids, others = submit(manifest), submit(bad)
    assert how(manifest)[1:] == ["queued", "queued"]
    assert [slurm.comes(job, "COMPLETED") for job in ids] == ["COMPLETED"] * 3
    began = [float((path(manifest, n) / light.RAN).read_text()) for n in range(3)]
    assert began[0] + 1 <= min(began[1:]) < began[0] + 5, "not before step 20, nor only at its end"
    slurm.comes(others[0], "FAILED")
    slurm.until(lambda: how(bad) == ["failed", "held"], "the rest held")
    slurm.until(lambda: cluster.words(others).get(others[1]) in ("CANCELLED", cluster.GONE), "the rest cancelled")


def test_cancel(slurm, sweep):
    manifest = sweep("work 60", "work 60", array_parallelism=1)
    ids = submit(manifest)
    slurm.until(lambda: runs(manifest), "it runs")
    assert verbs.cancel([str(manifest.path)]) == 0
    slurm.until(lambda: set(cluster.words(ids).values()) <= {"CANCELLED", cluster.GONE}, "both cancelled")
    slurm.until(lambda: how(manifest) == ["cancelled"] * 2, "both cancelled")


# What SLURM cannot do is found out before anything is written


@pytest.mark.parametrize(
    ("settings", "key", "way_out"),
    [
        ({"partition": "mian"}, "hydra.launcher.partition", "hydra.launcher.partition=main"),
        ({"nodes": 3}, "hydra.launcher.nodes", "hydra.launcher.nodes=2"),
    ],
)
def test_asking_for_what_is_not_there(slurm, settings, key, way_out):
    with pytest.raises(ConfigError) as told:
        ours.check(SlurmLauncherConfig(**settings), [])
    problem = told.value.problems[0]
    assert isinstance(problem, Problem)
    assert (problem.key, problem.fix) == (key, way_out)
    with pytest.raises(ConfigError):
        ours.check(SlurmLauncherConfig(), [settings])  # by a rule


def test_the_same_sweep_while_it_waits_in_the_queue(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["model=timm", "model.name=test_vit2", "dataset.image_size=16", "name=twice", "hydra/launcher=slurm"]

    def go(*seeds: str) -> int:
        made = plan([*line, f"seed={','.join(seeds)}", "hydra.launcher.additional_parameters={hold: true}"])
        assert made is not None
        return start_sweep(made, [])

    assert go("1", "2") == 0
    with pytest.raises(ConfigError, match=r"job 1 \(seed=2\).*is queued by .*runs/twice/sweeps"):
        go("3", "2")
    (path,) = Path("runs/twice/sweeps").iterdir()  # nothing was written
    assert verbs.cancel([str(path)]) == 0
    assert go("3", "2") == 0
    assert verbs.cancel([str(max(Path("runs/twice/sweeps").iterdir()))]) == 0


def test_what_sbatch_refuses_is_told_in_its_words(slurm, sweep):
    manifest = sweep("work 0", account="nobody", additional_parameters={"begin": "yesterdayy"})
    with pytest.raises(ConfigError, match="sbatch refuses"):
        submit(manifest)


def test_nothing_of_an_outer_job_is_handed_on():
    outer = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "64",
        "SBATCH_PARTITION": "x",
        "PMI_RANK": "3",
        "RANK": "1",
        "MASTER_PORT": "1",
        "SLURM_CONF": "/c",
        "PATH": "/bin",
    }
    assert cluster.clean_environment(outer) == {"SLURM_CONF": "/c", "PATH": "/bin"}


def test_tasks_that_never_started():
    assert cluster.array_tasks("12_[0-2,7%4]") == ["12_0", "12_1", "12_2", "12_7"]
    assert cluster.array_tasks("12_3") == ["12_3"]
