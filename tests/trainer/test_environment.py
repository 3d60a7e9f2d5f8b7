"""environment.json says enough to find the same code, packages and machine again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trainer
from trainer.environment import changes, code_state, describe, write_environment
from trainer.rundir import RunDirectory

ROOT = Path(trainer.__file__).parents[1]


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", "a.py")
    commit(folder, "one")
    return folder


def code_of(folder: Path) -> dict[str, Any]:
    state = code_state(folder)
    assert state is not None
    return state


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder: Path, message: str) -> None:
    git(folder, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-a", "-m", message)


def test_every_change_of_code_is_seen(repository):
    states = [code_of(repository)]
    assert states[0]["commit"] == git(repository, "rev-parse", "HEAD").strip() and not states[0]["dirty"]
    (repository / "a.py").write_text("x = 2\n")
    states.append(code_of(repository))
    assert "+x = 2" in states[1]["diff"] and "-x = 1" in states[1]["diff"] and states[1]["dirty"]
    git(repository, "add", "a.py")  # staged or not is the same code
    assert code_of(repository)["code"] == states[1]["code"]
    (repository / "new_task.py").write_text("y = 1\n")
    states.append(code_of(repository))
    (repository / "new_task.py").write_text("y = 2\n")
    states.append(code_of(repository))
    commit(repository, "two")
    states.append(code_of(repository))
    assert len({s["code"] for s in states}) == 5
    (repository / "notes.txt").write_text("not code")
    assert code_of(repository)["code"] == states[-1]["code"]


def test_what_changed_is_said_in_words(repository):
    def code_changes() -> str:
        return " ".join(changes(before, {"git": code_of(repository)}))

    before = {"git": code_of(repository)}
    assert code_changes() == ""
    (repository / "a.py").write_text("x = 2\n")
    assert "uncommitted" in code_changes()
    commit(repository, "two")
    assert before["git"]["commit"][:10] in code_changes()
    assert not list(changes({}, {"git": code_of(repository)}))


def test_other_data_are_named_by_split():
    before = {"data": {"train": "a", "val": "b"}}
    assert not list(changes(before, before)) and not list(changes({}, before)) and not list(changes(before, {}))
    assert "the validation data have changed" in " ".join(changes(before, {"data": {"train": "a", "val": "c"}}))
    assert "the training and validation data have changed" in " ".join(changes(before, {"data": {"train": "c", "val": "c"}}))


def test_a_repository_without_commits_and_a_folder_without_repository(tmp_path):
    (tmp_path / "plain").mkdir()
    assert code_state(tmp_path / "plain") is None or str(ROOT) in str(tmp_path)
    (tmp_path / "fresh").mkdir()
    git(tmp_path / "fresh", "init", "-q")
    state = code_state(tmp_path / "fresh")
    assert state is not None and state["commit"] is None


def test_a_huge_diff_is_cut_off_but_still_told_apart(repository):
    (repository / "a.py").write_text("x = 1\n" * 400_000)
    one = code_of(repository)
    (repository / "a.py").write_text("x = 1\n" * 400_000 + "y = 2\n")
    assert len(one["diff"]) < 1_100_000 and code_of(repository)["code"] != one["code"]


def test_every_start_is_kept(tmp_path):
    write_environment(tmp_path, ranks=1)
    write_environment(tmp_path, ranks=2)
    environment = write_environment(tmp_path, ranks=3, data={"train": "abc"})
    assert environment["data"] == {"train": "abc"}
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["ranks"] == 3 and [e["ranks"] for e in written["previous"]] == [1, 2]
    assert all("previous" not in e for e in written["previous"])
    assert {"argv", "git", "versions", "hardware", "ranks"} <= set(environment)
    assert RunDirectory(tmp_path).read_environment()["versions"]["python"].count(".") == 2


def test_no_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-key")
    assert "very-secret-key" not in json.dumps(describe())


def test_it_imports_no_torch():
    code = "import sys; from trainer.environment import describe; describe(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
