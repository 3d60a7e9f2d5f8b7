"""Training on a real SLURM, two nodes a job: whatever interrupts it, it ends in the weights of a run that nothing interrupted."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.command import SHORT, SLOWLY
from tests.processes import finish, logs, start_ranks
from trainer.launch.jobs import plan
from trainer.launch.multirun import start_sweep
from trainer.rundir import RunDirectory
from trainer.sweep import cluster
from trainer.sweep.manifest import Manifest, states

LAUNCH = ["hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.timeout_min=30"]


@pytest.fixture
def environment(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    for name, value in SLOWLY.items():
        monkeypatch.setenv(name, value)


def queue(tmp_path: Path, *overrides: str) -> Manifest:
    line = [*LAUNCH, *SHORT, f"runs_dir={tmp_path / 'runs'}", *overrides]
    made = plan(line)
    assert made is not None
    assert start_sweep(made, ["launch.py", *line]) == 0
    (path,) = (tmp_path / "runs" / "run" / "sweeps").iterdir()
    return Manifest.load(path)


def steps(directory: RunDirectory) -> int:
    """Optimizer steps that are safe on disk."""
    return directory.metrics_path.read_text().count('"train/loss"') if directory.metrics_path.exists() else 0


def weights(directory: Path) -> str:
    return (directory / "checkpoints" / "model.safetensors.sha256").read_text().split()[0]


def unbroken(tmp_path: Path, *overrides: str) -> str:
    """The weights of the same run on two ranks of this host."""
    directory = tmp_path / "reference" / "-".join(overrides).replace("=", "")
    ranks = start_ranks(directory, [*SHORT, *overrides], 2)
    assert finish(ranks) == [0, 0], logs(directory)
    return weights(directory)


def test_a_run_on_two_nodes_is_queued_again_and_ends_in_the_same_weights(slurm, environment, tmp_path, monkeypatch):
    manifest = queue(tmp_path, "seed=5")
    (job,) = manifest.jobs
    directory = manifest.directory(job)
    slurm.until(lambda: steps(directory) >= 2, "two steps", 300)
    slurm("scancel", "--signal=USR2", str(job.job_id))
    slurm.until(lambda: directory.read_status()["state"] == "preempted", "a checkpoint", 120)
    stopped = directory.read_status()["step"]
    assert 2 <= stopped < 9
    slurm.at_once(str(job.job_id), directory.path)
    slurm.comes(str(job.job_id), "COMPLETED", "FAILED", seconds=300)
    assert states(manifest)[0].state == "completed"
    environment_json = directory.read_environment()
    assert environment_json["ranks"] == 2
    assert environment_json["variables"]["SLURM_RESTART_COUNT"] == "1"
    monkeypatch.delenv("TRAINYARD_CHECKPOINT_FAULT")
    assert weights(directory.path) == unbroken(tmp_path, "seed=5")


@pytest.mark.slow
def test_two_arms_of_three_seeds_with_everything_that_happens(slurm, environment, tmp_path, monkeypatch):
    """An array of six jobs of two nodes each: an urgent job takes the nodes, SLURM requeues, a signal, a rank killed, a job cancelled."""
    manifest = queue(tmp_path, "seed=42,195,335", "optimizer.lr=1e-3,3e-4", "hydra.launcher.array_parallelism=2")
    jobs = manifest.jobs
    of = [manifest.directory(job) for job in jobs]

    def running(index: int) -> None:
        slurm.until(lambda: steps(of[index]) >= 2, f"job {index} at step 2", 900)

    running(0)
    slurm("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    slurm.until(lambda: of[0].read_status()["state"] == "preempted", "job 0 preempted")
    running(2)
    slurm("scontrol", "requeue", str(jobs[2].job_id))
    running(3)
    slurm("scancel", "--signal=USR1", str(jobs[3].job_id))
    running(4)
    os.kill(of[4].read_status()["pid"], signal.SIGKILL)
    running(5)
    slurm("scancel", str(jobs[5].job_id))
    slurm.comes(str(jobs[4].job_id), "FAILED", seconds=120)
    for index in (0, 1, 2, 3):
        if "PENDING" in slurm("squeue", "-h", "-r", "-o", "%T", "-j", str(jobs[index].job_id)):
            slurm.at_once(str(jobs[index].job_id), of[index].path)
    for index in (0, 1, 2, 3):
        slurm.comes(str(jobs[index].job_id), "COMPLETED", seconds=900)
    found = states(manifest, cluster.words([job.job_id for job in jobs]))
    assert [state.state for state in found] == ["completed"] * 4 + ["failed", "cancelled"]
    assert "killed" in (found[4].reason or "")
    monkeypatch.delenv("TRAINYARD_CHECKPOINT_FAULT")
    for job, directory in list(zip(jobs, of, strict=True))[:4]:
        assert weights(directory.path) == unbroken(tmp_path, *job.overrides)


@pytest.mark.slow
def test_the_time_limit_is_met_with_a_checkpoint(slurm, environment, tmp_path, monkeypatch):
    """A run that needs longer than a minute, in jobs of a minute: it stops in time, and goes on in the next."""
    monkeypatch.setenv("TRAINYARD_CHECKPOINT_FAULT", "sync:6")
    manifest = queue(tmp_path, "seed=6", "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=20", "loop.epochs=5")
    (job,) = manifest.jobs
    directory = manifest.directory(job)
    slurm.until(lambda: directory.read_status().get("state") == "preempted", "the end of the first minute", 120)
    assert slurm.word(str(job.job_id)) != "TIMEOUT"
    while states(manifest)[0].state != "completed":
        slurm.until(
            lambda: "PENDING" in slurm("squeue", "-h", "-r", "-o", "%T", "-j", str(job.job_id)) or directory.is_finished(),
            "the next turn",
            120,
        )
        if not directory.is_finished():
            slurm.at_once(str(job.job_id), directory.path)
            slurm.until(lambda: directory.read_status().get("state") in ("preempted", "completed"), "its end", 120)
    monkeypatch.delenv("TRAINYARD_CHECKPOINT_FAULT")
    assert weights(directory.path) == unbroken(tmp_path, "seed=6", "loop.epochs=5")
