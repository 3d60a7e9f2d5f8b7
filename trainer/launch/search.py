"""`hydra/sweeper=optuna`: a sweep that chooses its jobs as results come in, one trial after another.

What has been tried, its manifest says, and what came of it, the run directories: nothing else is kept, so `resume` goes on from
wherever the launcher ended. The estimator is `trainer.launch.study`'s. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from trainer.config.launcher import LAUNCHERS, Code, LauncherConfig
from trainer.config.sweeper import OptunaSweeperConfig, Pruner
from trainer.errors import ConfigError, Problem
from trainer.launch import study
from trainer.launch.axes import is_sweep
from trainer.launch.compose import Composer
from trainer.launch.jobs import Planned, Workshop
from trainer.launch.multirun import append
from trainer.launch.space import axes_of
from trainer.launch.study import Trial
from trainer.log.record import parse
from trainer.rundir import RunDirectory, run_directory
from trainer.sweep.found import number
from trainer.sweep.manifest import Job, Manifest, State, state_of

_TRIES = 50  # proposals for one trial, where few are new or many cannot work
_AT_SLURM = 4  # trials at a time, where nobody says


@contextmanager
def searching(manifest: Manifest, at_a_time: int | None = None) -> Iterator[Search]:
    """The search that a manifest describes. `at_a_time`: trials, where the search itself does not say.

    Raises:
        ConfigError: somebody has edited it so that it makes no sense.
    """
    with Composer(manifest.search.get("config_dir")) as composer:
        yield Search(manifest, composer, at_a_time or _AT_SLURM)


class Search:
    """The trials of a sweep. Implements `trainer.sweep.source.Source`."""

    def __init__(self, manifest: Manifest, composer: Composer, at_a_time: int) -> None:
        self.manifest = manifest
        self.settings, lines, self.repeats = _read(manifest)
        self.axes = [*axes_of(lines, OverridesParser.create(config_loader=composer.loader)).values()]
        study.check(self.axes)
        self.at_a_time = self.settings.n_jobs or at_a_time
        self._workshop = Workshop(composer, manifest.base, _launcher_settings(manifest))
        self._done: dict[int, Trial] = {}  # trials that cannot change any more
        self._curves: dict[Any, tuple[int, list[float]]] = {}  # of a run: the size of its record when it was read, and what it said
        self._judged: dict[int, int] = {}  # validations that an open trial had when it was found worth going on with
        self._told: set[int] = set()  # jobs that this launcher has told to end
        self._metric: tuple[str, bool] | None = None  # what trials are judged by, and whether more of it is better
        self.over: str | None = None  # why there will be no more trials
        self.gave_up = False

    # What the launcher asks

    def more(self, at_slurm: Mapping[str, str] | None = None) -> list[Job]:
        """The jobs of the next trial, where there is room for one."""
        trials = self.trials(at_slurm)
        if self.over or sum(trial.state == "open" for trial in trials) >= self.at_a_time:
            return []
        if len(trials) >= self.settings.n_trials:
            self.over = f"{len(trials)} trials"
            return []
        ended = [trial.state for trial in trials if trial.state != "open"]
        if len(ended) >= self.settings.max_failures and set(ended[-self.settings.max_failures :]) == {"failed"}:
            self.gave_up, self.over = True, f"the last {self.settings.max_failures} trials have failed (hydra.sweeper.max_failures)"
            return []
        return self._next(trials)

    def unwanted(self, at_slurm: Mapping[str, str] | None = None) -> list[Job]:
        """The running jobs of trials that are not worth going on with."""
        if self.settings.pruner is Pruner.none or self._metric is None:
            return []
        name, maximise = self._metric
        trials, told = self.trials(at_slurm), []
        for place, trial in enumerate(trials):
            if trial.state != "open" or len(trial.curve) <= self._judged.get(place, 0):
                continue
            if not study.is_hopeless(self.axes, trials, trial, self.settings, maximise=maximise):
                self._judged[place] = len(trial.curve)
                continue
            best = (max if maximise else min)(trial.curve)
            reason = f"{name} {best:.4f} at best after {len(trial.curve)} validations is worse than the median of the other trials"
            told += self._prune(place, reason, at_slurm)
        return told

    def _prune(self, place: int, reason: str, at_slurm: Mapping[str, str] | None) -> list[Job]:
        told = []
        for job in self._jobs(place):
            directory = self.manifest.directory(job)
            state = state_of(job, directory, at_slurm).state
            if state == "running" and directory.live_writer() is not None:
                if directory.asked_to_prune() is None or job.index not in self._told:  # a launcher may have died in between
                    directory.ask_to_prune(reason)
                    self._told.add(job.index)
                    told.append(job)
            elif state in ("preempted", "interrupted") and not at_slurm:  # it has ended in between
                directory.status("pruned", reason=reason)
        return told

    # What there is

    def trials(self, at_slurm: Mapping[str, str] | None = None) -> list[Trial]:
        """Every trial so far, in order."""
        if self._metric is None:  # before the first trial is read: its curve is one of this metric
            for job in self.manifest.jobs:
                if self.manifest.directory(job).is_finished():
                    self._value(job)
        return [self._trial(place, at_slurm) for place in range(len(self.manifest.jobs) // len(self.repeats))]

    def _jobs(self, place: int) -> list[Job]:
        return self.manifest.jobs[place * len(self.repeats) : (place + 1) * len(self.repeats)]

    def _trial(self, place: int, at_slurm: Mapping[str, str] | None) -> Trial:
        if place in self._done:
            return self._done[place]
        jobs = self._jobs(place)
        found = [state_of(job, self.manifest.directory(job), at_slurm) for job in jobs]
        values = [self._value(job) for job, state in zip(jobs, found, strict=True) if state.state == "completed"]
        state = _state_of_all(found, values)
        value = statistics.fmean(v for v in values if v is not None) if state == "completed" else None
        given = dict(line.split("=", 1) for line in jobs[0].overrides)
        trial = Trial({axis.key: given.get(axis.key, "") for axis in self.axes}, state, value, self._curve(jobs))
        if state in ("completed", "pruned"):
            self._done[place] = trial
        return trial

    def _value(self, job: Job) -> float | None:
        """What a completed run reached; None where that is no number."""
        result = self.manifest.directory(job).read_result() or {}
        metric = (str(result.get("metric")), result.get("mode") == "max")
        self._metric = self._metric or metric
        if metric != self._metric:
            reason = f"is judged by {metric[0]}, and the trials before it by {self._metric[0]}"
            raise ConfigError(Problem("sweep", f"job {job.index} ({job})", reason, f"loop.best_metric={self._metric[0]}"))
        value = (result.get("best") or {}).get(metric[0])
        return number(value)

    def _curve(self, jobs: Sequence[Job]) -> list[float]:
        """After each validation, the mean over the seeds: as far as all of them are."""
        if self.settings.pruner is Pruner.none or self._metric is None:
            return []
        curves = [self._curve_of(self.manifest.directory(job)) for job in jobs]
        return [statistics.fmean(values) for values in zip(*curves, strict=False)]

    def _curve_of(self, directory: RunDirectory) -> list[float]:
        assert self._metric is not None
        path = directory.metrics_path
        size = path.stat().st_size if path.exists() else 0
        if self._curves.get(path, (0, []))[0] != size:
            rows = (parse(line) for line in path.read_bytes().splitlines(keepends=True))
            values = [row[self._metric[0]] for row in rows if row is not None and self._metric[0] in row]
            self._curves[path] = (size, [float(value) for value in values if isinstance(value, int | float)])
        return self._curves.get(path, (0, []))[1]

    # The next one

    def _next(self, trials: Sequence[Trial]) -> list[Job]:
        """A trial that is new and can work; none where there is none left."""
        tried = {json.dumps(dict(trial.texts), sort_keys=True) for trial in trials}
        directories = {self.manifest.directory(job).path.resolve() for job in self.manifest.jobs}
        maximise = self._metric is None or self._metric[1]
        problems: list[Problem] = []
        for attempt in range(_TRIES):
            texts = study.proposal(self.axes, trials, self.settings, maximise=maximise, attempt=attempt)
            key = json.dumps(dict(texts), sort_keys=True)
            if key in tried:
                continue
            tried.add(key)
            planned, problems = self._made([f"{key}={text}" for key, text in texts.items()])
            if problems:
                continue
            if any(job.run.resume.name != "never" and run_directory(job.run).resolve() in directories for job in planned):
                continue  # what differs cannot change a result
            return append(self.manifest, planned)
        if problems:
            raise ConfigError(*problems)
        self.over = f"{len(trials)} trials: there is nothing else to try"
        return []

    def _made(self, point: list[str]) -> tuple[list[Planned], list[Problem]]:
        jobs: list[Planned] = []
        problems: list[Problem] = []
        for repeat in self.repeats:
            job, wrong = self._workshop.made([*point, *repeat])
            problems += wrong
            if job is not None:
                jobs.append(job)
        return jobs, problems

    # The end

    def verdict(self) -> tuple[int, str]:
        """The exit code of the whole search, and its best trial in words."""
        trials = self.trials()
        done = [(trial.value, place) for place, trial in enumerate(trials) if trial.value is not None]
        if not done or self._metric is None:
            return 1, self.over or "no trial is completed"
        name, maximise = self._metric
        value, place = (max if maximise else min)(done)
        told = " ".join(f"{key}={text}" for key, text in trials[place].texts.items())
        said = f"best of {len(done)} completed trials: {told} with {name} {value:.4f} (trial {place})"
        return int(self.gave_up), f"{self.over}; {said}" if self.gave_up else said


def _state_of_all(found: Sequence[State], values: Sequence[float | None]) -> str:
    """The state of a trial from those of its jobs; `values` of the completed ones."""
    kinds = {state.state for state in found}
    if "pruned" in kinds:
        return "pruned"
    if None in values or kinds & {"failed", "held", "cancelled", "interrupted"}:
        return "failed"
    return "completed" if kinds == {"completed"} else "open"


def _read(manifest: Manifest) -> tuple[OptunaSweeperConfig, list[str], list[list[str]]]:
    """What a manifest says of its search. Raises ConfigError where somebody has broken it."""
    content = manifest.search
    known = {f.name for f in dataclasses.fields(OptunaSweeperConfig)}
    values: dict[str, Any] = {key: value for key, value in content.items() if key in known}
    try:
        values["pruner"] = Pruner[values["pruner"]]
        settings = OptunaSweeperConfig(**values)
        problems = list(settings.problems())
        space, repeats = content["space"], content["repeats"]
        whole = space and repeats and all(is_sweep(line) for line in space) and len(manifest.jobs) % len(repeats) == 0
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(Problem("sweep", manifest.path, f"its manifest's search is damaged: {error!r}", _MEND)) from None
    if problems or not whole:
        raise ConfigError(*problems, *([] if whole else [Problem("sweep", manifest.path, "its manifest's search is damaged", _MEND)]))
    return settings, space, repeats


_MEND = "restore it, or start the sweep's command line again: trials that are finished are not run again"


def _launcher_settings(manifest: Manifest) -> LauncherConfig:
    values: dict[str, Any] = {**manifest.settings}
    values["code"] = Code[values["code"]]
    return LAUNCHERS[manifest.launcher](**values)
