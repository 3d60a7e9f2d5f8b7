"""`python -m trainer status PATH ...`: how the jobs of a sweep are doing, live on a terminal.

What a run is doing, its own directory says: status.json with a heartbeat, and a lock that tells whether its process is there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.log.readable import duration, show
from trainer.sweep.found import Found, Run, find, last_row, number
from trainer.sweep.manifest import OPEN
from trainer.sweep.manifest import STATES as ORDER

REFRESH = 2.0  # seconds between two looks
ATTENTION = (
    "failed",
    "running",
    "preempted",
    "interrupted",
    "missing",
    "held",
    "cancelled",
    "queued",
    "pruned",
    "completed",
)  # what is shown first
_URGENCY = {state: place for place, state in enumerate(ATTENTION)}
COLOURS = {"completed": "32", "running": "34", "failed": "31", "missing": "31", "held": "31", "preempted": "33", "interrupted": "33", "cancelled": "33", "pruned": "36"}  # fmt: skip
BAR = 14  # characters


@dataclass
class Line:
    """One job, as far as its directory tells."""

    index: int
    settings: str
    seed: int | None
    state: str
    step: int
    total_steps: int | None
    epoch: float | None
    seconds: float | None  # in the run, over all its starts
    eta: float | None  # seconds to its end, at the pace so far
    metric: str | None
    value: float | None  # the best of a completed run, the last of any other
    heartbeat_age: float | None  # seconds since its last sign of life; of a run that is not over
    attempts: int
    reason: str | None
    directory: str


def main(argv: Sequence[str]) -> int:
    options = arguments().parse_intermixed_args(argv)
    if options.json:
        found = find(options.paths, "status")
        print(json.dumps(as_json(found, lines_of(found)), indent=1, ensure_ascii=False))
    elif options.once or not sys.stdout.isatty():
        found = find(options.paths, "status")
        print("\n".join(table(found.title, lines_of(found), limit=None, width=_width(), colour=sys.stdout.isatty())))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            watch(options.paths, options.every)
    return 0


def watch(paths: Sequence[Path], every: float) -> None:
    """Show the table anew every few seconds, until no job can go on by itself any more."""
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        while True:
            started = time.monotonic()
            found = find(paths, "status")
            lines = lines_of(found)
            text = table(found.title, lines, limit=_rows_of_screen(), width=_width(), colour=True)
            live.update(Text.from_ansi("\n".join(text), no_wrap=True, overflow="ellipsis"), refresh=True)
            if not any(line.state in OPEN for line in lines):
                return
            time.sleep(max(0.2, every - (time.monotonic() - started)))


def lines_of(found: Found) -> list[Line]:
    """Every job's line, in the order of the sweep."""
    metric = next((str(run.result["metric"]) for run in found.runs if run.result), None)
    now = time.time()
    names = short_names(o.partition("=")[0] for run in found.runs for o in run.job.overrides)
    return [_line(run, place, metric, now, names) for place, run in enumerate(found.runs)]


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted key; the whole where two would be the same."""
    unique = set(keys)
    last = Counter(key.rpartition(".")[2] for key in unique)
    return {key: short if last[short := key.rpartition(".")[2]] == 1 else key for key in unique}


def _line(run: Run, place: int, metric: str | None, now: float, names: Mapping[str, str]) -> Line:
    state, result = run.state, run.result
    value, name, epoch, seconds, eta = None, metric, None, run.duration, None
    if result is not None:
        name = str(result.get("metric"))
        value, epoch = number(result["best"].get(name)), number(result["best"].get("epoch"))
    elif run.directory.metrics_path.exists():
        row = last_row(run.directory.metrics_path) or {}
        epoch, seconds = number(row.get("epoch")), number(row.get("seconds"))
        name, value = _last_score(last_row(run.directory.metrics_path, "val/") or {}, metric)
        step = row.get("step") or 0
        if state.state == "running" and state.total_steps and seconds and step:
            eta = max(0.0, (state.total_steps - step) * seconds / step)
    beat = now - state.heartbeat if state.heartbeat and state.state in ("running", "interrupted", "preempted") else None
    return Line(
        run.job.index if run.job.overrides else place, _title(run, names), run.seed, state.state, state.step, state.total_steps, epoch, seconds,
        eta, name, value, beat, run.job.attempts, state.reason, str(run.directory),
    )  # fmt: skip


def _title(run: Run, names: Mapping[str, str]) -> str:
    """What the sweep varied; of a run by itself, its directory."""
    if not run.job.overrides:
        return os.path.join(*run.directory.path.absolute().parts[-2:])
    pairs = [o.partition("=") for o in run.job.overrides if not o.startswith("seed=")]
    return " ".join(f"{names[key]}={value}" for key, _, value in pairs)


def _last_score(row: dict[str, Any], metric: str | None) -> tuple[str | None, float | None]:
    """The metric of the sweep, else the first score of the run, else its loss."""
    if metric in row:
        return metric, number(row[metric])
    scores = [name for name in row if name.startswith("val/") and name not in ("val/loss", "val/seconds")] or ["val/loss"]
    return (scores[0], number(row.get(scores[0]))) if scores[0] in row else (metric, None)


def as_json(found: Found, lines: Sequence[Line]) -> dict[str, Any]:
    return {
        "title": found.title,
        "counts": counts(lines),
        "jobs": [{**asdict(line), "overrides": run.job.overrides, "job_id": run.job.job_id} for line, run in zip(lines, found.runs, strict=True)],
    }  # fmt: skip


def counts(lines: Sequence[Line]) -> dict[str, int]:
    """How many jobs are in each state, in the order of a job's life."""
    return {state: n for state in (*ORDER, "missing") if (n := sum(line.state == state for line in lines))}


