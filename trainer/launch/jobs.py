"""The jobs of a sweep, from its command line: multiplied out, zipped, or read from a file; composed, typed and checked, all of them.

Hydra would compose every job by itself, twice. Here it composes once for each set of choices. Imports no torch.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import RunConfig
from trainer.config.fields import as_override
from trainer.config.launcher import LAUNCHERS, LauncherConfig, SlurmLauncherConfig
from trainer.errors import ConfigError, Problem
from trainer.launch.compose import Composed, Composer, apply_to, checked, parse_line
from trainer.launch.resolve import to_object
from trainer.launch.resources import resources_for
from trainer.rundir import run_directory
from trainer.surroundings import as_if

MOST_PROBLEMS = 20  # of a sweep; more would bury the first ones
_ZIP, _FILE = "sweep.zip", "sweep.file"


@dataclass(frozen=True)
class Planned:
    """One job, ready to be run."""

    overrides: list[str]  # the swept ones
    group: dict[str, Any]  # the same as settings, without the seed
    run: RunConfig
    resources: dict[str, Any]  # where they follow the config

    def __str__(self) -> str:
        return " ".join(self.overrides) or "as it is"


@dataclass(frozen=True)
class Plan:
    """A sweep that is sound: every job composed and checked, nothing written yet."""

    base: list[str]  # overrides common to all jobs
    jobs: list[Planned]
    launcher: str
    settings: LauncherConfig
    run: RunConfig  # what the command line asks for without its sweeps: names the sweep's directory
    warnings: list[str]


def plan(overrides: Sequence[str], config_dir: str | None = None) -> Plan | None:
    """Every job of a command line; None where its launcher or its sweeper is not ours, so that Hydra has to do it.

    Raises:
        ConfigError: with what is wrong, in the words of a single run, and in which jobs.
    """
    with Composer(config_dir) as composer:
        own, lines = _partition(overrides)
        first = composer.compose([line for line in lines if not is_sweep(line)])
        chosen = first.hydra.runtime.choices
        if chosen["hydra/launcher"] not in LAUNCHERS or chosen["hydra/sweeper"] != "basic":
            return None
        _refuse_hydras(lines)
        launcher, settings, problems = _launcher(first, own, composer)
        params = OmegaConf.to_container(first.hydra.sweeper.params or OmegaConf.create({})) if "params" in first.hydra.sweeper else {}
        assert isinstance(params, dict)
        given = {parse_key(line) for line in lines}
        base, swept = expand([*(f"{key}={value}" for key, value in params.items() if key not in given), *lines], composer)
        jobs, found = _checked_jobs(composer, base, swept, settings)
        problems += found
        run, _ = checked(composer.compose(base)) if base or not jobs else (jobs[0].run, [])
    if problems:
        raise ConfigError(*problems[:MOST_PROBLEMS])
    _refuse_twins(jobs)
    return Plan(base, jobs, launcher, settings, run or jobs[0].run, _warnings(jobs))


def _partition(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """`hydra.launcher.*`, which is checked here; and everything else."""
    own = [line for line in overrides if line.lstrip("+~").startswith("hydra.launcher.")]
    return own, [line for line in overrides if line not in own]


def _refuse_hydras(lines: Sequence[str]) -> None:
    """What Hydra does for its own launchers and would be ignored here without a word."""
    theirs = [line for line in lines if line.lstrip("+~").startswith(("hydra.", "hydra/"))]
    ours = ("hydra/launcher", "hydra/sweeper", "hydra.searchpath", "hydra.sweeper.params", "hydra.mode")
    others = [line for line in theirs if not parse_key(line).startswith(ours)]
    if others:
        reason = "is Hydra's, and jobs are started without Hydra here"
        raise ConfigError(*(Problem(parse_key(o), o.partition("=")[2], reason, f"hydra/launcher=basic {o}") for o in others))


def _launcher(first: Composed, own: Sequence[str], composer: Composer) -> tuple[str, LauncherConfig, list[Problem]]:
    """The launcher that was chosen, with its settings."""
    name = str(first.hydra.runtime.choices["hydra/launcher"])
    node = OmegaConf.create({"hydra": {"launcher": None}})
    node.hydra.launcher = first.hydra.launcher
    composed = Composed(node, first.hydra)
    problems = []
    for line in own:
        try:
            apply_to(composed, parse_line(line), composer.loader)
        except HydraException as error:
            problems.append(Problem(line.partition("=")[0], line.partition("=")[2], str(error).splitlines()[0]))
    problems += [dataclasses.replace(p, fix=p.fix or _example(p.key)) for p in composed.problems]
    try:
        settings = to_object(node.hydra.launcher)
    except OmegaConfBaseException as error:
        raise ConfigError(*problems, Problem("hydra.launcher", name, str(error).splitlines()[0])) from error
    assert isinstance(settings, LAUNCHERS[name])
    return name, settings, [*problems, *settings.problems()]


def _example(key: str) -> str:
    return f"{key}=..."


# Which jobs


def is_sweep(line: str) -> bool:
    """Whether this line stands for several jobs."""
    try:
        override = parse_line(line)
    except HydraException:
        return False
    return parse_key(line) in (_ZIP, _FILE) or (override.is_sweep_override() and not override.is_hydra_override())


def parse_key(line: str) -> str:
    return line.partition("=")[0].lstrip("+~")


def expand(lines: Sequence[str], composer: Composer) -> tuple[list[str], list[list[str]]]:
    """What all jobs have in common, and what each has of its own."""
    axes: dict[str, list[str]] = {}  # key -> the line of each value
    base, problems = [], []
    zipped: list[list[str]] = []
    rows: list[list[str]] = [[]]
    for line in lines:
        key = parse_key(line)
        if not is_sweep(line):
            base.append(line)
        elif key == _ZIP:
            zipped += _zip_groups(line, problems)
        elif key == _FILE:
            rows = _rows(line.partition("=")[2], problems)
        else:
            axes[key] = _values(line, composer, problems)
    dimensions = [[[line] for line in axes[key]] for key in axes if not any(key in group for group in zipped)]
    dimensions += [_zipped(group, axes, problems) for group in zipped]
    if problems:
        raise ConfigError(*problems)
    return base, [[*row, *itertools.chain(*job)] for row in rows for job in itertools.product(*dimensions)]


def _values(line: str, composer: Composer, problems: list[Problem]) -> list[str]:
    override = OverridesParser.create(config_loader=composer.loader).parse_override(line)
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        kind = str(override.get_value_string())
        problems.append(Problem(key, kind, "is a range to be searched, which hydra/sweeper=basic cannot", f"{key}=<value>,<value>"))
        return []
    values = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not values:
        problems.append(Problem(key, line.partition("=")[2], "stands for no value at all", f"{key}=<value>,<value>"))
    return values


def _zip_groups(line: str, problems: list[Problem]) -> list[list[str]]:
    """`+sweep.zip=[a,b]`, or `[[a,b],[c,d]]`."""
    value = parse_line(line).value()
    groups = value if isinstance(value, list) and value and all(isinstance(entry, list) for entry in value) else [value]
    if not all(isinstance(group, list) and len(group) > 1 and all(isinstance(key, str) for key in group) for group in groups):
        problems.append(
            Problem(_ZIP, line.partition("=")[2], "lists the swept keys that go together", "+sweep.zip=[optimizer.lr,loop.batch_size]")
        )
        return []
    return groups  # type: ignore[return-value]


def _zipped(group: list[str], axes: dict[str, list[str]], problems: list[Problem]) -> list[list[str]]:
    missing = [key for key in group if key not in axes]
    for key in missing:
        problems.append(Problem(_ZIP, key, "is not swept, so there is nothing to go with the others", f"{key}=<value>,<value>"))
    lengths = {key: len(axes[key]) for key in group if key not in missing}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} has {n}" for key, n in lengths.items())
        problems.append(Problem(_ZIP, "[" + ",".join(group) + "]", f"needs as many values of each: {told}"))
    return [] if missing else [list(job) for job in zip(*(axes[key] for key in group))]


def _rows(name: str, problems: list[Problem]) -> list[list[str]]:
    """Jobs from a file: a YAML list of mappings or of lists of overrides, or a CSV whose header has the keys."""
    path = Path(name.strip("'\"")).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return [
                [f"{key.strip()}={value.strip()}" for key, value in row.items() if value and value.strip()]
                for row in csv.DictReader(text.splitlines())
            ]
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(Problem(_FILE, name, f"cannot be read: {error}".splitlines()[0]))
        return []
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict | list | str) for entry in content):
        problems.append(Problem(_FILE, name, "is no list of jobs: each is a mapping {optimizer.lr: 0.1, seed: 1} or a list of overrides"))
        return []
    return [
        [f"{key}={as_override(value)}" for key, value in entry.items()] if isinstance(entry, dict) else [entry] if isinstance(entry, str) else list(map(str, entry))
        for entry in content
    ]  # fmt: skip


# Whether they are sound


def _checked_jobs(
    composer: Composer, base: list[str], swept: list[list[str]], settings: LauncherConfig
) -> tuple[list[Planned], list[Problem]]:
    jobs: list[Planned] = []
    found: dict[tuple[str, str, str], tuple[Problem, list[int]]] = {}
    for index, own in enumerate(swept):
        try:
            composed = composer.compose([*base, *own])
            resources = resources_for(composed, settings)
            with as_if(_ranks(settings, resources)):
                run, problems = checked(composed)
        except ConfigError as error:
            run, problems, resources = None, [p for p in error.problems if isinstance(p, Problem)], {}
        for problem in problems:
            found.setdefault((problem.key, str(problem.value), problem.reason), (problem, []))[1].append(index)
        if run is not None:
            jobs.append(Planned(own, _group(own), run, resources))
        if len(found) >= MOST_PROBLEMS:
            break
    return jobs, [_located(problem, indices, swept) for problem, indices in found.values()]


def _ranks(settings: LauncherConfig, resources: dict[str, Any]) -> int | None:
    """Processes of one job; None where it is the host's affair."""
    if not isinstance(settings, SlurmLauncherConfig):
        return getattr(settings, "gpus_per_job", None) or None
    known = {key: value for key, value in resources.items() if key in ("nodes", "tasks_per_node", "gpus_per_node")}
    return dataclasses.replace(settings, **known).ranks


