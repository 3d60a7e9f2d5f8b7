"""Every YAML in conf/ is a choice that works: found by walking the folder, so a new one is tested on the day it is added."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks  # noqa: F401
from trainer.config import RunConfig
from trainer.config.plain import from_plain, to_plain
from trainer.config.schemas import schemas
from trainer.errors import Problem
from trainer.launch.compose import CONF, checked, compose, compose_run
from trainer.rundir import identity

CHOICES = sorted((p.parent.name, p.stem) for p in CONF.glob("*/*.yaml"))
TASKS = [choice for group, choice in CHOICES if group == "task"]
DEFAULT_TASK = compose([]).choices["task"]
GROUPS = sorted({group for group, _ in CHOICES})


@cache
def task_config(task: str):
    return made(f"task={task}")[0].task


@cache
def made(*overrides: str) -> tuple[RunConfig, list[Problem]]:
    """The run of a command line, and what is wrong with it. Shared: not to be changed."""
    run, problems = checked(compose(overrides))
    assert isinstance(run, RunConfig)
    return run, problems


def natural_task(group: str, choice: str) -> str | None:
    """A task that can use this dataset, model or augmentation; None where there is none yet."""
    if group == "task":
        return choice
    if group not in ("dataset", "model", "augmentation"):
        return DEFAULT_TASK
    run, _ = made(f"{group}={choice}")
    if group == "augmentation":
        return next((task for task in (DEFAULT_TASK, *TASKS) if task_config(task).views == run.augmentation.views), None)
    part = getattr(run, group)
    needed = {"dataset": "needs", "model": "asks"}[group]
    return next((task for task in TASKS if getattr(task_config(task), needed) <= part.offers), None)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_resolves_and_validates(group, choice):
    task = natural_task(group, choice)
    itself = group == "task" or group == "experiment"
    other = [f"task={task}"] if task not in (None, DEFAULT_TASK) and not itself else []
    run, problems = made(f"{group}={choice}", *other)
    keys = {p.key for p in problems if "not installed" not in p.reason}  # an extra of pyproject.toml
    # What only the user can give: where the data lie. A choice whose task is not written yet has nobody to learn from it.
    excused = ({"dataset.path"} if run.dataset.on_disk else set()) | ({group} if task is None else set())
    assert keys <= excused, "\n".join(map(str, problems))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_survives_being_written_down(group, choice):
    """config.yaml is enough to run it again, and the run is the same to the hash."""
    run, _ = made(f"{group}={choice}")
    back = from_plain(yaml.safe_load(yaml.safe_dump(to_plain(run))))
    assert back == run
    assert identity(back) == identity(run)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_without_another_argument(task):
    run = compose_run(f"task={task}")
    assert not run.dataset.on_disk


# What a task may find wrong with a network that offers all it asks for, by the key it names.
OWN_REASONS = {
    "mim": "model.name",  # MAE hides patches before a plain transformer sees them
    "detection": "model.patch_size",  # a pyramid's strides are powers of two, which patches of 14 are not
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", [choice for group, choice in CHOICES if group == "model"])
def test_every_model_runs_with_every_task_it_offers_enough_for(task, model):
    run, problems = made(f"task={task}", f"model={model}")
    assert all(p.fix for p in problems), "each with a way out"
    keys = {p.key for p in problems} - {OWN_REASONS.get(task)}
    assert keys == (set() if run.task.asks <= run.model.offers else {"model"})


def test_the_reasons_of_tasks_are_no_excuse_for_all():
    assert made("task=mim", "model=vit_s")[1] == [] and made("task=detection", "model=resnet18")[1] == []


@pytest.mark.parametrize("debug", [choice for group, choice in CHOICES if group == "debug" and choice != "none"])
@pytest.mark.parametrize("task", TASKS)
def test_every_debug_preset_fits_every_task(task, debug):
    run = compose_run(f"task={task}", f"debug={debug}")
    assert run.runs_dir != "runs"  # a look at what goes wrong leaves nothing among the results


def test_tiny_is_tiny():
    run = compose_run("debug=tiny", "scheduler=constant")
    assert (run.loop.epochs, run.loop.samples_per_epoch, run.loop.batch_size, run.loop.max_validation_batches) == (2, 80, 8, 10)
    assert (run.dataset.num_workers, run.distributed.processes, run.loop.progress.name) == (0, 1, "lines")  # breakpoint() has the terminal
    assert run.dataset.image_size == run.task.smallest_image
    assert compose_run("debug=tiny", "model=dinov2_vit_b").dataset.image_size == 42  # patches of 14
    assert compose_run("debug=tiny", "dataset.image_size=64").dataset.image_size == 64


@given(st.sampled_from([8, 14, 16, 32]), st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_an_embedded_datasets_size_fits_the_patches(patch, size):
    from omegaconf import OmegaConf

    from trainer.launch.resolvers import fitting_image_size

    root = OmegaConf.create({"model": OmegaConf.structured(schemas("model")["timm"])})
    root.model.patch_size = patch
    fitting = fitting_image_size(size, _root_=root)
    assert fitting % patch == 0
    assert 0 <= fitting - size < patch


# Both halves of a choice


def yaml_of(path: Path):
    return yaml.safe_load(path.read_text()) or {}


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_yaml_lists_a_schema_of_its_group(path):
    group = path.parent.name
    listed = [entry for entry in yaml_of(path).get("defaults", []) if isinstance(entry, str)]
    named = [entry.removesuffix(f"@{group}").removesuffix("_schema") for entry in listed if "_schema" in entry]
    if group == "experiment":  # tests/test_experiments.py reads their headers
        return
    assert named, f"{path} lists no schema"
    assert set(named) <= set(schemas(group))


@pytest.mark.parametrize("group", GROUPS)
def test_every_schema_has_a_yaml(group):
    used = {
        entry.split("@")[0].removesuffix("_schema")
        for p in CONF.glob(f"{group}/*.yaml")
        for entry in yaml_of(p).get("defaults", [])
        if isinstance(entry, str)
    }
    assert set(schemas(group)) <= used


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in GROUPS for n in schemas(g)])
def test_every_field_explains_itself(group, name):
    """`--help` has nothing else to say it from."""

    def silent(kind, at):
        for f in dataclasses.fields(kind):
            if not f.metadata.get("help"):
                yield f"{at}.{f.name}"
            if f.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(f.default_factory):
                yield from silent(f.default_factory, f"{at}.{f.name}")

    assert list(silent(schemas(group)[name], group)) == []
    doc = schemas(group)[name].__doc__ or ""
    assert doc, f"{group}/{name} has no docstring"
    assert not doc.startswith(f"{schemas(group)[name].__name__}("), f"{group}/{name} has its signature for a docstring"


def test_no_value_has_two_homes():
    """A default is in the schema, where every choice shares it, or in the YAML of the choice. Not the same value in both."""
    double = []
    for path in sorted(CONF.glob("*/*.yaml")):
        group, content = path.parent.name, yaml_of(path)
        if group in ("debug", "experiment"):  # these set what others have set
            continue
        name = next(str(entry).split("@")[0].removesuffix("_schema") for entry in content["defaults"] if "_schema" in str(entry))
        content = content.get(group, content)  # of a choice that sets other groups too
        for f in dataclasses.fields(schemas(group)[name]):
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            if f.name in content and not dataclasses.is_dataclass(default) and content[f.name] == default:
                double.append(f"{path.relative_to(CONF)}: {f.name}={default}")
    assert double == []
