"""Arms: runs that differ in nothing but the seed, what each scored, and which seeds it lacks and why.

Knows results and names of metrics; the arithmetic is in trainer.sweep.statistics.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.log.readable import is_rate
from trainer.sweep.found import Found, Run, number, text_of

_LOWER_IS_BETTER = re.compile(r"(^|_)(loss|error|err|mse|nmse|rmse|mae|nll|perplexity|fid|ece|brier|abs_rel|sq_rel)(_|$|\d)")
_SECONDS = "seconds"


@dataclass
class Arm:
    """Runs of one configuration."""

    settings: dict[str, Any]  # what tells it from the other arms, by dotted key
    runs: list[Run]
    label: str = ""
    scores: dict[str, dict[int, float]] = field(default_factory=dict)  # metric -> seed -> value
    failed: dict[int, str] = field(default_factory=dict)  # seed -> why
    unfinished: dict[int, str] = field(default_factory=dict)  # seed -> its state
    missing: list[int] = field(default_factory=list)  # seeds that other arms have and this one has not
    not_finite: dict[str, list[int]] = field(default_factory=dict)  # metric -> seeds whose value is not a number

    @property
    def seeds(self) -> list[int]:
        """Those that are completed."""
        return sorted({seed for values in self.scores.values() for seed in values})


@dataclass(frozen=True)
class Metric:
    name: str
    higher_is_better: bool

    @property
    def short(self) -> str:
        return self.name.removeprefix("val/")


def arms_of(found: Found, at: str = "best") -> list[Arm]:
    """The arms, in the order of their first runs; `at` says which validation's scores count: best or last."""
    of_sweep = found.sweep is not None
    grouped: dict[str, list[Run]] = {}
    groups: dict[str, Mapping[str, Any]] = {}
    for run in found.runs:
        config = {} if of_sweep else {key: value for key, value in run.config.items() if key != "seed"}
        group = config or run.job.group
        key = json.dumps(group, sort_keys=True, default=str)
        grouped.setdefault(key, []).append(run)
        groups.setdefault(key, group)
    varied = _varied([*groups.values()])
    arms = [
        Arm({key: group[key] for key in varied if key in group}, runs)
        for group, runs in zip(groups.values(), grouped.values(), strict=True)
    ]
    _name(arms, varied)
    for arm in arms:
        _read(arm, at)
    seeds = sorted({seed for arm in arms for run in arm.runs if (seed := seed_of(run)) is not None})
    for arm in arms:
        known = {seed_of(run) for run in arm.runs}
        arm.missing += [seed for seed in seeds if seed not in known]
    return arms


def seed_of(run: Run) -> int:
    """The seed; the number of the job where a sweep's jobs have none."""
    return run.seed if run.seed is not None else run.job.index


def _varied(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which the groups differ, in their own order."""
    keys = list(dict.fromkeys(key for group in groups for key in group))
    absent = object()
    return [key for key in keys if len({json.dumps(group.get(key), default=str) if key in group else absent for group in groups}) > 1]


def _name(arms: Sequence[Arm], varied: Sequence[str]) -> None:
    """A label for each arm: as few settings as tell all arms apart, under their shortest unambiguous names."""
    telling: list[str] = []
    parts = 1
    for key in varied:
        split = len({tuple(text_of(arm.settings.get(k, "")) for k in (*telling, key)) for arm in arms})
        if split > parts:
            telling.append(key)
            parts = split
    short = {key: key.rpartition(".")[2] for key in telling}
    twice = {name for name, count in Counter(short.values()).items() if count > 1}
    names = {key: key if name in twice else name for key, name in short.items()}
    for arm in arms:
        arm.label = " ".join(f"{names[k]}={text_of(arm.settings[k])}" for k in telling if k in arm.settings) or "the run as it is"


def _read(arm: Arm, at: str) -> None:
    """What became of each seed. Of several runs of one seed the newest that is completed counts, and a note says so."""
    for seed, runs in _by_seed(arm.runs).items():
        done = [run for run in runs if run.result is not None]
        if len(done) > 1:
            done.sort(key=lambda run: run.state.heartbeat or 0.0)
            done[-1].notes.append(f"{arm.label}, seed {seed}: completed {len(done)} times; {done[-1].directory}, the newest, counts")
        if not done:
            _not_done(arm, seed, runs[-1])
            continue
        result = done[-1].result
        assert result is not None
        for name in dict.fromkeys([str(result.get("metric")), *result[at]]):
            if name.startswith("val/") and _SECONDS not in name and name in result[at]:
                value = number(result[at][name])
                if value is None:
                    arm.not_finite.setdefault(name, []).append(seed)
                else:
                    arm.scores.setdefault(name, {})[seed] = value
        if str(result.get("metric")) not in result[at]:
            arm.not_finite.setdefault(str(result.get("metric")), []).append(seed)
    codes = {run.code for run in arm.runs if run.code and run.state.state == "completed"}
    if len(codes) > 1:
        arm.runs[0].notes.append(f"{arm.label}: its seeds ran {len(codes)} different states of the code (python -m trainer diff A B)")


def _by_seed(runs: Iterable[Run]) -> dict[int, list[Run]]:
    found: dict[int, list[Run]] = {}
    for run in runs:
        found.setdefault(seed_of(run), []).append(run)
    return dict(sorted(found.items()))


def _not_done(arm: Arm, seed: int, run: Run) -> None:
    state = run.state
    if state.state in ("failed", "held"):
        arm.failed[seed] = state.reason or "no reason was recorded"
    elif state.state in ("missing", "completed"):  # completed, and what it reached cannot be read
        arm.missing.append(seed)
    else:
        arm.unfinished[seed] = state.state


def metrics_of(arms: Sequence[Arm]) -> list[Metric]:
    """Every metric that some run has, the one that decided which validation was the best first.

    Where arms disagree about that, the one that most runs name."""
    named: Counter[tuple[str, str]] = Counter()
    for arm in arms:
        for run in arm.runs:
            if run.result is not None:
                named[str(run.result.get("metric")), str(run.result.get("mode"))] += 1
    modes = {name: mode == "max" for (name, mode), _ in reversed(named.most_common())}
    main = [name for (name, _), _ in named.most_common(1)]
    names = dict.fromkeys([*main, *sorted({name for arm in arms for name in arm.scores}, key=lambda n: (not is_rate(n), n))])
    return [Metric(name, modes.get(name, higher_is_better(name))) for name in names]


def higher_is_better(name: str) -> bool:
    """Of a metric that no run has chosen its best by: losses and errors are better where they are lower."""
    return is_rate(name) or not _LOWER_IS_BETTER.search(name.rsplit("/", 1)[-1])
