"""The report as a table in W&B: one run of the job type `report`, in the group of the sweep, the same one each time.

Imports wandb when called.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from trainer.log.wandb_sink import has_key
from trainer.sweep.found import Found
from trainer.sweep.tables import gaps
from trainer.sweep.verdict import Verdict

TIMEOUT = 20.0  # seconds for the server at the start, and again at the end


def log_report(found: Found, verdict: Verdict, home: Path, project: str) -> str:
    """Log the table of `verdict`; where it can be seen, in words. Offline without a key, or where WANDB_MODE says so."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    settings = wandb.Settings(console="off", silent=True, init_timeout=TIMEOUT, finish_timeout=TIMEOUT, finish_timeout_raises=True)
    run = wandb.init(
        project=project, group=found.sweep.sweep if found.sweep else None, job_type="report", name=f"report {verdict.title}",
        id=hashlib.sha256(f"{verdict.title} {home.resolve()}".encode()).hexdigest()[:12], resume="allow", dir=str(home),
        mode=None if has_key() else "offline", settings=settings,
        config={"at": verdict.at, "interval": verdict.interval, "metrics": [metric.name for metric in verdict.metrics]},
    )  # fmt: skip
    columns, rows = table(verdict)
    Table: Any = wandb.Table  # its annotations ask for lists of unions
    run.log({"report": Table(columns=columns, data=rows)})
    if best := verdict.best or verdict.reference:
        told = best.summaries[verdict.main.name]
        run.summary.update(
            {"best/arm": best.arm.label, f"best/{verdict.main.short}": told.mean, f"best/{verdict.main.short}_std": told.std}
        )
    where, offline = run.url, run.offline
    run.finish()
    return f"W&B, offline: python -m trainer sync {home}" if offline else f"W&B: {where}"


def table(verdict: Verdict) -> tuple[list[str], list[list[Any]]]:
    """One row an arm, the best first; numbers as numbers, so that W&B can sort and plot them."""
    keys = list(dict.fromkeys(key for row in verdict.rows for key in row.arm.settings))
    metrics = [*verdict.metrics, *verdict.others]
    columns = ["arm", *keys, "n", *(f"{m.name} {part}" for m in metrics for part in ("mean", "std", "low", "high"))]
    columns += ["rank", "difference", "p", "improvement", "best", "missing"]
    rows = []
    for row in verdict.ordered:
        against = row.against.get(verdict.main.name)
        values = [row.arm.settings.get(key) for key in keys]
        cells: list[Any] = [row.arm.label, *(v if v is None or isinstance(v, int | float | str) else str(v) for v in values)]
        cells.append(row.summaries[verdict.main.name].n)
        cells += [value for m in metrics for s in [row.summaries[m.name]] for value in (s.mean, s.std, s.low, s.high)]
        cells += [row.rank, against.difference if against else None, row.adjusted.get(verdict.main.name), row.improvement]
        rows.append([*cells, row.is_best, "; ".join(gaps(row.arm))])
    # A column of a table has one type: where values of different kinds were swept, all are shown as text.
    for place in range(1, 1 + len(keys)):
        if len({type(cells[place]) for cells in rows} - {type(None)}) > 1:
            for cells in rows:
                cells[place] = None if cells[place] is None else str(cells[place])
    return columns, rows
