"""report.html: one page with everything in it, that opens from the disk without a server or a network.

It gathers the numbers; how they look and what can be done with them is in page.html, page.css and page.js beside this file.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from trainer.log.readable import is_rate
from trainer.sweep.arms import Metric, seed_of
from trainer.sweep.curves import Curves, read_curves
from trainer.sweep.found import Run, text_of
from trainer.sweep.statistics import Comparison
from trainer.sweep.tables import gaps, heading, remarks
from trainer.sweep.verdict import Row, Verdict

_HERE = Path(__file__).resolve().parent
_DIGITS = 6  # of a number in the page
PICTURES = 8  # of one run


def page(verdict: Verdict, home: Path) -> str:
    """The page; its links count from `home`."""
    parts = {name: (_HERE / f"page.{name}").read_text() for name in ("html", "css", "js")}
    content = json.dumps(contents(verdict, home), separators=(",", ":"), ensure_ascii=False)
    filled = {
        "TITLE": _escaped(verdict.title),
        "STYLE": parts["css"],
        "SCRIPT": parts["js"],
        "DATA": content.replace("<", "\\u003c"),  # no text in it can end the script
    }
    return re.sub(r"/\*([A-Z]+)\*/", lambda found: filled[found.group(1)], parts["html"])


def contents(verdict: Verdict, home: Path) -> dict[str, Any]:
    """What page.js draws."""
    metrics = [*verdict.metrics, *verdict.others]
    owned = [(number, run) for number, row in enumerate(verdict.rows) for run in row.arm.runs]
    curves = read_curves([run for _, run in owned])
    names = dict.fromkeys([m.name for m in metrics])
    names |= dict.fromkeys(name for found in curves for name in found.values)
    return {
        "title": verdict.title,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "at": verdict.at,
        "text": heading(verdict),
        "metrics": [{"name": m.name, "short": m.short, "rate": is_rate(m.name), "up": m.higher_is_better} for m in metrics],
        "chosen": len(verdict.metrics),
        "curves": [{"name": name, "rate": is_rate(name)} for name in names],
        "keys": list(dict.fromkeys(key for row in verdict.rows for key in row.arm.settings)),
        "arms": [_arm(row, metrics) for row in verdict.rows],
        "runs": [_run(run, number, found, home) for (number, run), found in zip(owned, curves, strict=True)],
        "pairs": [[i, j, *_comparison(c)] for (i, j), c in verdict.pairs.items()],
        "remarks": list(remarks(verdict)),
    }


def _arm(row: Row, metrics: Sequence[Metric]) -> dict[str, Any]:
    against = [row.against.get(m.name) for m in metrics]
    return {
        "label": row.arm.label,
        "settings": {key: value if isinstance(value, int | float) and not isinstance(value, bool) else text_of(value) for key, value in row.arm.settings.items()},
        "scores": [_short(asdict(row.summaries[m.name])) for m in metrics],
        "values": [{seed: _round(value) for seed, value in row.arm.scores.get(m.name, {}).items()} for m in metrics],
        "against": [None if c is None else [*_comparison(c), _round(row.adjusted.get(m.name))] for m, c in zip(metrics, against, strict=True)],
        "rank": _round(row.rank),
        "gain": _round(row.improvement),
        "best": row.is_best,
        "ties": row.ties,
        "reference": row.is_reference,
        "gaps": list(gaps(row.arm)),
    }  # fmt: skip


def _comparison(c: Comparison) -> list[Any]:
    return [c.n, _round(c.difference), _round(c.low), _round(c.high), _round(c.p), _round(c.effect)]


def _run(run: Run, arm: int, curves: Curves, home: Path) -> dict[str, Any]:
    link = link_to(run.directory.path, home)
    return {
        "arm": arm,
        "seed": seed_of(run),
        "state": run.state.state,
        "why": run.state.reason,
        "link": link,
        "seconds": run.duration,
        "pictures": [f"{link}/{quote(name)}" for name in pictures(run.directory.path)],
        "step": curves.steps,
        "epoch": [_round(epoch) for epoch in curves.epochs],
        "values": {name: [_round(value) for value in values] for name, values in curves.values.items()},
    }


def pictures(directory: Path) -> list[str]:
    """The last step's previews, and the plots, as paths in the run directory."""
    steps = sorted(name for name, is_folder in _listed(directory / "previews") if is_folder and name.startswith("step-"))
    folders = [f"previews/{steps[-1]}"] if steps else []
    found = [
        f"{folder}/{name}" for folder in [*folders, "plots"] for name, _ in sorted(_listed(directory / folder)) if name.endswith(".png")
    ]
    return found[:PICTURES]


def _listed(folder: Path) -> list[tuple[str, bool]]:
    """(name, is a folder); nothing where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return [(entry.name, entry.is_dir()) for entry in entries]
    except OSError:
        return []


def link_to(path: Path, home: Path) -> str:
    """A link from a page in `home`, that holds as long as both are moved together."""
    return quote(os.path.relpath(os.path.abspath(path), os.path.abspath(home)))


def _short(values: Mapping[str, Any]) -> list[Any]:
    return [_round(value) for value in values.values()]


def _round(value: float | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
