"""resume, retry and cancel: what is started again, what is left alone, what is held and why."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.trainer.sweep import light
from tests.trainer.sweep.test_pool import how, run, times
from trainer.errors import ConfigError
from trainer.launch.compose import compose_run
from trainer.rundir import RunDirectory
from trainer.sweep import drive, verbs
from trainer.sweep.causes import Cause, cause_of, remedy, smaller_pieces
from trainer.sweep.manifest import Manifest

pytestmark = pytest.mark.usefixtures("light_jobs")


def script(manifest: Manifest, index: int, text: str) -> None:
    (manifest.directory(manifest.jobs[index]).path / light.SCRIPT).write_text(text)


def test_resume_starts_what_is_left_and_nothing_else(sweep, capsys):
    manifest = sweep("work 0", "diverge", "work 0", "work 0")
    assert run(manifest) == 4
    manifest.jobs[2].state, manifest.jobs[3].state = "cancelled", "queued"
    for job, state in zip(manifest.jobs[2:], ("cancelled", "interrupted"), strict=True):
        manifest.directory(job).result_path.unlink()
        manifest.directory(job).status(state)
    manifest.save()
    assert verbs.resume([str(manifest.path)]) == 0
    assert how(manifest) == ["completed", "failed", "cancelled", "completed"]
    assert [len(times(manifest, n)) for n in range(4)] == [1, 1, 1, 2]
    assert "python -m trainer retry" in capsys.readouterr().out
    assert verbs.resume([str(manifest.path)]) == 1  # one has failed
    assert verbs.resume([str(manifest.path), "2"]) == 0  # by its number, though it was cancelled
    assert how(manifest)[2] == "completed"


def test_retry_goes_by_the_cause(sweep, capsys):
    manifest = sweep("work 0", "crash", "diverge", "raise")
    run_config = compose_run("loop.batch_size=64", "loop.accumulate=2")
    manifest.directory(manifest.jobs[1]).write_config(run_config)
    run(manifest)
    script(manifest, 1, "work 0")
    assert verbs.retry([str(manifest.path)]) == 0
    assert how(manifest) == ["completed", "completed", "held", "held"]
    said = capsys.readouterr().out
    assert "[1] seed=1: out of memory; again loop.accumulate=4: half the micro-batch, the same batch" in said
    assert manifest.directory(manifest.jobs[1]).read_config().loop.accumulate == 4
    jobs = Manifest.load(manifest.path).jobs
    assert "diverged, which starting it again does not mend: Diverged: nan" in (jobs[2].reason or "")
    assert "an error in the code" in (jobs[3].reason or "")
    assert [len(times(manifest, n)) for n in range(4)] == [1, 2, 1, 1]


def test_cancel_while_its_launcher_runs(sweep):
    manifest = sweep("work 60", "work 60", "work 60")

    def tell():
        while not times(manifest, 1):
            time.sleep(0.02)
        verbs.cancel([str(manifest.path)])

    threading.Thread(target=tell, daemon=True).start()
    assert run(manifest) != 0
    assert how(manifest) == ["cancelled"] * 3


def test_cancel_without_a_launcher(sweep, capsys):
    manifest = sweep("work 0", "work 0")
    assert verbs.cancel([str(manifest.path), "1"]) == 0
    assert how(manifest) == ["queued", "cancelled"]
    assert verbs.resume([str(manifest.path)]) == 0
    assert how(manifest) == ["completed", "cancelled"]
    assert verbs.cancel([str(manifest.path)]) == 0
    assert "nothing to cancel" in capsys.readouterr().out


def test_cancel_a_single_run(tmp_path):
    code = "import sys; from trainer.rundir import RunDirectory\nwith RunDirectory(sys.argv[1]).claim():\n    print(1, flush=True); import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline()
    assert verbs.cancel([str(tmp_path / "run")]) == 0
    assert process.wait(10) == -signal.SIGTERM
    process.stdout.close()
    with pytest.raises(ConfigError, match="nothing to stop"):
        verbs.cancel([str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("arguments", "says"), [(["nowhere"], "no such directory"), (["{sweep}", "7"], "numbered 0 to 0"), (["{sweep}"], "config.yaml is gone")]
)
def test_bad_calls(sweep, arguments, says):
    manifest = sweep("work 0")
    manifest.directory(manifest.jobs[0]).config_path.unlink()
    with pytest.raises(ConfigError, match=says):
        verbs.resume([a.format(sweep=manifest.path) for a in arguments])


def test_without_a_terminal(sweep):
    """`hydra.launcher.wait=false`: the command returns, the jobs are run by a process of their own."""
    manifest = sweep("work 0")
    manifest.directory(manifest.jobs[0]).result_path.write_text("{}")
    manifest.directory(manifest.jobs[0]).status("completed")
    assert drive.drive(manifest, manifest.jobs, wait=False) == 0
    log = manifest.path / "launcher.log"
    end = time.monotonic() + 60
    while "completed" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert "nothing to start: 1 completed" in log.read_text()


# Causes


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("ConfigError: loop.batch_size=64: does not fit into the memory of cuda:0, cut into 1 part(s)", Cause.memory),
        ("killed by SIGKILL (out of memory?)", Cause.memory),
        ("SLURM says OUT_OF_MEMORY", Cause.memory),
        ("SLURM says OUT_OF_MEMORY: DistributedError: rank 1 on n2 is gone without a word: killed, or out of memory", Cause.memory),
        ("DistributedError: rank 1 on n2 is gone without a word: killed, or out of memory", Cause.node),
        ("SLURM says NODE_FAIL", Cause.node),
        ("DistributedError: rank 0 of 2 could not join the others through n1", Cause.node),
        ("killed by SIGTERM", Cause.node),
        ("SLURM says TIMEOUT", Cause.time),
        ("the time is up; queued again 10 times, which is the most (hydra.launcher.max_requeues=10)", Cause.time),
        ("StorageError: cannot write x: the disk is full", Cause.storage),
        ("Diverged: the loss was not finite", Cause.divergence),
        ("DataError: 12 bad samples", Cause.data),
        ("ConfigError: init_from=x: no such file", Cause.configuration),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied", Cause.code),
        (None, Cause.code),
    ],
)
def test_cause(reason, cause):
    assert cause_of(reason) is cause


def test_smaller_pieces():
    def pieces(batch_size: int, accumulate: int, ranks: int = 1):
        return smaller_pieces(compose_run(f"loop.batch_size={batch_size}", f"loop.accumulate={accumulate}"), ranks)

    assert pieces(64, 1) == 2
    assert pieces(64, 4) == 8
    assert pieces(60, 4) == 10  # 8 does not divide it
    assert pieces(64, 64) is None
    assert pieces(48, 1, ranks=3) == 2


def test_more_time_or_on_from_the_checkpoint(tmp_path):
    directory = RunDirectory(tmp_path)
    assert remedy("SLURM says TIMEOUT", directory, timeout_min=60).timeout_min == 120
    directory.checkpoints.mkdir()
    (directory.checkpoints / "last.pt").touch()
    again = remedy("SLURM says TIMEOUT", directory, timeout_min=60)
    assert (again.timeout_min, again.told) == (None, "from its last checkpoint")


def test_a_failed_node_is_left_out(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.status("failed", host="n7")
    assert remedy("SLURM says NODE_FAIL", directory).exclude == "n7"
    assert remedy("SLURM says NODE_FAIL", directory, nodes=2).exclude is None  # it may be the healthy one
    assert remedy("SLURM says NODE_FAIL", directory, nodes=2, failed_node="n8").exclude == "n8"
    assert remedy("DistributedError: rank 1 on n2 is gone without a word: killed, or out of memory", directory, nodes=2).exclude == "n2"
