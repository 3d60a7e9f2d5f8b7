"""`hydra/sweeper=optuna` from its command line: what may be tried, checked at the ends of every range before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from trainer.config.launcher import LAUNCHERS, LauncherConfig
from trainer.config.sweeper import SWEEPERS, OptunaSweeperConfig, Pruner
from trainer.errors import ConfigError, Problem
from trainer.launch import study
from trainer.launch.axes import expand, key_of
from trainer.launch.compose import Composed, Composer, checked
from trainer.launch.jobs import MOST_PROBLEMS, Plan, checked_jobs, refuse_hydras, settings_of, swept_in_yaml
from trainer.launch.space import NOT_SEARCHED, Axis, axes_of


def planned_search(first: Composed, own: Sequence[str], lines: Sequence[str], composer: Composer, config_dir: str | None) -> Plan:
    """The search that a command line asks for. What it may try is composed and checked at the ends of every range.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    launcher = str(first.hydra.runtime.choices["hydra/launcher"])
    if launcher not in LAUNCHERS:
        raise ConfigError(Problem("hydra/launcher", launcher, "does not run searches", "hydra/launcher=local"))
    refuse_hydras(lines)
    settings, problems = settings_of("launcher", LAUNCHERS, first, own, composer)
    sweeper, more = settings_of("sweeper", SWEEPERS, first, own, composer)
    problems += more
    lines = [*swept_in_yaml(first, lines), *lines]
    axes = axes_of(lines, OverridesParser.create(config_loader=composer.loader))
    problems += _misplaced(lines, axes, settings, sweeper)
    if problems:
        raise ConfigError(*problems)
    study.check([*axes.values()])
    base, repeats = expand([line for line in lines if line not in axes], composer)
    probes = [[*point, *repeat] for point in _probes([*axes.values()]) for repeat in repeats[:1]]
    jobs, found = checked_jobs(composer, base, probes, settings)
    problems += found
    run, _ = checked(composer.compose(base))
    if problems or run is None:
        raise ConfigError(*problems[:MOST_PROBLEMS])
    if sweeper.pruner is not Pruner.none and any((job.run.loop.best_metric or "").startswith("train/") for job in jobs):
        reason = "compares validations, and these runs are judged by their training"
        raise ConfigError(Problem("hydra.sweeper.pruner", sweeper.pruner.name, reason, "hydra.sweeper.pruner=none"))
    search = {"sweeper": "optuna"} | _plain(sweeper) | {"space": [*axes], "repeats": repeats, "config_dir": config_dir}
    return Plan(base, [], launcher, settings, run, [], search)


def _misplaced(lines: Sequence[str], axes: Mapping[str, Axis], settings: LauncherConfig, sweeper: OptunaSweeperConfig) -> Iterator[Problem]:
    for line in lines:
        if key_of(line) in (*NOT_SEARCHED, "sweep.random", "sweep.random_seed"):
            yield Problem(key_of(line), line.partition("=")[2], "says which jobs there are, and so does a search", "hydra/sweeper=basic")
    if not axes:
        fix = "'optimizer.lr=tag(log,interval(1e-4,1e-1))'"
        yield Problem("hydra/sweeper", "optuna", "has nothing to search: every setting has one value", fix)
    if settings.canary:
        yield Problem("hydra.launcher.canary", True, "is for jobs that are known beforehand", "hydra.launcher.canary=false")
    if sweeper.n_jobs is not None and sweeper.n_jobs > sweeper.n_trials:
        reason = f"are more trials at a time than the {sweeper.n_trials} of the whole search"
        yield Problem("hydra.sweeper.n_jobs", sweeper.n_jobs, reason, f"hydra.sweeper.n_jobs={sweeper.n_trials}")


def _probes(axes: Sequence[Axis]) -> Iterator[list[str]]:
    """Points at which every end, or value, of every axis occurs: the others stay at their first."""
    firsts = [axis.probes()[0] for axis in axes]
    yield firsts
    for place, axis in enumerate(axes):
        yield from ([*firsts[:place], line, *firsts[place + 1 :]] for line in axis.probes()[1:])


def _plain(settings: OptunaSweeperConfig) -> dict[str, Any]:
    content = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name != "params"}
    return {key: value.name if isinstance(value, Enum) else value for key, value in content.items()}