# The table


def table(title: str, lines: Sequence[Line], *, limit: int | None, width: int, colour: bool) -> Iterator[str]:
    """The jobs, those that need a look first where not all fit."""
    paint = (lambda text, state: f"\x1b[{COLOURS[state]}m{text}\x1b[0m" if state in COLOURS else text) if colour else lambda text, _: text
    done = sum(line.state == "completed" for line in lines)
    counted = "  ".join(paint(f"{n} {state}", state) for state, n in counts(lines).items())
    left = [line.eta for line in lines if line.eta is not None] if not any(line.state == "queued" for line in lines) else []
    yield f"{title}   {_bar(done / max(1, len(lines)), 20)} {done}/{len(lines)}   {counted}" + (
        f"   {duration(max(left))} left" if left else ""
    )
    yield ""
    shown = list(lines)
    if limit is not None and len(shown) > limit:
        shown = sorted(sorted(lines, key=lambda line: _URGENCY.get(line.state, 0))[:limit], key=lambda line: line.index)
    names = {line.metric for line in shown if line.metric}
    metric = names.pop() if len(names) == 1 else None
    rows = [("#", "job", "seed", "state", "progress", "epoch", "time", "left", metric or "metric", "")]
    rows += [_cells(line, metric) for line in shown]
    widths = [max(len(row[i]) for row in rows) for i in range(9)]
    widths[1] = min(widths[1], max(24, width - sum(widths) + widths[1] - 40))
    for i, row in enumerate(rows):
        cells = [
            _cut(row[1], widths[1]).ljust(widths[1]) if n == 1 else c.rjust(w) if n in (0, 2, 5, 6, 7, 8) else c.ljust(w)
            for n, (c, w) in enumerate(zip(row, widths))
        ]
        if i:
            cells[3] = paint(cells[3], shown[i - 1].state)
        room = max(20, width - sum(widths) - 2 * 9)
        yield ("  ".join(cells) + "  " + (_cut(row[9], room) if limit is not None else row[9])).rstrip()
    if len(shown) < len(lines):
        yield f"… and {len(lines) - len(shown)} more; --once shows all"


def _cells(line: Line, metric: str | None) -> tuple[str, ...]:
    steps = (
        f"{_bar(line.step / line.total_steps)} {line.step}/{line.total_steps}"
        if line.total_steps
        else (str(line.step) if line.step else "")
    )
    value = show(line.metric or "", line.value) if line.value is not None else ""
    if value and line.metric != metric:
        value = f"{(line.metric or '').removeprefix('val/')} {value}"
    why = line.reason or ""
    if line.state == "interrupted" and line.heartbeat_age is not None:
        why = f"{why}, silent for {duration(line.heartbeat_age)}".lstrip(", ")
    return (
        str(line.index), line.settings, "" if line.seed is None else str(line.seed), line.state, steps,
        "" if line.epoch is None else f"{line.epoch:.4g}", "" if line.seconds is None else duration(line.seconds),
        "" if line.eta is None else duration(line.eta), value, why.splitlines()[0] if why else "",
    )  # fmt: skip


def _bar(part: float, width: int = BAR) -> str:
    full = round(min(1.0, max(0.0, part)) * width)
    return "━" * full + "╌" * (width - full)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _width() -> int:
    return shutil.get_terminal_size((150, 40)).columns


def _rows_of_screen() -> int:
    return max(5, shutil.get_terminal_size((150, 40)).lines - 5)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer status", description="How the jobs of a sweep are doing; live on a terminal.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="sweeps, run directories, or folders of runs")
    parser.add_argument("--once", action="store_true", help="print the table once and whole, and leave")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--every", type=float, default=REFRESH, metavar="SECONDS", help="between two looks (default: %(default)g)")
    return parser
