"""A config survives YAML and checkpoints, and what comes back can make nothing but configs."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
import yaml

import tasks  # noqa: F401
from trainer.config import Resume, RunConfig, setting
from trainer.config.plain import SCHEMA, from_plain, to_plain
from trainer.errors import ConfigError, Problem
from trainer.launch.compose import compose_run


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return compose_run("optimizer.rules=[{pattern: head, lr_factor: 10}]", "+model.args={depth: 2}", "resume=never", "loop.steps=7")


def test_a_run_survives_yaml(run):
    text = yaml.safe_dump(to_plain(run), sort_keys=False)
    back = from_plain(yaml.safe_load(text))
    assert back == run
    assert type(back.task) is type(run.task)
    assert back.resume is Resume.never


def test_a_run_survives_a_checkpoint(run, tmp_path: Path):
    import torch

    torch.save(to_plain(run), tmp_path / "config.pt")
    assert from_plain(torch.load(tmp_path / "config.pt", weights_only=True)) == run


def test_nothing_but_plain_containers(run):
    def kinds(value):
        yield type(value)
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from kinds(child)

    assert set(kinds(to_plain(run))) <= {dict, list, str, int, float, bool, type(None)}


def test_a_field_that_is_missing_takes_its_default(run):
    """A config written before the field existed."""
    content = to_plain(run)
    del content["loop"]["max_bad_steps"], content["distributed"]["timeout"]
    assert from_plain(content) == run


def test_every_problem_is_told(run):
    content = to_plain(run)
    content["loop"]["batchsize"] = 3
    content["loop"]["batch_size"] = "many"
    content["resume"] = "perhaps"
    content["optimizer"]["betas"] = [0.9, "x"]
    content["optimizer"]["rules"][0]["lr_factr"] = 1
    del content["optimizer"]["lr"]
    with pytest.raises(ConfigError) as caught:
        from_plain(content)
    told = {p.key: str(p) for p in caught.value.problems if isinstance(p, Problem)}
    assert set(told) == {"loop.batchsize", "loop.batch_size", "resume", "optimizer.betas[1]", "optimizer.rules[0].lr_factr", "optimizer.lr"}
    assert "batch_size" in told["loop.batchsize"]
    assert "must be one of auto, never, must" in told["resume"]


def test_a_number_typed_by_hand(run):
    """YAML 1.1 takes 1e-3 for text."""
    content = yaml.safe_load(yaml.safe_dump(to_plain(run)).replace("lr: 0.001", "lr: 1e-3"))
    assert content["optimizer"]["lr"] == "1e-3"
    assert from_plain(content).optimizer.lr == 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "os:system", "subprocess:Popen", "builtins:eval", "trainer.errors:Problem", "trainer.config.run:RunConfig", "trainer.config:nothing",
        "this:s", "trainer.config.optimizer:AdamW.build", "nonsense", "", "trainer.nothing:X", 3,
    ],
)  # fmt: skip
def test_a_class_that_is_no_dataset_is_refused(run, name):
    content = to_plain(run)
    content["dataset"][SCHEMA] = name
    with pytest.raises(ConfigError, match="names no DatasetConfig"):
        from_plain(content)
    assert "this" not in sys.modules  # nor imported to be looked at


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_what_is_no_mapping_is_refused(content):
    with pytest.raises(ConfigError, match="must be a mapping"):
        from_plain(content)


class Speed(Enum):
    slow = 1


@dataclass
class Leaf:
    path: Path = Path("a/b")
    speed: Speed = Speed.slow


@dataclass
class BiggerLeaf(Leaf):
    size: int = setting(1, "size")


@dataclass
class Tree:
    leaf: Leaf = dataclasses.field(default_factory=Leaf)
    leaves: list[Leaf] = dataclasses.field(default_factory=list)
    named: dict[str, Leaf | None] = dataclasses.field(default_factory=dict)
    maybe: Leaf | None = None


def test_configs_inside_lists_and_mappings_keep_their_class():
    tree = Tree(BiggerLeaf(), [Leaf(), BiggerLeaf()], {"a": BiggerLeaf(), "b": None}, Leaf())
    plain = to_plain(tree)
    assert SCHEMA not in plain["maybe"]  # the declared class needs no mention
    assert plain["leaf"]["path"] == "a/b"
    back = from_plain({k: v for k, v in plain.items() if k != SCHEMA}, Tree)
    assert [type(leaf) for leaf in back.leaves] == [Leaf, BiggerLeaf]
    assert type(back.leaf) is BiggerLeaf
    assert type(back.named["a"]) is BiggerLeaf
    assert back.named["b"] is None
