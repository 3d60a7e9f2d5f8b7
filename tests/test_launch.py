"""The command line from outside: what it prints, where, with which exit code, how fast, and what it leaves behind."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tasks  # noqa: F401
from tests.thresholds import CONFIG_ERROR_SECONDS
from trainer.errors import ConfigError, DataError, Stopped
from trainer.launch import door, guard
from trainer.launch.compose import compose_run
from trainer.rundir import RunDirectory, run_directory

ROOT = Path(__file__).resolve().parents[1]

# Runs a script as `python script.py` does, and says at the end which of the heavy packages it has loaded.
WATCHED = """
import atexit, os, runpy, sys
atexit.register(lambda: os.write(2, b"LOADED:" + ",".join({"torch", "numpy", "matplotlib", "submitit"} & set(sys.modules)).encode()))
sys.argv = sys.argv[1:]
sys.path.insert(0, %r)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Call:
    """A finished command, the CPU seconds it took, and the heavy packages it loaded."""

    def __init__(self, module: str, *arguments: str, cwd: Path, **environment: str) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", WATCHED % str(ROOT), module, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.code, self.out = done.returncode, done.stdout
        self.err, _, self.loaded = done.stderr.partition("LOADED:")


@pytest.fixture
def launch(tmp_path: Path):
    return lambda *arguments, **environment: Call("launch", *arguments, cwd=tmp_path, **environment)


@pytest.fixture
def verb(tmp_path: Path):
    return lambda *arguments: Call("trainer", *arguments, cwd=tmp_path)


# What is wrong


def test_everything_that_is_wrong_is_told_at_once(launch, tmp_path):
    call = launch(
        "optimizer=adamv", "loop.batchsize=3", "+nonsense=1", "optimizer.lr=nan", "loop.epochs=abc", "scheduler.warmup_epochs=99", "seed"
    )
    assert call.code == 2
    assert call.out == ""
    assert call.err.startswith("7 problems with this configuration:")
    for told in ("try: optimizer=adamw", "try: loop.batch_size=3", "nonsense=1: is neither a key nor a group", "optimizer.lr=nan: must be a finite number, > 0",
                 "loop.epochs=abc: must be a whole number or null, >= 1", "scheduler.warmup_epochs=99.0: takes", "seed=: is not an override"):  # fmt: skip
        assert told in call.err
    assert "Traceback" not in call.err
    assert call.loaded == ""
    assert call.seconds < CONFIG_ERROR_SECONDS
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--cfg", "job", "lr=0.1"), ("--help", "lr=0.1"), ("-m", "lr=0.1,0.2", "seed=1,2")])
def test_the_same_words_in_every_mode(launch, tmp_path, arguments):
    call = launch(*arguments)
    assert (call.code, call.out, call.loaded) == (2, "", "")
    assert "problem" in call.err.splitlines()[0]
    assert "try: optimizer.lr=0.1" in call.err
    assert not list(tmp_path.iterdir())  # no job of a sweep starts before all are found sound


