"""How a search chooses its jobs: `hydra/sweeper=optuna` and `hydra.sweeper.*`. Jobs that are known from the beginning need no settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from trainer.config.fields import field_problems, setting
from trainer.errors import Problem


class Pruner(Enum):
    """Which trials are ended before their end."""

    none = "none"
    median = "median"


@dataclass
class OptunaSweeperConfig:
    """A tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) that learns from the trials so far. Names are Optuna's."""

    n_trials: int = setting(20, "trials of the whole search; with several seeds, each trial is a run for each seed", ge=1)
    n_jobs: int | None = setting(None, "trials at a time; null = as many as fit on this host, 4 on SLURM", ge=1)
    n_startup_trials: int = setting(10, "trials drawn at random before the estimator chooses", ge=1)
    seed: int = setting(0, "of the draws", ge=0)
    pruner: Pruner = setting(
        Pruner.none, "median: end a trial that is worse than the median of the finished trials was after as many validations"
    )
    n_warmup_steps: int = setting(1, "validations of a trial before it may be ended", ge=0)
    max_failures: int = setting(5, "failed trials in a row after which no more are started", ge=1)
    params: dict[str, Any] = field(default_factory=dict, metadata={"help": "what is swept, where a YAML says so"})

    def problems(self) -> Iterator[Problem]:
        yield from field_problems(self, "hydra.sweeper")


SWEEPERS: dict[str, type[OptunaSweeperConfig]] = {"optuna": OptunaSweeperConfig}
