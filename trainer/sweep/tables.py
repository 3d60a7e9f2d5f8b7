"""The table over seeds as text: Markdown, CSV, LaTeX, JSON, and lines for a terminal.

Files for machines have fractions of one, as everywhere on disk; tables for people have per cent.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from trainer.log.readable import is_rate, show
from trainer.sweep.arms import Arm, Metric
from trainer.sweep.found import text_of
from trainer.sweep.statistics import LEVEL, Comparison, Summary
from trainer.sweep.verdict import SIGNIFICANT, Row, Verdict, leader


def plus_minus(metric: Metric, summary: Summary, sign: str = "±") -> str:
    """97.12 ± 0.31 % for a rate, 0.1234 ± 0.0051 for anything else, - without a value."""
    if summary.mean is None:
        return "-"
    mean = show(metric.name, summary.mean)
    if summary.std is None:
        return mean
    return f"{mean.removesuffix(' %')} {sign} {show(metric.name, summary.std)}"


def interval(metric: Metric, summary: Summary) -> str:
    if summary.low is None or summary.high is None:
        return "-"
    return f"{show(metric.name, summary.low).removesuffix(' %')} … {show(metric.name, summary.high)}"


def difference(metric: Metric, comparison: Comparison | None) -> str:
    """In the metric's own unit: percentage points for a rate."""
    if comparison is None or comparison.difference is None:
        return "-"
    if is_rate(metric.name):
        return f"{100 * comparison.difference:+.2f} pp"
    return f"{comparison.difference:+.4g}"


def probability(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def gaps(arm: Arm) -> Iterator[str]:
    """Which seeds an arm lacks, and why, in words."""
    for seed, why in arm.failed.items():
        yield f"seed {seed} failed: {why}"
    for state in dict.fromkeys(arm.unfinished.values()):
        yield f"{seeds([s for s, told in arm.unfinished.items() if told == state])} {state}"
    if arm.missing:
        yield f"{seeds(arm.missing)} missing"


def seeds(numbers: Sequence[int]) -> str:
    return f"seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def heading(verdict: Verdict) -> list[str]:
    """What the table is about, and how its numbers came about."""
    runs = [run for row in verdict.rows for run in row.arm.runs]
    states: dict[str, int] = {}
    for run in runs:
        states[run.state.state] = states.get(run.state.state, 0) + 1
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items(), key=lambda item: -item[1]))
    arms = len(verdict.rows)
    metric = verdict.main
    what = "bootstrap (BCa)" if verdict.interval == "bootstrap" else "Student's t"
    lines = [f"{len(runs)} runs in {arms} arm{'s' if arms > 1 else ''}: {counted}."]
    lines.append(
        f"{metric.name} at the {verdict.at} validation, {'higher' if metric.higher_is_better else 'lower'} is better: "
        f"mean ± standard deviation over seeds, {100 * LEVEL:.0f} % interval of the mean by {what}."
    )
    if verdict.reference and arms > 1:
        lines.append(
            f"Reference: {verdict.reference.arm.label}. Differences are paired by seed; p by the paired t test, two-sided, "
            f"after Holm's correction; d is the mean difference in units of its standard deviation."
        )
    if verdict.common and arms > 1:
        lines.append(f"Ranks are means over {seeds(verdict.common)}, which every arm with results has.")
    return lines


def markdown(verdict: Verdict) -> str:
    names = [metric.name for metric in [*verdict.metrics, *verdict.others]]
    columns = ["arm", "n", *names[:1], f"{100 * LEVEL:.0f} % interval", "rank", "difference", "p", "d", "improvement", *names[1:]]
    lines = [f"# {verdict.title}", "", *heading(verdict), "", "| " + " | ".join(columns) + " |"]
    lines.append("|---|" + "---:|" * (len(columns) - 1))
    for row in verdict.ordered:
        cells = _cells(verdict, row)
        cells[0] = cells[0].replace("|", "\\|")
        if row.is_best:
            cells[0], cells[2] = f"**{cells[0]}** (best)", f"**{cells[2]}**"
        elif row.ties:
            cells[0] = f"{cells[0]} ≈"
        if row.is_reference and len(verdict.rows) > 1:
            cells[0] += " (reference)"
        lines.append("| " + " | ".join(cells) + " |")
    if any(row.ties for row in verdict.rows):
        lines += ["", f"≈ cannot be told from the best arm on the same seeds (paired t test, p ≥ {SIGNIFICANT})."]
    named = list(remarks(verdict))
    if named:
        lines += ["", "## Missing, failed, and to be known", "", *(f"- {text}" for text in named)]
    return "\n".join(lines) + "\n"


