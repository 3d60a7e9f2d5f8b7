"""Training on a real SLURM, two nodes a job: whatever interrupts it, it ends in the weights of a run that nothing interrupted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import SHORT, SLOWLY
from tests.processes import finish, logs, start_ranks
from tests.wandb_stub_server import StubServer
from trainer.launch.jobs import plan
from trainer.launch.multirun import start_sweep
from trainer.log.wandb_sink import STEP
from trainer.rundir import RunDirectory
from trainer.sweep import cluster
from trainer.sweep.manifest import Manifest, states

LONGER = "loop.epochs=10"  # so that nothing ends before it is interrupted
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


@pytest.fixture
def wandb(monkeypatch) -> Iterator[StubServer]:
    """A stand-in for W&B's server that the jobs log to."""
    with StubServer() as server:
        for name, value in {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}.items():
            monkeypatch.setenv(name, value)
        yield server


def in_wandb(server: StubServer, manifest: Manifest, directory: RunDirectory) -> list[int]:
    """The optimizer steps that W&B has of a run, as they came. There is one run for it, in the sweep's group."""
    (run_id,) = {(directory.path / "wandb" / "run_id.txt").read_text().strip()}
    known = server.runs[run_id]
    assert (known["groupName"], known["jobType"]) == (manifest.sweep, "classification")
    return [row[STEP] for row in server.history[run_id] if "train/loss" in row]


@pytest.mark.parametrize("interruption", [pytest.param("a node fails", marks=pytest.mark.slow), "USR2"])
def test_a_run_on_two_nodes_is_queued_again_and_ends_in_the_same_weights(slurm, environment, wandb, tmp_path, monkeypatch, interruption):
    """Told to stop it saves; when a node fails it cannot. In W&B it is one run, with every step once."""
    manifest = queue(tmp_path, "seed=5", "logger=wandb")
    (job,) = manifest.jobs
    directory = manifest.directory(job)
    slurm.until(lambda: steps(directory) >= 2, "two steps", 300)
    if interruption == "USR2":
        slurm("scancel", "--signal=USR2", str(job.job_id))
        slurm.until(lambda: directory.read_status()["state"] == "preempted", "a checkpoint", 120)
        assert 2 <= directory.read_status()["step"] < 9
    else:
        slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
        slurm.until(lambda: "PENDING" in slurm("squeue", "-h", "-r", "-o", "%T", "-j", str(job.job_id)), "queued again")
        slurm("scontrol", "update", "nodename=n2", "state=resume")
    slurm.at_once(str(job.job_id), directory.path)
    slurm.comes(str(job.job_id), "COMPLETED", "FAILED", seconds=300)
    assert states(manifest)[0].state == "completed"
    environment_json = directory.read_environment()
    assert environment_json["ranks"] == 2
    assert int(environment_json["variables"]["SLURM_RESTART_COUNT"]) >= 1  # twice, where SLURM and the job both ask for it
    assert len(wandb.runs) == 1
    assert in_wandb(wandb, manifest, directory) == list(range(1, 10))
    monkeypatch.delenv("TRAINYARD_CHECKPOINT_FAULT")
    assert weights(directory.path) == unbroken(tmp_path, "seed=5")


@pytest.mark.slow
def test_two_arms_of_three_seeds_with_everything_that_happens(slurm, environment, wandb, tmp_path, monkeypatch):
    """An array of six jobs of two nodes each: an urgent job takes the nodes, SLURM requeues, a signal, a rank killed, a job cancelled."""
    manifest = queue(
        tmp_path,
        "seed=42,195,335",
        "optimizer.lr=1e-3,3e-4",
        "hydra.launcher.array_parallelism=2",
        LONGER,
        "logger=wandb",
        "logger.plots=false",
    )
    jobs = manifest.jobs
    of = [manifest.directory(job) for job in jobs]

    def kill_rank() -> None:
        status = of[4].read_status()
        assert status["state"] == "running", status
        os.kill(status["pid"], signal.SIGKILL)

    # Not waited for: where another job of the array is ending, scancel asks again for more than a minute, though the signal is sent.
    signalling = threading.Thread(target=slurm, args=("scancel", "--signal=USR1", str(jobs[3].job_id)))
    left = {
        0: lambda: slurm("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"),
        2: lambda: slurm("scontrol", "requeue", str(jobs[2].job_id)),
        3: signalling.start,
        4: kill_rank,
        5: lambda: slurm("scancel", str(jobs[5].job_id)),
    }

    def interrupted() -> bool:
        """Each when it has come to step 2, in whatever order that is: none may end in the meantime."""
        for index in [index for index in left if steps(of[index]) >= 2]:
            left.pop(index)()
            if index == 0:
                slurm.until(lambda: of[0].read_status()["state"] == "preempted", "job 0 preempted")
        return not left

    slurm.until(interrupted, "all interrupted", 1200)
    signalling.join()
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
    assert len(wandb.runs) == 6
    for directory in of[:4]:
        assert in_wandb(wandb, manifest, directory) == list(range(1, 31))
    for job, directory in list(zip(jobs, of, strict=True))[:4]:
        assert weights(directory.path) == unbroken(tmp_path, *job.overrides, LONGER)


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
