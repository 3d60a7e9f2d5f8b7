"""`hydra/launcher=local` and `slurm` for Hydra's plugin machinery, which looks for launchers here and nowhere else.

`python launch.py -m` does not need them, as it knows its jobs before Hydra is asked (`trainer.launch.multirun`). A sweeper that
chooses the next jobs by the results of the last does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as SubmititSlurmLauncher
from omegaconf import DictConfig


class LocalLauncher(Launcher):
    """A pool of processes on this host."""

    def __init__(self, **settings: Any) -> None:
        self._config: DictConfig | None = None
        self._batches: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run these jobs. All batches of a sweeper share one manifest. Returns each job's best metric."""
        from trainer.launch.batches import Batches  # plugins are imported whenever Hydra starts

        assert self._config is not None
        if self._batches is None:
            self._batches = Batches(self._config)
        return self._batches.run(job_overrides)


class SlurmLauncher(SubmititSlurmLauncher):
    """SLURM arrays. The options are submitit's; composing, starting and requeueing are ours."""

    _batches: Any = None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Queue these jobs; with `hydra.launcher.wait=true`, each job's best metric when they have ended, else nothing."""
        from trainer.launch.batches import Batches

        assert self.config is not None
        if self._batches is None:
            self._batches = Batches(self.config)
        return self._batches.run(job_overrides)
