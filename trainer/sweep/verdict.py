"""The table over seeds: every arm's mean, spread, rank and distance from a reference, computed once for every format.

Knows arms and statistics; knows nothing of how a table is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainer.config.dataset import is_test
from trainer.config.names import nearest
from trainer.errors import ConfigError, Problem
from trainer.sweep.arms import Arm, Metric, arms_of, metrics_of
from trainer.sweep.found import Found, text_of
from trainer.sweep.statistics import Comparison, Summary, compare, holm, ranks, summary

SIGNIFICANT = 0.05
ALL_PAIRS = 30  # arms up to which every pair is compared; of 500 arms there are 125,000


@dataclass
class Row:
    """One arm."""

    arm: Arm
    summaries: dict[str, Summary]  # by metric
    rank: float | None = None  # mean over the chosen metrics and the seeds that all arms have
    improvement: float | None = None  # mean over the chosen metrics of (arm - reference) / |reference|, positive for better
    against: dict[str, Comparison] = field(default_factory=dict)  # the reference, by metric
    adjusted: dict[str, float | None] = field(default_factory=dict)  # p-values of those, Holm's, by metric
    from_best: Comparison | None = None  # on the first chosen metric
    is_best: bool = False
    is_reference: bool = False

    @property
    def ties(self) -> bool:
        """Whether it cannot be told from the best arm on the same seeds; False too where nobody can say."""
        return self.from_best is not None and self.from_best.p is not None and self.from_best.p >= SIGNIFICANT


@dataclass
class Verdict:
    """What a sweep says."""

    title: str
    at: str  # best or last
    interval: str  # t or bootstrap
    metrics: list[Metric]  # those that were asked for; the first decides
    others: list[Metric]
    rows: list[Row]  # in the order of the sweep
    common: list[int]  # seeds that every arm with results has
    pairs: dict[tuple[int, int], Comparison]  # arm i less arm j, i < j, on the first metric
    notes: list[str]

    @property
    def main(self) -> Metric:
        return self.metrics[0]

    @property
    def best(self) -> Row | None:
        return next((row for row in self.rows if row.is_best), None)

    @property
    def reference(self) -> Row | None:
        return next((row for row in self.rows if row.is_reference), None)

    @property
    def ordered(self) -> list[Row]:
        """From the best to the worst; arms without results last."""

        def key(row: Row) -> tuple[bool, float]:
            mean = row.summaries[self.main.name].mean
            return mean is None, 0.0 if mean is None else -mean if self.main.higher_is_better else mean

        return sorted(self.rows, key=key)


def judge(
    found: Found, chosen: Sequence[str] = (), *, at: str = "best", reference: str | None = None, interval: str = "t"
) -> Verdict:  # fmt: skip
    """Everything that the report says of the runs in `found`.

    Raises:
        ConfigError: no run has the metric, no arm is the reference, or nothing is completed yet.
    """
    arms = arms_of(found, at)
    known = metrics_of(arms)
    if not known:
        raise ConfigError(Problem("report", found.title, _why_nothing(arms), f"python -m trainer status {found.home}"))
    metrics = [_metric(name, known) for name in chosen] or known[:1]
    rows = [_row(arm, known, bootstrap=interval == "bootstrap") for arm in arms]
    base = _reference(rows, reference, metrics[0])
    if base is not None:
        base.is_reference = True
        for metric in metrics:
            _compare(rows, base, metric)
        for row in rows:
            row.improvement = _improvement(row, base, metrics)
    _mark_best(rows, metrics[0])
    common = _rank(rows, metrics)
    pairs = _pairs(rows, metrics[0]) if len(rows) <= ALL_PAIRS else {}
    others = [metric for metric in known if metric not in metrics]
    verdict = Verdict(found.title, at, interval, metrics, others, rows, common, pairs, found.notes())
    verdict.notes += _disagreements(arms, metrics[0])
    verdict.notes += _chosen_on_test(arms) if at == "best" else []
    return verdict


def _why_nothing(arms: Sequence[Arm]) -> str:
    failed = [why for arm in arms for why in arm.failed.values()]
    count = sum(len(arm.runs) for arm in arms)
    return f"no run is completed yet, of {count}" + (f"; {len(failed)} failed, the first with: {failed[0]}" if failed else "")


def _metric(name: str, known: Sequence[Metric]) -> Metric:
    for metric in known:
        if name in (metric.name, metric.short):
            return metric
    close = nearest(name, [metric.name for metric in known])
    names = ", ".join(metric.name for metric in known)
    raise ConfigError(Problem("--metric", name, f"no run has it; there are {names}", f"--metric {close or known[0].name}"))


def _row(arm: Arm, known: Sequence[Metric], *, bootstrap: bool) -> Row:
    return Row(arm, {m.name: summary(list(arm.scores.get(m.name, {}).values()), bootstrap=bootstrap) for m in known})


def _reference(rows: Sequence[Row], asked: str | None, metric: Metric) -> Row | None:
    """The arm that was asked for, by its number or by words of its settings; else the first that has results."""
    usable = [row for row in rows if row.summaries[metric.name].n]
    if asked is None:
        return usable[0] if usable else None
    if asked.isdigit() and int(asked) < len(rows):
        return rows[int(asked)]
    words = set(asked.replace(",", " ").split())
    fitting = [row for row in rows if words <= _words(row.arm)]
    exact = [row for row in fitting if row.arm.label == asked]
    if len(exact or fitting) == 1:
        return (exact or fitting)[0]
    shown = "; ".join(row.arm.label for row in (fitting or rows)[:8])
    reason = f"fits {len(fitting)} arms: {shown}" if fitting else f"is none of the arms: {shown}"
    raise ConfigError(Problem("--reference", asked, reason, f"--reference {rows.index((fitting or usable or list(rows))[0])}"))


def _words(arm: Arm) -> set[str]:
    """What an arm may be called by: its settings, under their full and their short names."""
    pairs = [(key, text_of(value)) for key, value in arm.settings.items()]
    return {f"{name}={value}" for key, value in pairs for name in (key, key.rpartition(".")[2])} | set(arm.label.split())


def _compare(rows: Sequence[Row], base: Row, metric: Metric) -> None:
    reference = base.arm.scores.get(metric.name, {})
    others = [row for row in rows if row is not base]
    for row in others:
        row.against[metric.name] = compare(row.arm.scores.get(metric.name, {}), reference)
    adjusted = holm([row.against[metric.name].p for row in others])
    for row, p in zip(others, adjusted, strict=True):
        row.adjusted[metric.name] = p


def _improvement(row: Row, base: Row, metrics: Sequence[Metric]) -> float | None:
    """On the seeds that both have: a seed that only one has would count for or against it."""
    if row is base:
        return None
    parts = []
    for metric in metrics:
        ours, theirs = row.arm.scores.get(metric.name, {}), base.arm.scores.get(metric.name, {})
        common = [seed for seed in ours if seed in theirs]
        before = math.fsum(theirs[seed] for seed in common)
        if not common or before == 0.0:
            return None
        gain = (math.fsum(ours[seed] for seed in common) - before) / abs(before)
        parts.append(gain if metric.higher_is_better else -gain)
    return math.fsum(parts) / len(parts)


def leader(rows: Sequence[Row], metric: Metric) -> Row | None:
    """The best mean, among the arms with more than half as many seeds as the fullest: one lucky seed beats no mean of three."""
    most = max((row.summaries[metric.name].n for row in rows), default=0)
    means = [(s.mean, row) for row in rows if 2 * (s := row.summaries[metric.name]).n > most and s.mean is not None]
    if not means or len(rows) < 2:
        return None
    return (max if metric.higher_is_better else min)(means, key=lambda pair: pair[0])[1]


def _mark_best(rows: Sequence[Row], metric: Metric) -> None:
    best = leader(rows, metric)
    if best is None:
        return
    best.is_best = True
    for row in rows:
        if row is not best:
            row.from_best = compare(row.arm.scores.get(metric.name, {}), best.arm.scores[metric.name])


def _rank(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[int]:
    """Mean ranks over metrics and seeds, among the arms that have results; the seeds that all of these have."""
    placed = [row for row in rows if all(row.arm.scores.get(metric.name) for metric in metrics)]
    seeds = [set(row.arm.scores[metric.name]) for row in placed for metric in metrics]
    common = sorted(set.intersection(*seeds)) if seeds else []
    sums = [0.0] * len(placed)
    for metric in metrics:
        for seed in common:
            places = ranks([row.arm.scores[metric.name][seed] for row in placed], higher_is_better=metric.higher_is_better)
            sums = [total + place for total, place in zip(sums, places, strict=True)]
    if common and len(placed) > 1:
        for row, total in zip(placed, sums, strict=True):
            row.rank = total / (len(common) * len(metrics))
    return common


def _pairs(rows: Sequence[Row], metric: Metric) -> dict[tuple[int, int], Comparison]:
    scores: list[Mapping[int, float]] = [row.arm.scores.get(metric.name, {}) for row in rows]
    return {(i, j): compare(scores[i], scores[j]) for i in range(len(rows)) for j in range(i + 1, len(rows))}


def _chosen_on_test(arms: Sequence[Arm]) -> list[str]:
    """Arms whose best validation was picked among scores on test images."""
    notes = []
    for arm in arms:
        splits = dict.fromkeys(str(run.result.get("validated_on")) for run in arm.runs if run.result is not None)
        chosen = [split for split in splits if is_test(split)]
        if chosen:
            notes.append(
                f"{arm.label}: its best validations were chosen on test images ({', '.join(chosen)}); report --at last chooses nothing"
            )
    return notes


def _disagreements(arms: Sequence[Arm], main: Metric) -> list[str]:
    """Arms that were judged by another metric than the rest while they trained, and values that are not numbers."""
    notes = []
    for arm in arms:
        own = {str(run.result.get("metric")) for run in arm.runs if run.result is not None} - {main.name}
        if own and not arm.scores.get(main.name):
            notes.append(f"{arm.label}: has no {main.name}; it was judged by {', '.join(sorted(own))}")
        for name, seeds in arm.not_finite.items():
            if name == main.name:
                notes.append(f"{arm.label}: {name} is not a number for seed {', '.join(map(str, seeds))}, which is left out")
    return notes