def test_a_sweep_with_one_bad_job_starts_none(launch, tmp_path):
    call = launch("-m", "seed=1,2", "optimizer.lr=0.1,-1")
    assert call.code == 2
    assert call.err.startswith("1 problem")
    assert "optimizer.lr=-1.0: must be > 0" in call.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--hepl"], "unrecognized arguments: --hepl"), (["-m", "--cfg", "job"], "at a time"), (["--resolve"], "--resolve goes with --cfg")],
)
def test_options_that_make_no_sense(options, says, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        door.enter(lambda: pytest.fail("nothing is to be run"), options)
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_overrides_on_either_side_of_an_option(launch):
    """Hydra takes them on one side alone."""
    done = launch("task=mim", "--cfg", "job", "-p", "loop", "loop.epochs=3")
    assert yaml.safe_load(done.out)["epochs"] == 3
    assert door.options_first(["a=1", "-m", "b=2", "--config-dir", "mine", "c=3"]) == ["-m", "--config-dir", "mine", "a=1", "b=2", "c=3"]


def test_a_launcher_without_a_sweep_is_not_ignored(launch):
    """Hydra would train on the login node."""
    call = launch("hydra/launcher=submitit_slurm")
    assert call.code == 2
    assert "try: -m hydra/launcher=submitit_slurm" in call.err


def test_hydras_own_settings_are_hydras(launch, tmp_path):
    """They need Hydra's own way of starting a job, which composes anew; what is wrong is told all the same."""
    call = launch("hydra.job.chdir=true", "hydra.run.dir=elsewhere", "optimizer.lr=nan")
    assert call.code == 2
    assert "optimizer.lr=nan: must be a finite number" in call.err
    assert "Traceback" not in call.err


def test_one_rank_speaks_for_all(launch):
    torchrun = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    first = launch("lr=1", RANK="0", LOCAL_RANK="0", **torchrun)
    second = launch("lr=1", RANK="1", LOCAL_RANK="1", **torchrun)
    assert (first.code, second.code) == (2, 2)
    assert "optimizer.lr=1" in first.err
    assert second.err == ""


def test_hydra_full_error_shows_the_traceback(launch):
    call = launch("optimizer.lr=nan", HYDRA_FULL_ERROR="1")
    assert "Traceback" in call.err
    assert "ConfigError" in call.err


def test_a_missing_config_dir(launch):
    call = launch("--config-dir", "nowhere")
    assert call.code == 2
    assert "--config-dir=nowhere: no such directory" in call.err


def test_broken_yaml_is_named(launch, tmp_path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/broken.yaml").write_text("optimizer: {lr: [")
    call = launch("--config-dir", "mine", "experiment=broken")
    assert call.code == 2
    assert "broken.yaml" in call.err
    assert "Traceback" not in call.err


# What is right


def test_help_explains_every_setting(launch, tmp_path):
    call = launch("--help", "loop.steps=3", "precision=bf16")
    assert (call.code, call.err, call.loaded) == (0, "", "")
    keys = re.findall(r"^  ([a-z0-9_.]+) = ", call.out, re.MULTILINE)
    tree = yaml.safe_load(launch("--cfg", "job").out)

    def leaves(node, at=""):
        for name, value in node.items():
            yield from leaves(value, f"{at}{name}.") if isinstance(value, dict) and value else [at + name]

    assert sorted(keys) == sorted(leaves(tree))
    assert "\033[" not in call.out  # plain text where it is no terminal
    assert not [line for line in call.out.splitlines() if len(line) > 100 and " " in line.split(" = ")[-1].strip()]
    assert re.search(r"loop\.steps = 3 +command line; default null", call.out)
    assert re.search(r"loop\.epochs = null +set aside by loop\.steps", call.out)
    assert re.search(r"optimizer\.lr = \S+ +conf/optimizer/adamw\.yaml\n +peak learning rate.*\(a number, > 0\)", call.out)
    assert re.search(r"^  precision +bf16\* ", call.out, re.MULTILINE)
    assert "adamw_schema" not in call.out
    assert not list(tmp_path.iterdir())


def test_help_in_spite_of_what_the_run_lacks(launch):
    """A dataset on disk has no path yet; --help is where one looks for how to give it."""
    call = launch("--help", "dataset=image_folder")
    assert call.code == 0
    assert "dataset.path = null" in call.out


def test_cfg_job_is_hydras(launch, tmp_path):
    call = launch("--cfg", "job", "optimizer.lr=0.25")
    assert (call.code, call.err, call.loaded) == (0, "", "")
    assert yaml.safe_load(call.out)["optimizer"]["lr"] == 0.25
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("optimizer=", "optimizer=adamw"), ("optimizer.l", "optimizer.lr="), ("optim", "optimizer="), ("task=cl", "task=classification")],
)
def test_completion(launch, typed, offered):
    call = launch("-sc", "query=bash", COMP_LINE=f"launch.py {typed}")
    assert offered in call.out.split()
    assert "_schema" not in call.out
    assert call.loaded == ""


def test_a_users_own_yaml(launch, tmp_path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/small.yaml").write_text(
        "# @package _global_\ndefaults: [{override /optimizer: sgd}]\noptimizer: {lr: 0.125}\nloop: {epochs: 4}\n"
    )
    call = launch("--config-dir", "mine", "experiment=small", "--help")
    assert call.code == 0
    assert re.search(r"optimizer\.lr = 0\.125 +mine/experiment/small\.yaml", call.out)
    assert re.search(r"^  optimizer .* sgd\*", call.out, re.MULTILINE)
    cfg = launch("--config-dir", "mine", "experiment=small", "--cfg", "job")
    assert yaml.safe_load(cfg.out)["loop"]["epochs"] == 4


def test_two_jobs_one_after_the_other(launch, tmp_path):
    """Hydra's own launcher; a job that is finished already is not run again."""
    arguments = (
        "-m",
        "hydra/launcher=basic",
        "seed=1,2",
        "debug=tiny",
        "runs_dir=here",
        "resume=auto",
        "loop.epochs=1",
        "loop.samples_per_epoch=8",
        "model=timm",
        "model.name=test_vit2",
    )
    call = launch(*arguments)
    assert call.code == 0, call.err
    runs = {p.parent for p in tmp_path.glob("here/*/*/result.json")}
    assert {p.name.split("-")[0] for p in runs} == {"s1", "s2"}
    results = {p: (p / "result.json").stat().st_mtime_ns for p in runs}
    again = launch(*arguments)
    assert again.code == 0
    assert again.out.count("This run is finished") == 2
    assert {p: (p / "result.json").stat().st_mtime_ns for p in runs} == results
    assert not (tmp_path / "multirun").exists()
    assert not (tmp_path / "outputs").exists()


def test_a_finished_run_says_so_without_torch(launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory(run_directory(compose_run("seed=7")))
    row = {"step": 3, "epoch": 1.0, "val/loss": 0.5, "val/top1": 0.75}
    directory.create()
    directory.write_config(compose_run("seed=7"))
    rest = {
        "best": row,
        "last": row,
        "history": [row],
        "steps": 3,
        "samples": 24,
        "seconds": 1.0,
        "images_per_second": 24.0,
        "parameters": 10,
    }
    directory.write_result({"metric": "val/top1", "mode": "max"} | rest)
    directory.status("completed")
    call = launch("seed=7")
    assert (call.code, call.loaded) == (0, ""), call.err
    assert "This run is finished" in call.out
    assert "75" in call.out  # the result, in per cent
    assert str(directory) in call.out
    assert launch("seed=8", "resume=must").code == 2


# The verbs


def test_verbs(verb):
    listing = verb()
    assert listing.code == 0
    assert "validate" in listing.out
    assert listing.loaded == ""
    wrong = verb("valdate", "seed=1")
    assert wrong.code == 2
    assert "try: python -m trainer validate" in wrong.err


def test_every_verb_is_there():
    """The table is of names, imported when called; a name that leads nowhere would only show then."""
    from importlib import import_module

    from trainer.__main__ import VERBS

    for verb, (place, meaning) in VERBS.items():
        module, function = place.split(":")
        assert callable(getattr(import_module(module), function)), verb
        assert meaning


def test_validate_is_torch_free(verb, tmp_path):
    sound = verb("validate", "seed=3")
    assert (sound.code, sound.err, sound.loaded) == (0, "", "")
    assert sound.out.startswith("sound: runs/classification-resnet10t-digits/s3-")
    bad = verb("validate", "loop.batch_size=4096", "resume=never")
    assert bad.code == 2
    assert "is more than the 1438 training images" in bad.err
    assert not list(tmp_path.iterdir())


def test_start_needs_a_run_directory(verb, tmp_path):
    assert "takes one run directory" in verb("start").err
    call = verb("start", str(tmp_path))
    assert call.code == 2
    assert "holds no config.yaml" in call.err


# Exit codes


@pytest.mark.parametrize(("error", "code"), [(ConfigError("x"), 2), (DataError("x"), 3), (Stopped("x"), 75), (KeyboardInterrupt(), 130)])
def test_an_error_of_ours_is_an_exit_code(error, code, capsys):
    def action():
        raise error

    assert guard.guarded(action) == code


def test_an_error_that_nobody_foresaw_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        guard.guarded(lambda: 1 // 0)


def test_a_jobs_error_is_said_once(capsys):
    error = DataError("the shards are gone")
    for _ in range(2):
        guard.report(error)
    assert capsys.readouterr().err.count("the shards are gone") == 1
