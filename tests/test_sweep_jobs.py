"""From `-m ...` to the list of jobs: as Hydra composes them, all checked before anything exists, and fast."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest

from tests.test_launch import Call
from tests.thresholds import SWEEP_SECONDS_PER_JOB
from trainer.errors import ConfigError
from trainer.launch.compose import compose_run
from trainer.launch.jobs import Plan, plan
from trainer.rundir import RunDirectory, run_directory

SMALL = ["model=timm", "model.name=test_vit2", "dataset.image_size=16"]
AXES = ["seed=42,195,335", "optimizer.lr=1e-3,3e-4", "optimizer=adamw,sgd", "loop.steps=10,20", "scheduler=cosine,onecycle", "augmentation.mixup=0,0.2",
        "model=resnet18,vit_s", "loop={batch_size:32},{batch_size:64}", "scheduler.warmup_epochs=0,1", "precision=fp32,bf16",
        "optimizer.weight_decay=0.1", "loop.ema_decay=null,0.99", "name=a,b", "dataset=digits", "debug=tiny", "task=classification"]  # fmt: skip


def planned(*overrides: str) -> Plan:
    made = plan(overrides)
    assert made is not None
    return made


@pytest.fixture
def launch(tmp_path: Path):
    return lambda *arguments, **environment: Call("launch", *arguments, cwd=tmp_path, **environment)


# What they are


@pytest.mark.parametrize("seed", range(3))
def test_every_job_is_what_its_own_command_line_composes(seed):
    """The short cut gives the very run that composing each job from the beginning gives."""
    chosen = random.Random(seed).sample(AXES, 5)
    made = planned(*chosen, "version=v${seed}")
    for job in random.Random(seed).sample(made.jobs, min(3, len(made.jobs))):
        assert job.run == compose_run(*made.base, *job.overrides)


def test_jobs_are_multiplied_out_in_order():
    made = planned("seed=1,2", "optimizer.lr=0.1,0.2", "loop.epochs=3")
    assert made.base == ["loop.epochs=3"]
    assert [job.overrides for job in made.jobs] == [[f"seed={s}", f"optimizer.lr={lr}"] for s in (1, 2) for lr in ("0.1", "0.2")]
    assert made.jobs[3].group == {"optimizer.lr": 0.2}
    assert made.jobs[3].run.seed == 2
    assert made.run.seed == 0  # the sweep is named by what its jobs have in common


def test_one_job_without_a_sweep():
    (job,) = planned("seed=3", "hydra/launcher=local").jobs
    assert (job.overrides, job.group, job.run.seed) == ([], {}, 3)


def test_ranges_globs_and_choices():
    assert [job.run.seed for job in planned("seed=range(1,4)").jobs] == [1, 2, 3]
    names = {job.run.name for job in planned("optimizer=glob(*,exclude=[timm,l*])", "name=${hydra:runtime.choices.optimizer}").jobs}
    assert {"adamw", "sgd"} <= names
    assert planned("optimizer=adamw,sgd").jobs[1].group == {"optimizer": "sgd"}


def test_zipped():
    made = planned("seed=1,2", "optimizer.lr=0.1,0.2", "loop.batch_size=16,32", "+sweep.zip=[optimizer.lr,loop.batch_size]")
    assert [(j.run.seed, j.run.optimizer.lr, j.run.loop.batch_size) for j in made.jobs] == [(1, 0.1, 16), (1, 0.2, 32), (2, 0.1, 16), (2, 0.2, 32)]  # fmt: skip
    with pytest.raises(ConfigError, match=r"optimizer\.lr has 3, loop\.batch_size has 2"):
        plan(["optimizer.lr=1,2,3", "loop.batch_size=16,32", "+sweep.zip=[optimizer.lr,loop.batch_size]"])
    with pytest.raises(ConfigError, match=r"sweep\.zip=seed: is not swept"):
        plan(["optimizer.lr=0.1,0.2", "+sweep.zip=[optimizer.lr,seed]"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("jobs.yaml", "- {optimizer.lr: 0.1, seed: 1}\n- [optimizer.lr=0.2, seed=2]\n"),
        ("jobs.csv", "optimizer.lr,seed\n0.1,1\n0.2,2\n"),
    ],
)
def test_from_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    made = planned(f"+sweep.file={tmp_path / name}", "loop.epochs=2")
    assert [(job.run.optimizer.lr, job.run.seed) for job in made.jobs] == [(0.1, 1), (0.2, 2)]
    (tmp_path / name).write_text("3")
    with pytest.raises(ConfigError):
        plan([f"+sweep.file={tmp_path / 'absent.yaml'}"])


def test_resources_follow_the_config():
    rules = "hydra.launcher.resources=[{when: {model: vit_s}, then: {gpus_per_node: 2, timeout_min: 90}}, {when: {loop.batch_size: '>=64'}, then: {mem_gb: 64}}]"
    made = planned("hydra/launcher=slurm", "model=resnet18,vit_s", "loop.batch_size=32,64", rules)
    assert [job.resources for job in made.jobs] == [{}, {"mem_gb": 64}, {"gpus_per_node": 2, "timeout_min": 90}, {"gpus_per_node": 2, "timeout_min": 90, "mem_gb": 64}]  # fmt: skip
    with pytest.raises(ConfigError, match=r"is no resource.*\n.*try: mem_gb"):
        plan(["hydra/launcher=slurm", "hydra.launcher.resources=[{when: {model: digits}, then: {mem_bg: 1}}]"])


def test_a_batch_is_checked_against_the_ranks_it_will_be_cut_into():
    with pytest.raises(ConfigError, match="cut up evenly into 6 ranks"):
        plan(["hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=3", "seed=1,2"])


# What is wrong


def test_a_typo_in_one_of_a_hundred_jobs_stops_them_all(launch, tmp_path):
    call = launch("-m", "seed=range(0,50)", "optimizer.lr=0.1,-1", *SMALL)
    assert call.code == 2
    assert "optimizer.lr=-1.0: must be > 0" in re.sub(r"\s+", " ", call.err)
    assert "(job 1 of 100: seed=0 optimizer.lr=-1 and 49 more)" in re.sub(r"\s+", " ", call.err)
    assert call.loaded == ""
    assert not list(tmp_path.iterdir())


def test_a_key_that_only_some_choices_have():
    with pytest.raises(ConfigError, match=r"this optimizer has no momentum.*\(job 0 of 4: optimizer=adamw optimizer\.momentum=0\.8\)"):
        plan(["optimizer=adamw,sgd", "optimizer.momentum=0.8,0.9"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["seed=1,1"], "is the same run as"),
        (["dataset.num_workers=0,1"], "cannot change a result"),
        (["hydra.launcher.slotz=2"], "try: hydra.launcher.slots=2"),
        (["hydra.launcher.slots=many"], "hydra.launcher.slots=many: must be a whole number"),
        (["hydra.launcher.slots=0"], "hydra.launcher.slots=0: must be >= 1"),
        (["hydra.launcher.gpus_per_job=64"], "64 GPUs are asked for"),
        (["hydra/launcher=slrum"], "hydra/launcher"),
        (["hydra.job.chdir=true"], "is Hydra's"),
        (["seed=1,2", "optimizer.lr=interval(0,1)"], "is a range to be searched"),
        (["modle=resnet18,vit_s"], "try: model=resnet18"),
    ],
)
def test_bad_sweeps(overrides, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        plan(overrides)


def test_no_sbatch_here(launch, tmp_path):
    call = launch("-m", "hydra/launcher=slurm", "seed=1,2", PATH="/nowhere")
    assert call.code == 2
    assert "there is no sbatch on this host" in call.err
    assert call.loaded == ""
    assert not list(tmp_path.iterdir())


# What is there afterwards


def test_a_finished_sweep_is_written_down_and_not_run_again(launch, tmp_path, monkeypatch):
    """Torch-free from the beginning to the end, as there is nothing to train."""
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        run = compose_run(f"seed={seed}", *SMALL)
        directory = RunDirectory(run_directory(run))
        directory.write_config(run)
        directory.result_path.write_text("{}")
        directory.status("completed")
    call = launch("-m", "seed=1,2", *SMALL)
    assert (call.code, call.loaded) == (0, ""), call.err
    assert "2 completed" in call.out
    (path,) = tmp_path.glob("runs/*/sweeps/*/manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["argv"] == ["launch.py", "-m", "seed=1,2", *SMALL]
    assert [(job["seed"], job["state"], job["overrides"]) for job in manifest["jobs"]] == [
        (1, "completed", ["seed=1"]),
        (2, "completed", ["seed=2"]),
    ]
    assert all((tmp_path / job["directory"] / "config.yaml").exists() for job in manifest["jobs"])


def test_the_same_sweep_twice_at_once(launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory(run_directory(compose_run("seed=2", *SMALL)))
    with directory.claim():
        call = launch("-m", "seed=1,2", *SMALL)
    assert call.code == 2
    assert "job 1 (seed=2)" in call.err
    assert "is being written by process" in call.err
    assert not list(tmp_path.glob("runs/*/sweeps/*"))


def test_a_hundred_jobs_are_composed_in_no_time():
    import time

    plan(["seed=1,2"])  # imports
    start = time.process_time()
    made = planned("seed=range(0,50)", "optimizer.lr=0.1,0.2", *SMALL)
    assert len(made.jobs) == 100
    assert (time.process_time() - start) / 100 < SWEEP_SECONDS_PER_JOB
    assert sys.modules.keys() >= {"trainer.launch.jobs"}
