"""What became of each run, one line a run: `final_summary.{json,csv,md}` beside the report, which speaks of arms and means.

It is what one asks after training one network after another: did it succeed, when was it best, how long did it take, how large is it.
"""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.files import json_by_lines, write_atomically
from trainer.log.readable import duration, show
from trainer.sweep.found import Run, number
from trainer.sweep.verdict import Verdict

WEIGHTS = "checkpoints/model.safetensors"
PER_IMAGE = "val/seconds_per_image"
MEGABYTE = 1e6


def write_summary(verdict: Verdict, home: Path) -> list[Path]:
    """The three files; their paths."""
    rows = [row_of(run, row.arm.label) for row in verdict.rows for run in row.arm.runs]
    rank(rows, verdict.main.name, higher_is_better=verdict.main.higher_is_better)
    contents = {"json": as_json(verdict, rows), "csv": as_csv(rows), "md": as_markdown(verdict, rows)}
    paths = [home / f"final_summary.{kind}" for kind in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_atomically(path, content, durable=False)
    return paths


def row_of(run: Run, label: str) -> dict[str, Any]:
    """One run. Times are in seconds, scores those of its best validation; what is not known is None."""
    result = run.result or {}
    best, epochs = result.get("best") or {}, list(epochs_of(run.directory.path / "epochs.csv"))
    losses, times = [e["loss"] for e in epochs], [e["seconds"] for e in epochs]
    known = [loss for loss in losses if loss is not None]
    weights = run.directory.path / WEIGHTS
    per_image = number(best.get(PER_IMAGE))
    return {
        "run": label, "seed": run.seed, "succeeded": run.state.state == "completed", "state": run.state.state, "reason": run.state.reason,
        "rank": None, "best_epoch": best.get("epoch"), "epochs": epochs[-1]["epoch"] if epochs else None,
        "best_train_loss": min(known, default=None), "final_train_loss": known[-1] if known else None,
        **{name: number(value) for name, value in best.items() if name.startswith("val/") and "seconds" not in name},
        "seconds": run.duration, "seconds_per_epoch": _mean(times), "parameters": result.get("parameters"),
        "megabytes": round(weights.stat().st_size / MEGABYTE, 3) if weights.exists() else None,
        "milliseconds_per_image": None if per_image is None else 1000 * per_image,
        "images_per_second": 1 / per_image if per_image else None,
        "directory": str(run.directory.path), "epoch_losses": losses, "epoch_seconds": times,
    }  # fmt: skip


def epochs_of(path: Path) -> Iterator[dict[str, float | None]]:
    """Epoch, mean loss and seconds of each row of an epochs.csv; nothing where there is none."""
    try:
        head, *rows = csv.reader(path.read_text().splitlines())
    except (OSError, ValueError):
        return
    places = [head.index(name) if name in head else len(head) for name in ("epoch", "train/loss", "seconds", "epoch_seconds")]
    before = 0.0
    for row in rows:
        epoch, loss, seconds, taken = (_float(row[place]) if place < len(row) else None for place in places)
        yield {"epoch": epoch, "loss": loss, "seconds": taken if taken is not None or seconds is None else round(seconds - before, 3)}
        before = seconds or before


def rank(rows: Sequence[dict[str, Any]], metric: str, *, higher_is_better: bool) -> None:
    """Number the runs by the metric, the best first; runs of one score share a place."""
    values = [row[metric] for row in rows if row.get(metric) is not None]
    for row in rows:
        if row.get(metric) is not None:
            row["rank"] = 1 + sum(v > row[metric] if higher_is_better else v < row[metric] for v in values)


def as_json(verdict: Verdict, rows: Sequence[dict[str, Any]]) -> str:
    times = [row["seconds"] for row in rows if row["seconds"] is not None]
    content = {
        "title": verdict.title, "metric": verdict.main.name, "mode": "max" if verdict.main.higher_is_better else "min",
        "total": len(rows), "states": Counter(row["state"] for row in rows), "succeeded": sum(row["succeeded"] for row in rows),
        "failed": sum(row["state"] == "failed" for row in rows), "total_seconds": round(sum(times), 3),
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip
    return json_by_lines(content, "runs", rows)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    lists = ("epoch_losses", "epoch_seconds")
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in lists]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_markdown(verdict: Verdict, rows: Sequence[dict[str, Any]]) -> str:
    """The runs in the order of their ranks, then those that have none, with the reason."""
    scores = [m.name for m in [*verdict.metrics, *verdict.others] if m.name.count("/") == 1]
    head = ["run", "seed", "state", "rank", "best epoch", *scores, "train loss", "time", "parameters", "file", "per image"]
    lines = [f"# {verdict.title}: what became of each run", "", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in sorted(rows, key=lambda row: (row["rank"] is None, row["rank"] or 0)):
        cells = [
            row["run"].replace("|", "\\|"), _cell(row["seed"]), row["state"], _cell(row["rank"]), _cell(row["best_epoch"]),
            *(show(name, row.get(name)) for name in scores), show("loss", row["final_train_loss"]),
            "-" if row["seconds"] is None else duration(row["seconds"]),
            "-" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f} M",
            "-" if row["megabytes"] is None else f"{row['megabytes']:.1f} MB",
            "-" if not row["images_per_second"] else f"{row['milliseconds_per_image']:.1f} ms ({row['images_per_second']:.1f} a second)",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"- {row['run']}, seed {row['seed']}: {row['reason']}" for row in rows if row["reason"] and not row["succeeded"]]
    done = sum(row["succeeded"] for row in rows)
    lines += ["", f"{done} of {len(rows)} runs succeeded.", *(["", *failed] if failed else [])]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _float(text: str | None) -> float | None:
    try:
        return number(float(text)) if text else None
    except ValueError:
        return None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 3) if known else None
