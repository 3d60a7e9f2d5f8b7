"""Optuna as a function of what is known: of the trials so far, which values come next and which trial is not worth going on with.

No study is kept: it is made anew from the trials whenever it is asked, so that what has happened is written down once, in the
manifest and the run directories. Imports Optuna when called, and no torch.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.config.sweeper import OptunaSweeperConfig
from trainer.errors import ConfigError, Problem
from trainer.launch.space import Axis, Values

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

STATES = ("open", "completed", "pruned", "failed")
Texts = Mapping[str, str]  # by key: what stands behind the = of an override


@dataclass(frozen=True)
class Trial:
    """One set of values, and what came of it."""

    texts: Texts
    state: str  # one of STATES
    value: float | None = None  # of a completed one
    curve: Sequence[float] = field(default=())  # its value after each validation, as far as there are any


def proposal(axes: Sequence[Axis], trials: Sequence[Trial], settings: OptunaSweeperConfig, *, maximise: bool, attempt: int = 0) -> Texts:
    """The values of the next trial. The same for the same trials, and another for every `attempt`."""
    optuna = _optuna()
    # Of the number of the trial and not of how often somebody has asked: a search that is resumed draws what it would have drawn.
    seed = random.Random(f"{settings.seed} {len(trials)} {attempt}").getrandbits(32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=settings.n_startup_trials,
            seed=seed,
            multivariate=True,  # settings depend on one another: a learning rate and a batch size
            constant_liar=True,  # keeps away from what is being tried right now
        )
    study = optuna.create_study(direction=_direction(maximise), sampler=sampler)
    study.add_trials([_frozen(axes, trial) for trial in trials])
    asked = study.ask({axis.key: _distribution(axis) for axis in axes})
    return {axis.key: _text(axis, asked.params[axis.key]) for axis in axes}


def is_hopeless(axes: Sequence[Axis], trials: Sequence[Trial], trial: Trial, settings: OptunaSweeperConfig, *, maximise: bool) -> bool:
    """Whether an open trial is worse, at its last validation, than the median of the completed ones was by then."""
    optuna = _optuna()
    if not trial.curve:
        return False
    pruner = optuna.pruners.MedianPruner(n_startup_trials=_FEWEST, n_warmup_steps=settings.n_warmup_steps)
    study: Study = optuna.create_study(direction=_direction(maximise), pruner=pruner)
    study.add_trials([_frozen(axes, one) for one in trials if one.state == "completed"])
    return pruner.prune(study, _frozen(axes, trial))


_FEWEST = 3  # completed trials, for their median to mean anything


def check(axes: Sequence[Axis]) -> None:
    """Raise ConfigError where Optuna is not installed, or cannot search one of these."""
    try:
        _optuna()
    except ImportError:
        raise ConfigError(
            Problem("hydra/sweeper", "optuna", "Optuna is not installed", 'pip install -c constraints.txt -e ".[optuna]"')
        ) from None
    for axis in axes:
        if isinstance(axis, Values) and axis.log:
            reason = "only an interval has a logarithmic scale"
            raise ConfigError(Problem(axis.key, ",".join(axis.texts), reason, f"'{axis.key}=int(tag(log,interval(1,100)))'"))


def _direction(maximise: bool) -> str:
    return "maximize" if maximise else "minimize"


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(axis, Values):
        kind = IntDistribution if axis.is_whole else FloatDistribution
        return kind(axis.low, axis.high, log=axis.log)  # type: ignore[arg-type]
    return IntDistribution(0, len(axis.texts) - 1) if axis.ordered else CategoricalDistribution(axis.texts)


def _frozen(axes: Sequence[Axis], trial: Trial) -> FrozenTrial:
    """A trial as Optuna writes it down.

    Raises:
        ConfigError: somebody has edited its values, so that they are not of this search.
    """
    from optuna.trial import TrialState, create_trial

    state = {"open": TrialState.RUNNING, "completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    try:
        return create_trial(
            state=state[trial.state],
            value=trial.value if trial.state == "completed" else None,
            params={axis.key: _value(axis, trial.texts[axis.key]) for axis in axes},
            distributions={axis.key: _distribution(axis) for axis in axes},
            intermediate_values=dict(enumerate(trial.curve, 1)),
        )
    except (ValueError, KeyError) as error:
        told = " ".join(f"{key}={text}" for key, text in trial.texts.items())
        raise ConfigError(Problem("sweep", told, f"a job that this search cannot have asked for: {error}")) from error


def _text(axis: Axis, value: Any) -> str:
    if isinstance(axis, Values):
        return axis.texts[value] if axis.ordered else value
    return axis.line(value).partition("=")[2]


def _value(axis: Axis, text: str) -> Any:
    if isinstance(axis, Values):
        return axis.texts.index(text) if axis.ordered else text
    return int(text) if axis.is_whole else float(text)


def _optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
