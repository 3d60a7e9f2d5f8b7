"""The jobs of a sweep, from its command line: composed, typed and checked, all of them.

Hydra would compose every job by itself, twice. Here it composes once for each set of choices. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import RunConfig
from trainer.config.launcher import LAUNCHERS, LauncherConfig, SlurmLauncherConfig
from trainer.config.sweeper import SWEEPERS, OptunaSweeperConfig
from trainer.errors import ConfigError, Problem
from trainer.launch.axes import expand, is_sweep, key_of
from trainer.launch.compose import Composed, Composer, apply_to, checked, parse_line
from trainer.launch.draw import drawn
from trainer.launch.quick import Quick
from trainer.launch.resolve import to_object
from trainer.launch.resources import resources_for
from trainer.rundir import run_directory
from trainer.surroundings import as_if

MOST_PROBLEMS = 20  # of a sweep; more would bury the first ones
Settings = TypeVar("Settings", LauncherConfig, OptunaSweeperConfig)


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
    search: dict[str, Any] = field(default_factory=dict)  # of a sweep that chooses its jobs as it goes on, instead of jobs


def plan(overrides: Sequence[str], config_dir: str | None = None) -> Plan | None:
    """Every job of a command line; None where its launcher or its sweeper is not ours, so that Hydra has to do it.

    Raises:
        ConfigError: with what is wrong, in the words of a single run, and in which jobs.
    """
    with Composer(config_dir) as composer:
        own, lines = _partition(overrides)
        first = composer.compose([line for line in lines if not is_sweep(line) and not key_of(line).startswith("sweep.")])
        launcher, sweeper = (str(first.hydra.runtime.choices[f"hydra/{part}"]) for part in ("launcher", "sweeper"))
        if sweeper in SWEEPERS:
            from trainer.launch.search_plan import planned_search

            return planned_search(first, own, lines, composer, config_dir)
        if launcher not in LAUNCHERS or sweeper != "basic":
            return None
        refuse_hydras([*lines, *(line for line in own if not key_of(line).startswith("hydra.launcher."))])
        lines, rows = drawn(lines, OverridesParser.create(config_loader=composer.loader))
        settings, problems = settings_of("launcher", LAUNCHERS, first, own, composer)
        base, swept = expand([*swept_in_yaml(first, lines), *lines], composer)
        swept = [[*row, *job] for row in rows for job in swept]
        jobs, found = checked_jobs(composer, base, swept, settings)
        problems += found
        run, _ = checked(composer.compose(base)) if base or not jobs else (jobs[0].run, [])
    if problems:
        raise ConfigError(*problems[:MOST_PROBLEMS])
    _refuse_twins(jobs)
    return Plan(base, jobs, launcher, settings, run or jobs[0].run, _warnings(jobs, launcher))


def _partition(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """`hydra.launcher.*` and `hydra.sweeper.*`, which are checked here; and everything else."""
    ours = ("hydra.launcher.", "hydra.sweeper.")
    own = [line for line in overrides if key_of(line).startswith(ours) and not key_of(line).startswith("hydra.sweeper.params")]
    return own, [line for line in overrides if line not in own]


def swept_in_yaml(first: Composed, lines: Sequence[str]) -> list[str]:
    """What `hydra.sweeper.params` sweeps, where the command line does not say something else."""
    params = OmegaConf.to_container(first.hydra.sweeper.params or OmegaConf.create({})) if "params" in first.hydra.sweeper else {}
    assert isinstance(params, dict)
    given = {key_of(line) for line in lines}
    return [f"{key}={value}" for key, value in params.items() if key not in given]


def refuse_hydras(lines: Sequence[str]) -> None:
    """What Hydra does for its own launchers and would be ignored here without a word."""
    theirs = [line for line in lines if line.lstrip("+~").startswith(("hydra.", "hydra/"))]
    ours = ("hydra/launcher", "hydra/sweeper", "hydra.searchpath", "hydra.sweeper.params", "hydra.mode")
    others = [line for line in theirs if not key_of(line).startswith(ours)]
    if others:
        reason = "is Hydra's, and jobs are started without Hydra here"
        raise ConfigError(*(Problem(key_of(o), o.partition("=")[2], reason, f"hydra/launcher=basic {o}") for o in others))


def settings_of(
    part: str, kinds: Mapping[str, type[Settings]], first: Composed, own: Sequence[str], composer: Composer
) -> tuple[Settings, list[Problem]]:
    """The settings of the launcher, or of the sweeper, that was chosen."""
    name = str(first.hydra.runtime.choices[f"hydra/{part}"])
    node = OmegaConf.create({"hydra": {part: None}})
    node.hydra[part] = first.hydra[part]
    composed = Composed(node, first.hydra)
    problems = []
    for line in own:
        if not line.lstrip("+~").startswith(f"hydra.{part}."):
            continue
        try:
            apply_to(composed, parse_line(line), composer.loader)
        except HydraException as error:
            problems.append(Problem(line.partition("=")[0], line.partition("=")[2], str(error).splitlines()[0]))
    problems += [dataclasses.replace(p, fix=p.fix or _example(p.key)) for p in composed.problems]
    try:
        settings = to_object(node.hydra[part])
    except OmegaConfBaseException as error:
        raise ConfigError(*problems, Problem(f"hydra.{part}", name, str(error).splitlines()[0])) from error
    assert isinstance(settings, kinds[name])
    return settings, [*problems, *settings.problems()]


def _example(key: str) -> str:
    return f"{key}=..."


# Whether they are sound


def checked_jobs(
    composer: Composer, base: list[str], swept: list[list[str]], settings: LauncherConfig
) -> tuple[list[Planned], list[Problem]]:
    """The jobs with these lines of their own, and what is wrong with them."""
    jobs: list[Planned] = []
    found: dict[tuple[str, str, str], tuple[Problem, list[int]]] = {}
    workshop = Workshop(composer, base, settings)
    for index, own in enumerate(swept):
        job, problems = workshop.made(own)
        for problem in problems:
            found.setdefault((problem.key, str(problem.value), problem.reason), (problem, []))[1].append(index)
        if job is not None:
            jobs.append(job)
        if len(found) >= MOST_PROBLEMS:
            break
    return jobs, [_located(problem, indices, swept) for problem, indices in found.values()]


class Workshop:
    """Makes jobs, the quick way where it can."""

    def __init__(self, composer: Composer, base: list[str], settings: LauncherConfig) -> None:
        self._composer, self._base, self._settings = composer, base, settings
        self._quick: dict[tuple[str, ...], Quick | None] = {}  # by the choices of a job; None where there is no quick way

    def made(self, own: list[str]) -> tuple[Planned | None, list[Problem]]:
        """A job, where it could be made, and everything wrong with it."""
        return self._quickly(own) or self._at_length(own)

    def _quickly(self, own: list[str]) -> tuple[Planned, list[Problem]] | None:
        """None where there is something wrong, or something that is not plain."""
        from trainer.validation import problems_of

        try:
            overrides = {line: parse_line(line) for line in own}
        except HydraException:
            return None
        choices = tuple(
            line for line in own if not isinstance(overrides[line].value(), int | float) and "." not in overrides[line].key_or_group
        )
        if choices not in self._quick:
            self._quick[choices] = self._started(choices)
        quick = self._quick[choices]
        if quick is None:
            return None
        with quick.applied([override for line, override in overrides.items() if line not in choices]) as run:
            if run is None:
                return None
            resources = resources_for(quick.composed, self._settings)
            with as_if(ranks_of(self._settings, resources)):
                return None if any(problems_of(run)) else (Planned(own, _group(own), run, resources), [])

    def _started(self, choices: Sequence[str]) -> Quick | None:
        try:
            composed = self._composer.compose([*self._base, *choices])
            run, problems = checked(composed)
        except ConfigError:
            return None
        return None if problems or run is None else Quick(composed, run)

    def _at_length(self, own: list[str]) -> tuple[Planned | None, list[Problem]]:
        try:
            composed = self._composer.compose([*self._base, *own])
            resources = resources_for(composed, self._settings)
            with as_if(ranks_of(self._settings, resources)):
                run, problems = checked(composed)
        except ConfigError as error:
            return None, [p for p in error.problems if isinstance(p, Problem)]
        return None if run is None else Planned(own, _group(own), run, resources), problems


def ranks_of(settings: LauncherConfig, resources: dict[str, Any]) -> int | None:
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


def _warnings(jobs: Sequence[Planned], launcher: str) -> list[str]:
    from trainer.cautions import warnings_of

    here = launcher == "local"
    return list(dict.fromkeys(warning for job in jobs for warning in warnings_of(job.run, here=here)))
