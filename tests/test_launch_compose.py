"""Composing: the same as Hydra's own where all is well; where it is not, every problem with a way out that works."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import tasks  # noqa: F401
from trainer.config import Resume, RunConfig
from trainer.config.optimizer import Sgd
from trainer.errors import ConfigError, Problem
from trainer.launch import diagnose
from trainer.launch.compose import CONF, checked, compose, compose_run
from trainer.launch.door import jobs
from trainer.launch.resolve import resolve


def problems(*overrides: str) -> dict[str, Problem]:
    return {p.key: p for p in checked(compose(overrides))[1]}


# Where all is well


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optimizer=sgd", "optimizer.lr=0.5", "seed=3"],
        ["loop={steps: 3, log_every: 2}", "dataset.mean=[0.1,0.2,0.3]", "name='a b'"],
        ["+model.args.depth=2", "++model.args.heads=4", "optimizer.rules=[{pattern: head, lr_factor: 2}]"],
        ["precision=bf16", "logger=all", "scheduler=step", "debug=overfit", "loop.progress=bar", "init_from=null"],
        ["model=dinov2_vit_b", "debug=tiny", "+optimizer.rules=[]"],
        ["hydra.job.name=x", "optimizer=timm", "optimizer.name=lion", "optimizer.betas=[0.9,0.99]"],
    ],
)
def test_composing_is_hydras_own(overrides):
    mine = OmegaConf.to_container(compose(overrides).tree)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        theirs = hydra_compose("config", overrides)
    assert mine == OmegaConf.to_container(theirs)


def test_resolve_gives_plain_dataclasses():
    run = compose_run("optimizer=sgd", "optimizer.rules=[{pattern: head}]")
    assert type(run) is RunConfig
    assert type(run.optimizer) is Sgd
    assert type(run.dataset.mean) is list
    assert run.resume is Resume.auto
    assert (run.name, run.version) == ("classification-resnet10t-digits", "s0")

    def plain(value):
        assert not OmegaConf.is_config(value)
        for f in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
            plain(getattr(value, f.name))
        for child in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
            plain(child)

    plain(run)


def test_a_run_can_be_written_by_hand():
    """Nothing after `resolve` needs Hydra."""
    run = compose_run()
    twin = RunConfig(**{f.name: getattr(run, f.name) for f in dataclasses.fields(run)})
    assert twin == run


# The length of a run


@pytest.mark.parametrize(
    ("overrides", "epochs", "steps"),
    [
        (["loop.steps=7"], None, 7),
        (["loop.epochs=2"], 2, None),
        (["debug=tiny"], 2, None),
        (["debug=tiny", "loop.steps=7"], None, 7),  # what the user sets displaces YAML's
        (["debug=overfit", "loop.epochs=2"], 2, None),
        (["debug=overfit", "loop={epochs: 2}"], 2, None),
        (["loop.steps=7", "loop.epochs=null"], None, 7),
        (["debug=tiny", "loop.steps=null"], 2, None),
    ],
)
def test_what_the_user_sets_displaces_the_others_default(overrides, epochs, steps):
    run = compose_run(*overrides)
    assert (run.loop.epochs, run.loop.steps) == (epochs, steps)
    again = resolve(compose(overrides).tree, overrides)  # as a job of a sweep has it: from the lines alone
    assert (again.loop.epochs, again.loop.steps) == (epochs, steps)


def test_setting_both_lengths_is_an_error():
    assert set(problems("loop.steps=7", "loop.epochs=2")) == {"loop.steps"}


def test_warm_up_in_steps_displaces_warm_up_in_epochs(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/warm.yaml").write_text("# @package _global_\nscheduler: {warmup_epochs: 2.0, cooldown_steps: 3}\n")
    run = compose_run(
        "experiment=warm", "scheduler=constant", "scheduler.warmup_steps=5", "scheduler.cooldown_epochs=1", config_dir=str(tmp_path)
    )
    assert (run.scheduler.warmup_epochs, run.scheduler.warmup_steps) == (0.0, 5)
    assert (run.scheduler.cooldown_epochs, run.scheduler.cooldown_steps) == (1.0, None)


# Where it is not

BAD = [  # override, the key that is told, what its line says
    ("optimizer=adamv", "optimizer", "there are adamw, "),
    ("optimzer=sgd", "optimzer", "is neither a key nor a group"),
    ("optimizer=3", "optimizer", "is not a choice"),
    ("loop.batchsize=32", "loop.batchsize", "there is no such key"),
    ("batch_size=32", "batch_size", "is neither a key nor a group"),
    ("optim.lr=0.1", "optim.lr", "there is no such key"),
    ("+loop.batchsize=32", "loop.batchsize", "there is no such key"),
    ("++learning.lr=0.1", "learning.lr", "there is no such key"),
    ("+optimizer.lr=0.1", "+optimizer.lr", "is there already"),
    ("optimizer.nesterov=true", "optimizer.nesterov", "sgd has"),
    ("model.args.depth=3", "model.args.depth", "added with a +"),
    ("optimizer.lr=fast", "optimizer.lr", "must be a number, > 0"),
    ("optimizer.lr=nan", "optimizer.lr", "must be a finite number"),
    ("optimizer.lr=inf", "optimizer.lr", "must be a finite number"),
    ("optimizer.lr=null", "optimizer.lr", "must be a number"),
    ("optimizer.lr=[0.1]", "optimizer.lr", "must be a number"),
    ("optimizer.lr.x=1", "optimizer.lr.x", "there is no such key"),
    ("loop.epochs=1.5", "loop.epochs", "must be a whole number or null"),
    ("loop.drop_last=perhaps", "loop.drop_last", "must be true or false"),
    ("loop.progress=line", "loop.progress", "must be one of auto, bar, lines, none"),
    ("resume=sometimes", "resume", "must be one of auto, never, must"),
    ("loop.batch_size=0", "loop.batch_size", "must be >= 1"),
    ("loop.ema_decay=1", "loop.ema_decay", "must be >= 0, < 1"),
    ("precision.autocast=float32", "precision.autocast", "one of bfloat16, float16"),
    ("optimizer.betas=[0.9]", "optimizer.betas", "needs exactly 2 values"),
    ("optimizer.betas=[0.9,1.5]", "optimizer.betas", "entry 1 must be"),
    ("optimizer.betas=0.9", "optimizer.betas", "must be a list of numbers"),
    ("dataset.num_workers=some", "dataset.num_workers", "must be a whole number >= 0, or auto"),
    ("dataset.mean=[a,b,c]", "dataset.mean", "must be a list of numbers"),
    ("optimizer.lr=0.1,0.2", "optimizer.lr", "needs -m"),
    ("~loop.epochs", "loop.epochs", "cannot be taken out"),
    ("model@teacher=resnet18", "model@teacher", "Did you mean to override model"),
    ("task=", "task", "is not a choice of task"),
    ("loop.validate_every=[", "loop.validate_every", "cannot be read"),
    ("nonsense", "nonsense", "is not an override"),
]


@pytest.mark.parametrize(("override", "key", "says"), BAD)
def test_a_bad_override_is_told(override, key, says):
    try:
        found = problems(override)
    except ConfigError as error:  # nothing could be composed
        found = {key: Problem(key, "", str(error))}
    assert list(found) == [key]
    assert says in found[key].reason


@pytest.mark.parametrize("override", [o for o, *_ in BAD])
def test_the_way_out_works(override):
    """The override that is offered, in place of the bad one, composes and is sound."""
    try:
        (problem,) = problems(override).values()
    except ConfigError:
        return
    if problem.fix.startswith("-m "):  # a sweep: the other way out makes one value of it, and is for lists
        return
    fix = problem.fix.removesuffix(" where it may be nothing")
    if fix == "--help lists every key" or fix.endswith("=..."):
        fix = "seed=0"  # nothing is near: leave it out
    assert problems(fix) == {}


@pytest.mark.parametrize(
    "line",
    [
        "+=[1,2]", "=3", "", "~", "++", "a..b=1", ".a=1", "a.=1", "[0]=1", "é=1", "loop=[null]", "task=[1,2]", "optimizer=[{a: 1}]", "hydra/launcher=[1]",
        "loop.steps=${nope}", "name=${nope}", "seed=${oc.env:NOT_SET}", "loop.steps=???", "dataset.mean.0=tiny", "dataset.mean[0]=nan", "optimizer.rules=[null]",
        "optimizer={lr: x}", "model@x=resnet18", "hydra.nothing=1", "~hydra.job", "optimizer.lr=range(1,3)", "loop.steps=0x10", "loop={epochs: {a: 1}}",
    ],
)  # fmt: skip
def test_whatever_is_typed_is_answered_in_words(line):
    """Found by typing at random: each of these made something fall over, here or in Hydra."""
    try:
        told = list(problems(line).values())
    except ConfigError as error:
        told = list(error.problems)
    assert told
    assert all(str(problem).strip() for problem in told)


def test_all_bad_overrides_are_told_at_once():
    together = [
        "optimizer=adamv",
        "loop.batchsize=32",
        "optimizer.lr=nan",
        "loop.epochs=x",
        "resume=sometimes",
        "dataset.mean=[0.5]",
        "loop.progress=x",
    ]
    found = problems(*together, "loop.batch_size=63", "loop.accumulate=2")
    assert {o.split("=")[0] for o in together} - {"dataset.mean"} <= set(found)
    assert "loop.batch_size" in found  # rules between the parts are not kept back
    assert len(found) >= len(together)


@pytest.mark.parametrize("bad", ["optimizer=adamv", "optimizer=sdg"])
def test_a_mistyped_choice_does_not_make_its_settings_unknown(bad):
    assert set(problems(bad, "optimizer.lr=0.1")) == {"optimizer"}


def test_the_settings_of_the_choice_that_was_meant_are_checked():
    assert set(problems("optimizer=sdg", "optimizer.nesterov=true")) == {"optimizer"}
    assert set(problems("optimizer=sdg", "optimizer.momentum=2")) == {"optimizer", "optimizer.momentum"}


tree = compose([]).tree
keys = [key for key in diagnose.leaves(tree) if len(key.rpartition(".")[2]) > 4]


@given(st.sampled_from(keys), st.data())
@settings(max_examples=200, deadline=None)
def test_one_wrong_letter_in_a_key_is_understood(key, data):
    group, _, name = key.rpartition(".")
    at = data.draw(st.integers(0, len(name) - 1))
    kind = data.draw(st.sampled_from(["drop", "double", "swap"]))
    if kind == "swap":
        typo = name[:at] + name[at : at + 2][::-1] + name[at + 2 :]
    else:
        typo = name[:at] + (name[at] * 2 if kind == "double" else "") + name[at + 1 :]
    if typo in (k.rpartition(".")[2] for k in keys) or typo.startswith("_"):
        return
    meant = diagnose._nearest_key(f"{group}.{typo}" if group else typo, keys)
    # Names that are one letter apart themselves (validate_every, validate_every_steps are not) would be another matter.
    assert meant == key


def test_the_choice_is_named_not_its_class():
    """A part knows its class; the user has typed a choice."""
    found = problems("dataset=digit_scenes")
    if "dataset" not in found:
        pytest.skip("every task can learn from scenes")
    assert found["dataset"].value == "digit_scenes"
    assert found["dataset"].fix.startswith("dataset=")


def test_a_yaml_without_a_schema(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("name: resnet18\n")
    with pytest.raises(ConfigError, match="lists no schema"):
        compose_run("model=mine", config_dir=str(tmp_path))


def test_a_yaml_with_an_unknown_key(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("defaults: [timm_schema, _self_]\nname: resnet18\ndrop_rat: 1\n")
    with pytest.raises(ConfigError, match=r"model/mine[\s\S]*drop_rat"):
        compose_run("model=mine", config_dir=str(tmp_path))


def test_a_value_that_no_yaml_gives(tmp_path: Path):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/mine.yaml").write_text("defaults: [adamw_schema, _self_]\nweight_decay: -1\n")
    with pytest.raises(ConfigError) as caught:
        compose_run("optimizer=mine", config_dir=str(tmp_path))
    assert {p.key for p in caught.value.problems if isinstance(p, Problem)} == {"optimizer.lr", "optimizer.weight_decay"}


def test_several_folders_of_yaml(tmp_path: Path):
    for folder, rate in (("one", 0.25), ("two", 0.5)):
        (tmp_path / folder / "optimizer").mkdir(parents=True)
        (tmp_path / folder / f"optimizer/{folder}.yaml").write_text(f"defaults: [adamw_schema, _self_]\nlr: {rate}\nweight_decay: 0\n")
    search = f"hydra.searchpath=[file://{tmp_path}/one,file://{tmp_path}/two]"
    assert compose_run(search, "optimizer=one").optimizer.lr == 0.25
    assert compose_run(search, "optimizer=two").optimizer.lr == 0.5
    assert compose_run(f"hydra.searchpath=[file://{tmp_path}/one]", "optimizer=two", config_dir=str(tmp_path / "two")).optimizer.lr == 0.5


def test_several_files_over_the_defaults_the_later_ones_win(tmp_path: Path):
    """As `--cfg-files default first second` of other tools: keys that a file does not have stay what they were, lists are replaced."""
    (tmp_path / "experiment").mkdir()
    for name, text in (
        ("base", "name: kbr\nversion: '42'\nloop: {epochs: 3}\noptimizer: {lr: 0.25, no_decay: [bias]}\n"),
        ("mine", "optimizer: {lr: 0.5}\n"),
    ):
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
    run = compose_run("experiment=[base,mine]", "seed=42", config_dir=str(tmp_path))
    assert (run.name, run.version, run.loop.epochs, run.optimizer.lr, run.optimizer.no_decay) == ("kbr", "42", 3, 0.5, ["bias"])
    assert compose_run("experiment=[mine,base]", config_dir=str(tmp_path)).optimizer.lr == 0.25


def test_the_jobs_of_a_sweep_are_hydras():
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    lines = ["seed=1,2", "optimizer=adamw,sgd", "loop.steps=choice(3,4)", "name='a,b'", "optimizer.lr=range(1,3)"]
    theirs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(lines), max_batch_size=None)[0]
    assert list(jobs(lines)) == [list(job) for job in theirs]
