"""Jobs that a sweeper of Hydra's asks for, a batch at a time, as one sweep of ours with one manifest."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from trainer.config.launcher import LAUNCHERS, LauncherConfig, SlurmLauncherConfig
from trainer.errors import ConfigError, Problem, TrainyardError
from trainer.launch.compose import Composer
from trainer.launch.jobs import MOST_PROBLEMS, Plan, checked_jobs
from trainer.launch.multirun import append, write_down
from trainer.launch.resolve import to_object
from trainer.sweep.drive import drive
from trainer.sweep.manifest import Job, Manifest, driving, state_of

_FULL_ERROR = "HYDRA_FULL_ERROR"  # set around Hydra's own work; jobs are to end with their exit codes


class Batches:
    """One sweep, as its sweeper goes on."""

    def __init__(self, config: DictConfig) -> None:
        self._given = [str(line) for line in config.hydra.overrides.task]  # the command line, its searches included
        self._launcher = str(config.hydra.runtime.choices["hydra/launcher"])
        settings = to_object(config.hydra.launcher)
        assert isinstance(settings, LAUNCHERS[self._launcher])
        self._settings: LauncherConfig = settings
        self._manifest: Manifest | None = None
        sweeper = str(config.hydra.runtime.choices["hydra/sweeper"])
        problems = list(settings.problems())
        if not settings.wait and sweeper != "basic":
            reason = f"hydra/sweeper={sweeper} chooses jobs by the results of others, so somebody has to wait for them"
            problems.append(Problem("hydra.launcher.wait", False, reason, "hydra.launcher.wait=true"))
        if problems:
            raise ConfigError(*problems)
        self._searched = OmegaConf.to_container(config.hydra.searchpath) if config.hydra.searchpath else []

    def run(self, job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
        """The best metric of every job; nothing where nobody waits."""
        lines = [[line for line in job if line not in self._given] for job in job_overrides]
        swept = {line.partition("=")[0] for job in lines for line in job}
        base = [line for line in self._given if line.partition("=")[0] not in swept]
        jobs = self._planned(base, lines)
        before = os.environ.pop(_FULL_ERROR, None)
        try:
            assert self._manifest is not None
            code = drive(self._manifest, jobs)
        finally:
            if before is not None:
                os.environ[_FULL_ERROR] = before
        if code in (75, 130):
            sys.exit(code)
        return [self._returned(job) for job in jobs] if self._settings.wait else []

    def _planned(self, base: list[str], lines: list[list[str]]) -> list[Job]:
        search = [f"hydra.searchpath={self._searched}".replace("'", "")] if self._searched else []
        with Composer() as composer:
            planned, problems = checked_jobs(composer, [*search, *base], lines, self._settings)
        if problems:
            raise ConfigError(*problems[:MOST_PROBLEMS])
        plan = Plan(base, planned, self._launcher, self._settings, planned[0].run, [])
        if self._manifest is None:
            if isinstance(self._settings, SlurmLauncherConfig):
                from trainer.sweep.slurm import check

                check(self._settings, [job.resources for job in planned])
            self._manifest = write_down(plan, ["launch.py", *sys.argv[1:]])
            print(f"sweep {self._manifest.path}", flush=True)
            return self._manifest.jobs
        self._manifest = Manifest.load(self._manifest.path)
        with driving(self._manifest.path):
            return append(self._manifest, planned)

    def _returned(self, job: Job) -> JobReturn:
        assert self._manifest is not None
        directory = self._manifest.directory(job)
        returned = JobReturn(overrides=job.overrides)
        state, result = state_of(job, directory), directory.read_result()
        if state.state == "completed" and result is not None:
            returned.status = JobStatus.COMPLETED
            returned.return_value = result["best"].get(result["metric"])
        else:
            returned.status = JobStatus.FAILED
            returned.return_value = TrainyardError(f"job {job.index} ({job}) {state.state}: {state.reason}")
        return returned