def remarks(verdict: Verdict) -> Iterator[str]:
    """Every seed that is not in the table, and everything that casts a doubt on a number in it."""
    for row in verdict.rows:
        for gap in gaps(row.arm):
            yield f"{row.arm.label}: {gap}"
    yield from dict.fromkeys(verdict.notes)


def _cells(verdict: Verdict, row: Row) -> list[str]:
    metric = verdict.main
    ours, against = row.summaries[metric.name], row.against.get(metric.name)
    return [
        row.arm.label,
        str(ours.n),
        plus_minus(metric, ours),
        interval(metric, ours),
        "-" if row.rank is None else f"{row.rank:.2f}",
        difference(metric, against),
        probability(row.adjusted.get(metric.name)),
        "-" if against is None or against.effect is None else f"{against.effect:+.2f}",
        "-" if row.improvement is None else f"{100 * row.improvement:+.2f} %",
        *(plus_minus(other, row.summaries[other.name]) for other in [*verdict.metrics[1:], *verdict.others]),
    ]


def comma_separated(verdict: Verdict) -> str:
    """One line an arm; fractions of one and empty cells, for spreadsheets."""
    keys = list(dict.fromkeys(key for row in verdict.rows for key in row.arm.settings))
    metrics = [*verdict.metrics, *verdict.others]
    parts = ("n", "mean", "std", "low", "high")
    tests = ("pairs", "difference", "difference_low", "difference_high", "t", "p", "p_holm", "effect")
    head = ["arm", *keys, "seeds", "failed", "unfinished", "missing", "best", "ties_with_best", "reference", "rank", "improvement"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, *(f"{m.name}:{p}" for m in metrics for p in parts), *(f"{m.name}:{p}" for m in verdict.metrics for p in tests)])
    for row in verdict.ordered:
        arm = row.arm
        line: list[Any] = [arm.label, *(text_of(arm.settings[k]) if k in arm.settings else "" for k in keys)]
        line += [_joined(arm.seeds), _joined(arm.failed), _joined(arm.unfinished), _joined(arm.missing)]
        line += [int(row.is_best), int(row.ties), int(row.is_reference), row.rank, row.improvement]
        line += [value for m in metrics for value in asdict(row.summaries[m.name]).values()]
        for m in verdict.metrics:
            c = row.against.get(m.name)
            line += [c.n, c.difference, c.low, c.high, c.t, c.p, row.adjusted.get(m.name), c.effect] if c else [None] * len(tests)
        writer.writerow(line)
    return out.getvalue()


def _joined(numbers: Any) -> str:
    return " ".join(map(str, numbers))


_TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "…": r"\dots", "≈": r"$\approx$", **{c: "\\" + c for c in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}  # fmt: skip


