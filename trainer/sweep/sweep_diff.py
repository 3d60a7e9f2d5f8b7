"""What differs between two sweeps: their settings, their code, and every arm that both have, compared seed by seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, Problem
from trainer.sweep.arms import Arm, Metric, arms_of, metrics_of
from trainer.sweep.found import Found, find
from trainer.sweep.statistics import compare, holm, summary
from trainer.sweep.tables import difference, plus_minus, probability
from trainer.sweep.verdict import SIGNIFICANT


def differences(a: Path, b: Path) -> dict[str, Any]:
    """base: overrides of one alone; code: hashes; arms: by label, with each side's summary and B less A on the same seeds."""
    found = [find([path], "diff") for path in (a, b)]
    arms = [{_key(arm): arm for arm in arms_of(side)} for side in found]
    metrics = metrics_of([*arms[0].values(), *arms[1].values()])
    if not metrics:
        raise ConfigError(Problem("diff", b, "neither sweep has a completed run yet", f"python -m trainer status {b}"))
    common = [key for key in arms[0] if key in arms[1]]
    bases = [side.sweep.base if side.sweep else [] for side in found]
    compared = [_compared(arms[0][key], arms[1][key], metrics[0]) for key in common]
    for entry, p in zip(compared, holm([entry["difference"]["p"] for entry in compared]), strict=True):
        entry["p_holm"] = p
    return {
        "base": [[line for line in bases[i] if line not in bases[1 - i]] for i in (0, 1)],
        "code": [_codes(side) for side in found],
        "metric": {"name": metrics[0].name, "mode": "max" if metrics[0].higher_is_better else "min"},
        "arms": compared,
        "only": [[arm.label for key, arm in arms[i].items() if key not in arms[1 - i]] for i in (0, 1)],
    }


def _key(arm: Arm) -> str:
    """What the sweep varied: what it held fixed may be the very thing that is compared."""
    return json.dumps(arm.runs[0].job.group, sort_keys=True, default=str)


def _compared(a: Arm, b: Arm, metric: Metric) -> dict[str, Any]:
    ours, theirs = a.scores.get(metric.name, {}), b.scores.get(metric.name, {})
    sides = [asdict(summary(list(values.values()))) for values in (ours, theirs)]
    return {"label": a.label, "a": sides[0], "b": sides[1], "difference": asdict(compare(theirs, ours))}


def _codes(found: Found) -> list[str]:
    return sorted({run.code for run in found.runs if run.code and run.state.state == "completed"})


def lines(a: Path, b: Path, found: dict[str, Any]) -> Iterator[str]:
    from trainer.sweep.statistics import Comparison, Summary

    yield from (f"A  {a}", f"B  {b}", "")
    same = "the same" if not any(found["base"]) else ""
    yield f"settings that are not swept: {same}".rstrip()
    yield from (f"  {side} alone: {' '.join(base)}" for side, base in zip("AB", found["base"], strict=True) if base)
    codes = ["the same" if found["code"][0] == found["code"][1] else " and ".join("+".join(c) or "unknown" for c in found["code"])]
    yield f"code: {codes[0]}"
    metric = Metric(found["metric"]["name"], found["metric"]["mode"] == "max")
    rows = [("arm", f"A {metric.name}", "n", f"B {metric.name}", "n", "B - A", "p")]
    for arm in found["arms"]:
        one, two, gap = Summary(**arm["a"]), Summary(**arm["b"]), Comparison(**arm["difference"])
        rows.append((arm["label"], plus_minus(metric, one), str(one.n), plus_minus(metric, two), str(two.n), difference(metric, gap), probability(arm["p_holm"])))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    yield ""
    yield from ("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows)
    moved = sum(arm["p_holm"] is not None and arm["p_holm"] < SIGNIFICANT for arm in found["arms"])
    yield f"{moved} of {len(found['arms'])} arms moved (paired t test on the same seeds, p < {SIGNIFICANT} after Holm's correction)"
    yield from (f"only in {side}: {label}" for side, only in zip("AB", found["only"], strict=True) for label in only)
