"""Recipes: what each says of itself, in a header that is true; and those that are sweeps make the jobs they promise, with -m and without."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from tests.test_docs import problems_of
from trainer.launch import door
from trainer.launch.compose import CONF, compose
from trainer.launch.jobs import plan


def seeds(*overrides: str, config_dir: Path | None = None) -> list[int]:
    planned = plan(list(overrides), str(config_dir) if config_dir else None)
    assert planned is not None
    return [job.run.seed for job in planned.jobs]


def test_three_seeds() -> None:
    assert seeds("experiment=three_seeds") == [42, 195, 335]
    assert sorted(seeds("experiment=three_seeds", "optimizer.lr=1e-3,1e-4")) == [42, 42, 195, 195, 335, 335]
    assert seeds("experiment=three_seeds", "seed=7") == [7], "what the command line says wins"


def test_arms_of_three_seeds_are_one_group_each() -> None:
    planned = plan(["experiment=three_seeds", "optimizer.lr=1e-3,1e-4"])
    assert planned is not None
    assert [sorted(job.group) for job in planned.jobs] == [["optimizer.lr"]] * 6


def test_together_with_another_experiment(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nloop: {epochs: 3}\n")
    planned = plan(["experiment=[mine,three_seeds]"], str(tmp_path))
    assert planned is not None
    assert [(job.run.seed, job.run.loop.epochs) for job in planned.jobs] == [(42, 3), (195, 3), (335, 3)]


RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def header(name: str) -> list[str]:
    """The comment that the recipe's file begins with, without Hydra's line."""
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    return list(itertools.takewhile(lambda line: line.startswith("#"), lines[1:]))


def commands(lines: list[str]) -> list[str]:
    return [found[1] for line in lines if (found := re.match(r"# (?:Command:)? *((?:python|torchrun) .*)", line))]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_is_from_how_it_is_run_and_what_it_reaches(name: str, tmp_path: Path) -> None:
    lines = header(name)
    for part in ("Source", "Command", "Expected"):
        said = [line.removeprefix(f"# {part}: ") for line in lines if line.startswith(f"# {part}: ")]
        assert len(said) == 1 and len(said[0]) > 15, f"{name}: its header has no line that begins with `# {part}: `"
    expected = " ".join(lines[next(i for i, line in enumerate(lines) if line.startswith("# Expected: ")) :])
    assert re.search(r"\d|not known: ", expected), f"{name}: a score, or the reason why there is none"
    assert any(re.search(rf"experiment={name}\b", command) for command in commands(lines))
    for command in commands(lines):
        # Where the reader chooses a group, the default stands in.
        problems = problems_of(re.sub(r" (?:model|dataset)=<[^<>]*>", "", command), tmp_path)
        assert not problems, f"{command}:\n" + "\n".join(map(str, problems))


@pytest.mark.parametrize("name", RECIPES)
def test_a_sweep_is_one_without_m_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra would run a single job of it, with none of its values, and say nothing."""
    asked: list[str] = []
    monkeypatch.setattr(door, "_multirun", lambda *_: asked.append("sweep") or 0)
    monkeypatch.setattr(door, "checked_run", lambda *_: None)  # a recipe for data that are not here is not run here
    monkeypatch.setattr(door, "_dispatch", lambda run: asked.append("run") or 0)
    assert door.enter(lambda: None, [f"experiment={name}"]) == 0
    assert asked == ["sweep" if compose([f"experiment={name}"]).hydra.sweeper.get("params") else "run"]