def tex_escape(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def tex(verdict: Verdict) -> str:
    """A table for \\input, in booktabs' style."""
    metrics = verdict.metrics if len(verdict.metrics) > 1 else [*verdict.metrics, *verdict.others]
    ranked = any(row.rank is not None for row in verdict.rows)
    columns = ["arm", "$n$", *(tex_escape(m.short) + (r"~$\uparrow$" if m.higher_is_better else r"~$\downarrow$") for m in metrics)]
    columns += ["rank", r"$\Delta$", "$p$"] if ranked else []
    lines = [f"% {verdict.title}: {' '.join(heading(verdict))}".replace("\n", " "), r"% needs \usepackage{booktabs}"]
    lines += [r"\begin{tabular}{l" + "r" * (len(columns) - 1) + "}", r"\toprule", " & ".join(columns) + r" \\", r"\midrule"]
    leaders = {m.name: leader(verdict.rows, m) for m in metrics}
    for row in verdict.ordered:
        cells = [tex_escape(row.arm.label), str(row.summaries[verdict.main.name].n)]
        for m in metrics:
            cell = tex_escape(plus_minus(m, row.summaries[m.name]).removesuffix(" %"))
            cells.append(rf"\textbf{{{cell}}}" if leaders[m.name] is row else cell)
        if ranked:
            gain = "-" if row.improvement is None else rf"{100 * row.improvement:+.2f}\,\%"
            cells += ["-" if row.rank is None else f"{row.rank:.2f}", gain, probability(row.adjusted.get(verdict.main.name))]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def json_text(verdict: Verdict) -> str:
    """Everything, for programs."""
    metrics = [*verdict.metrics, *verdict.others]
    content = {
        "title": verdict.title,
        "at": verdict.at,
        "interval": verdict.interval,
        "level": LEVEL,
        "metrics": [{"name": m.name, "mode": "max" if m.higher_is_better else "min", "chosen": m in verdict.metrics} for m in metrics],
        "seeds_of_all": verdict.common,
        "reference": verdict.reference.arm.label if verdict.reference else None,
        "best": verdict.best.arm.label if verdict.best else None,
        "arms": [_as_json(row, metrics) for row in verdict.rows],
        "pairs": [{"arm": i, "less": j, **asdict(comparison)} for (i, j), comparison in verdict.pairs.items()],
        "remarks": list(remarks(verdict)),
    }
    lines = [f"{json.dumps(key)}: {_lines(value)}" for key, value in content.items()]
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _lines(value: Any) -> str:
    """JSON with a line for each entry of a list: `indent` would take Python's slow encoder, and a line for each number."""
    if not isinstance(value, list) or not value:
        return json.dumps(value, ensure_ascii=False)
    return "[\n  " + ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in value) + "\n ]"


def _as_json(row: Row, metrics: Sequence[Metric]) -> dict[str, Any]:
    arm = row.arm
    tests = {name: {**asdict(c), "p_holm": row.adjusted.get(name)} for name, c in row.against.items()}
    return {
        "label": arm.label,
        "settings": arm.settings,
        "metrics": {m.name: {**asdict(row.summaries[m.name]), "values": arm.scores.get(m.name, {})} for m in metrics},
        "rank": row.rank,
        "improvement": row.improvement,
        "is_best": row.is_best,
        "ties_with_best": row.ties,
        "is_reference": row.is_reference,
        "against_reference": tests,
        "against_best": asdict(row.from_best) if row.from_best else None,
        "seeds": arm.seeds,
        "failed": arm.failed,
        "unfinished": arm.unfinished,
        "missing": arm.missing,
        "not_finite": arm.not_finite,
        "runs": [{"directory": str(run.directory), "seed": run.seed, "state": run.state.state} for run in arm.runs],
    }


def lines_for_terminal(verdict: Verdict, most: int = 20) -> Iterator[str]:
    """The best arms and every remark, aligned."""
    head = ["arm", "n", verdict.main.name, f"{100 * LEVEL:.0f} % interval", "rank", "difference", "p", "d"]
    shown = verdict.ordered[:most]
    cells = [head] + [_cells(verdict, row)[: len(head)] for row in shown]
    if len(verdict.rows) == 1:
        cells = [line[:4] for line in cells]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for number, line in enumerate(cells):
        row = shown[number - 1] if number else None
        mark = " " if row is None else "*" if row.is_best else "≈" if row.ties else " "
        yield (mark + " " + line[0].ljust(widths[0]) + "  " + "  ".join(c.rjust(w) for c, w in zip(line[1:], widths[1:]))).rstrip()
    if len(verdict.rows) > most:
        yield f"  … and {len(verdict.rows) - most} more arms in the files"
    legend = ["* best"] * any(row.is_best for row in shown) + ["≈ not to be told from it (paired t test)"] * any(row.ties for row in shown)
    if legend:
        yield "  " + ", ".join(legend)
    named = list(remarks(verdict))
    yield from (f"  ! {text}" for text in named[:most])
    if len(named) > most:
        yield f"  … and {len(named) - most} more remarks in report.md"