def _located(problem: Problem, indices: Sequence[int], swept: Sequence[Sequence[str]]) -> Problem:
    """Say in which jobs, where it is not in all of them."""
    if len(indices) == len(swept):
        return problem
    which = f"job {indices[0]} of {len(swept)}: {' '.join(swept[indices[0]])}"
    more = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
    return dataclasses.replace(problem, reason=f"{problem.reason} ({which}{more})")


def _group(own: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for line in own:
        override = parse_line(line)
        if override.key_or_group != "seed":
            settings[override.get_key_element().lstrip("+")] = _plain(override)
    return settings


def _plain(override: Override) -> Any:
    value = override.value()
    return value if value is None or isinstance(value, bool | int | float | str | list | dict) else str(value)


def _refuse_twins(jobs: Sequence[Planned]) -> None:
    """Two jobs that are the same run would wait for one another, or run twice."""
    seen: dict[Path, Planned] = {}
    for job in jobs:
        if job.run.resume.name == "never":
            continue  # each gets a directory of its own
        path = run_directory(job.run)
        if path in seen:
            differs = [line for line in job.overrides if line not in seen[path].overrides] or job.overrides
            raise ConfigError(
                Problem(
                    "sweep", str(job), f"is the same run as {seen[path]}: {' '.join(differs)} cannot change a result, so both have {path}",
                    "resume=never for a run each, or version=<a name> in each",
                )
            )  # fmt: skip
        seen[path] = job


def _warnings(jobs: Sequence[Planned]) -> list[str]:
    from trainer.validation import warnings_of

    return list(dict.fromkeys(warning for job in jobs for warning in warnings_of(job.run)))
