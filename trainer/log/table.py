"""What a run prints at its two ends: the facts it starts from, and the table of what it reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.log.display import whole
from trainer.log.readable import duration, show


def show_facts(facts: Mapping[str, str]) -> None:
    """One aligned line a fact: `show_facts({"run": "runs/…", "data": "1,437 training images …"})`."""
    width = max(map(len, facts), default=0)
    for name, text in facts.items():
        print(f"{name:{width}}  {text}")
    print(flush=True)


def show_result(result: Mapping[str, Any], run_dir: Path) -> None:
    """Print what a finished run reached, at its best validation and at the last, and where it lies.

    `result` is the content of result.json. The metric that decided which validation was the best stands first.
    """
    best, last = result["best"], result["last"]
    main = result.get("metric", "")
    names = [name for name in dict.fromkeys([main, *last, *best]) if name.startswith("val/") and name != "val/seconds"]
    if any(name in last or name in best for name in names):
        table(names, best, last)
    speed = [f"{result['parameters']:,} parameters"] if "parameters" in result else []
    speed += [f"{duration(result['seconds'])}", f"{result['images_per_second']:,.0f} images/s"] if "seconds" in result else []
    print(f"{', '.join(speed)}\n{run_dir}", flush=True)


def table(names: list[str], best: Mapping[str, Any], last: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    drawn.add_column("metric")
    drawn.add_column(f"best ({_when(best)})", justify="right")
    drawn.add_column(f"last ({_when(last)})", justify="right")
    for i, name in enumerate(names):
        drawn.add_row(name.removeprefix("val/"), show(name, best.get(name)), show(name, last.get(name)), style="bold" if i == 0 else None)
    Console(highlight=False).print(drawn)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table on the terminal, with the columns of its first row."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i, name in enumerate(rows[0]):
        drawn.add_column(str(name).replace("_", " "), justify="right" if i else "left")
    for row in rows:
        drawn.add_row(*("" if row.get(name) is None else str(row[name]) for name in rows[0]))
    Console(highlight=False, markup=False).print(drawn)


def _when(row: Mapping[str, Any]) -> str:
    return f"epoch {whole(row['epoch'])}" if "epoch" in row else f"step {row.get('step', '?')}"
