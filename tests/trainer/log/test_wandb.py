"""Weights & Biases with the real client: offline logs read back, a stand-in server, and every way it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import wandb_offline_log as log
from tests.thresholds import WANDB_EXIT_SECONDS
from tests.wandb_run import STEPS, run_config
from tests.wandb_stub_server import StubServer
from trainer.config.logger import WandbConfig
from trainer.log import open_journal
from trainer.log.wandb_sink import choose_id, keep_id

ROOT = Path(__file__).resolve().parents[3]
KEY = "0" * 40


@dataclass
class Start:
    """One start of the run, as a process of its own, and what came of it."""

    directory: Path
    url: str
    options: Mapping[str, Any] = field(default_factory=dict)
    key: str = KEY

    def __post_init__(self) -> None:
        self.went_on = False
        self.directory.mkdir(exist_ok=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        env |= {"WANDB_BASE_URL": self.url, "OMP_NUM_THREADS": "1", "HOME": str(self.directory)} | (
            {"WANDB_API_KEY": self.key} if self.key else {}
        )
        command = [sys.executable, "-m", "tests.wandb_run", str(self.directory), json.dumps(dict(self.options))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def wait_for_half(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "half\n", self.process.communicate()[1]

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.went_on = True
        self.process.stdin.write("go on\n")
        self.process.stdin.flush()

    def finish(self) -> Start:
        """Let it go on to its end."""
        self.out, self.err = self.process.communicate(None if self.went_on else "go on\n", timeout=60)
        self.warnings = [line for line in self.err.splitlines() if line.startswith("WARNING")]
        return self

    @property
    def seconds_to_close(self) -> float:
        first, last = (float(line.rpartition(" ")[2]) for line in self.out.splitlines() if line.startswith("clos"))
        return last - first

    @property
    def logs(self) -> list[Path]:
        return sorted(self.directory.glob("wandb/*run-*/*.wandb"))


@dataclass
class Fault:
    """A way in which W&B fails."""

    at_start: str = "ok"  # the server's mode
    at_half: str = "ok"
    key: str = KEY
    says: str = ""  # in the one warning
    options: Mapping[str, Any] = field(default_factory=dict)


PATIENT = {"timeout": 10.0, "wait": True}  # seconds: enough to start on a busy machine
FAULTS = {
    "its service frozen": Fault(says="did not finish within", options=PATIENT | {"freeze": True}),
    "gone in the middle": Fault(at_half="gone", says="failed", options=PATIENT),
    "errors in the middle": Fault(at_half="error", says="failed", options=PATIENT),
    "silence in the middle": Fault(at_half="hang", says="failed", options=PATIENT),
    "no key": Fault(key="", says="no W&B key"),
    "no server": Fault(at_start="gone", says="cannot be reached"),
    "errors at the start": Fault(at_start="error", says="cannot be reached"),
    "silence at the start": Fault(at_start="hang", says="cannot be reached"),
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Start]]:
    """A run for each fault, side by side: they mostly wait."""
    with ExitStack() as servers:
        starts: dict[str, Start] = {}
        for in_the_middle in (True, False):  # those first that have to begin well
            names = [name for name, fault in FAULTS.items() if ("wait" in fault.options) == in_the_middle]
            running = {}
            for name in names:
                running[name] = servers.enter_context(StubServer())
                running[name].become(FAULTS[name].at_start)
                directory = tmp_path_factory.mktemp(name.replace(" ", "_"))
                starts[name] = Start(directory, running[name].url, FAULTS[name].options, FAULTS[name].key)
            for name in names:
                starts[name].wait_for_half()
                if in_the_middle:
                    running[name].become(FAULTS[name].at_half)
                starts[name].go_on()
        yield {name: start.finish() for name, start in starts.items()}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failing_server_costs_a_warning_and_a_bounded_time(failed: dict[str, Start], name: str) -> None:
    start, fault = failed[name], FAULTS[name]
    assert start.process.returncode == 0, start.err
    assert len(start.warnings) == 1 and fault.says in start.warnings[0] and "python -m trainer sync" in start.warnings[0], start.err
    assert "Traceback" not in start.err
    assert start.seconds_to_close < WANDB_EXIT_SECONDS
    assert len((start.directory / "metrics.jsonl").read_text().splitlines()) == STEPS
    if name != "its service frozen":  # what it was given is in its file, for `wandb sync`
        offline = [path for path in start.logs if "offline" in str(path)]
        (path,) = offline or start.logs
        assert bool(offline) == (fault.at_half == "ok")
        assert [row["global_step"] for row in log.history(path)] == list(range(1, STEPS + 1))


def test_offline_and_resumed(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "batch.png")
    options = {"mode": "offline", "project": "p", "entity": "e", "tags": ["a"], "images": [str(tmp_path / "batch.png")]}
    directory = tmp_path / "run"
    first = Start(directory, "http://127.0.0.1:9", options).finish()
    second = Start(directory, "http://127.0.0.1:9", options | {"start": 15}).finish()
    assert first.process.returncode == second.process.returncode == 0, first.err + second.err
    assert not first.warnings + second.warnings

    before, after = second.logs
    (began,) = [record.run for record in log.records(before) if record.WhichOneof("record_type") == "run"]
    run_id = (directory / "wandb" / "run_id.txt").read_text().strip()
    assert began.run_id == run_id and f"run-{run_id}.wandb" == before.name == after.name
    assert (began.project, began.entity, began.run_group, began.job_type, began.display_name) == ("p", "e", "demo", "classification", "s7")
    assert list(began.tags) == ["a"]
    config = log.config(before)
    assert config["name"] == "demo" and config["task"]["label_smoothing"] == 0 and config["logger"]["wandb"]["project"] == "p"

    rows = [row for row in log.history(before) if "train/loss" in row]
    assert [row["global_step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[3]["train/loss"] == pytest.approx(1 / 4) and rows[3]["samples"] == 4 * 64
    axes = [record.metric for record in log.records(before) if record.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "global_step" for metric in axes)
    assert any(name.startswith("previews/batch") for row in log.history(before) for name in row)
    assert list(before.parent.glob("files/media/images/**/batch*.png"))
    (ended,) = [record.exit for record in log.records(before) if record.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == 0

    with StubServer() as server:  # a login node with a way out, later
        env = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path)}
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", *map(str, directory.glob("wandb/*run-*"))],
            env=env,
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        assert list(server.runs) == [run_id]
        rows = [row for row in server.history[run_id] if "train/loss" in row]
        assert [row["global_step"] for row in rows] == [*range(1, STEPS + 1), *range(16, 16 + STEPS)]
        steps = [row["_step"] for row in server.history[run_id]]
        assert steps == sorted(set(steps)), "W&B drops rows whose step does not rise"


def test_online_killed_and_resumed_is_one_run(tmp_path: Path) -> None:
    with StubServer() as server:
        first = Start(tmp_path, server.url, {"timeout": 10, "wait": True})
        first.wait_for_half()
        run_id = (tmp_path / "wandb" / "run_id.txt").read_text().strip()
        first.process.kill()
        first.process.communicate()
        second = Start(tmp_path, server.url, {"timeout": 10, "start": 5}).finish()
        assert second.process.returncode == 0 and not second.warnings, second.err
        assert f"{server.url}/ent/trainyard/runs/{run_id}" in second.err
        assert list(server.runs) == [run_id]
        told = server.runs[run_id]
        assert (told["project"], told["groupName"], told["jobType"], told["displayName"]) == ("trainyard", "demo", "classification", "s7")
        steps = [row["_step"] for row in server.history[run_id]]
        assert steps == sorted(set(steps)), "W&B drops rows whose step does not rise"
        logged = [row["global_step"] for row in server.history[run_id] if "train/loss" in row]
        assert logged == list(range(1, 6 + STEPS)), "what the kill kept from the server too, and nothing twice"
        assert server.exits[run_id] == 0


def test_another_directory_that_goes_on_in_the_same_run_sends_all_its_rows(tmp_path: Path) -> None:
    with StubServer() as server:
        for name in ("first", "second"):
            Start(tmp_path / name, server.url, {"timeout": 10, "resume_id": "together"}).finish()
        logged = [row["global_step"] for row in server.history["together"] if "train/loss" in row]
        assert logged == [*range(1, STEPS + 1)] * 2


def test_a_server_that_comes_back_gets_what_it_missed(tmp_path: Path) -> None:
    with StubServer() as server:
        first = Start(tmp_path, server.url, {"mode": "offline"}).finish()
        second = Start(tmp_path, server.url, {"timeout": 10, "start": STEPS}).finish()
        assert first.process.returncode == second.process.returncode == 0, first.err + second.err
        (rows,) = server.history.values()
        assert [row["global_step"] for row in rows if "train/loss" in row] == list(range(1, 2 * STEPS + 1))


def test_a_stopped_run_says_that_it_goes_on(tmp_path: Path) -> None:
    with StubServer() as server:
        stopped = Start(tmp_path, server.url, {"ending": "stopped", "timeout": 10, "resume_id": "chosen01"}).finish()
        assert "Stopped" in stopped.err  # its traceback: nobody catches it there
        assert list(server.runs) == ["chosen01"] and server.exits["chosen01"] == 75
        assert any(record.WhichOneof("record_type") == "preempting" for path in stopped.logs for record in log.records(path))


def sync(directory: Path, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "HOME": str(directory)}
    command = [sys.executable, "-m", "trainer", "sync", str(directory), *options]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)


def steps_at(server: StubServer) -> dict[str, list[int]]:
    return {run: [row["global_step"] for row in rows if "train/loss" in row] for run, rows in server.history.items()}


def test_sync_brings_the_server_what_it_lacks_and_nothing_twice(tmp_path: Path) -> None:
    """Two runs, one of which has started twice without a server."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text('{"state": "completed"}')
    with StubServer() as server:
        offline = {"mode": "offline"}
        starts = [Start(tmp_path / "a", server.url, offline), Start(tmp_path / "b", server.url, offline)]
        for start in starts:
            start.finish()
        Start(tmp_path / "a", server.url, {**offline, "start": STEPS}).finish()
        assert not server.runs
        told = sync(tmp_path, server.url, "--dry-run")
        assert "a: 2 starts" in told.stdout and "b: 1 start" in told.stdout and not server.runs
        done = sync(tmp_path, server.url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert sorted(steps_at(server).values(), key=len) == [list(range(1, STEPS + 1)), list(range(1, 2 * STEPS + 1))]
        assert sync(tmp_path, server.url).stdout == "W&B has had everything\n"


def test_sync_leaves_out_what_a_later_start_has_brought(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "completed"}')
    with StubServer() as server:
        Start(tmp_path, server.url, {"mode": "offline"}).finish()
        Start(tmp_path, server.url, {"timeout": 10, "start": STEPS}).finish()
        assert sync(tmp_path, server.url).stdout == "W&B has had everything\n"
        assert list(steps_at(server).values()) == [list(range(1, 2 * STEPS + 1))]


def test_sync_knows_what_a_failing_server_did_not_take(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "completed"}')
    with StubServer() as server:
        start = Start(tmp_path, server.url, {"timeout": 3, "wait": True})
        start.wait_for_half()
        server.become("error")
        start.finish()
        assert (tmp_path / "wandb" / "unsent").exists(), start.err
        server.become("ok")
        done = sync(tmp_path, server.url)
        assert done.returncode == 0, done.stdout + done.stderr
        (steps,) = steps_at(server).values()
        assert set(steps) == set(range(1, STEPS + 1))
        assert not (tmp_path / "wandb" / "unsent").exists()


def test_a_run_that_fails_sends_an_alert(tmp_path: Path) -> None:
    loud = Start(tmp_path / "loud", "http://127.0.0.1:9", {"mode": "offline", "ending": "failed"})
    quiet = Start(tmp_path / "quiet", "http://127.0.0.1:9", {"mode": "offline", "ending": "failed", "alert": False})
    sent = [[r.alert for r in log.records(start.finish().logs[0]) if r.WhichOneof("record_type") == "alert"] for start in (loud, quiet)]
    assert [(alert.title, alert.text, alert.level) for alert in sent[0]] == [
        ("demo s7 failed", "Diverged: the loss was not finite", "ERROR")
    ]
    assert not sent[1]


def test_watched_weights_and_gradients(tmp_path: Path) -> None:
    start = Start(tmp_path, "http://127.0.0.1:9", {"mode": "offline", "watch": True}).finish()
    assert start.process.returncode == 0 and not start.warnings, start.err
    names = {name.split("/")[0] + "/" + name.split("/")[1] for row in log.history(start.logs[0]) for name in row if "/" in name}
    assert {"gradients/weight", "gradients/bias", "parameters/weight", "parameters/bias"} <= names


def test_which_run_is_resumed(tmp_path: Path) -> None:
    kept = tmp_path / "wandb" / "run_id.txt"
    new = choose_id(tmp_path, WandbConfig(), {})
    assert len(new) == 8 and new != choose_id(tmp_path, WandbConfig(), {})
    keep_id(tmp_path, new)
    assert choose_id(tmp_path, WandbConfig(), {"wandb": "saved"}) == new, "the directory's own comes before the checkpoint's"
    assert choose_id(tmp_path, WandbConfig(resume_id="given"), {"wandb": "saved"}) == "given"
    kept.unlink()
    assert choose_id(tmp_path, WandbConfig(), {"wandb": "saved"}) == "saved"


def test_only_the_main_rank_logs_and_only_what_is_asked_for_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.log import open_journal\n"
        "from tests.wandb_run import WandbConfig, run_config\n"
        "open_journal(Path(sys.argv[1]), run_config(WandbConfig(enabled=True)), False).rewind(0)\n"
        "with open_journal(Path(sys.argv[1]), run_config(WandbConfig()), True) as journal:\n    journal.rewind(0)\n"
        "    journal.write(1, 1, 1, {'train/loss': 1.0})\n"
        "print({'wandb', 'torch', 'matplotlib', 'tensorboard', 'rich'} & {name.split('.')[0] for name in sys.modules})"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True)
    assert said.stdout == "set()\n"


def test_ids_go_into_the_checkpoint(tmp_path: Path) -> None:
    run = run_config(WandbConfig(enabled=True))
    assert open_journal(tmp_path, run, True, {"wandb": "before"}).ids() == {"wandb": "before"}
    assert open_journal(tmp_path, run, False).ids() == {}
