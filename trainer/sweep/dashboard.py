"""`python -m trainer dashboard SWEEP`: a saved report in W&B, of the sweep's runs: curves with bands over seeds, parallel coordinates,
the table. Through W&B's own report API, where that is installed; the runs must have been logged to W&B.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, DistributedError, Problem
from trainer.files import write_atomically
from trainer.log.wandb_sink import STEP, has_key
from trainer.sweep.found import Found, find
from trainer.sweep.tables import markdown
from trainer.sweep.verdict import Verdict, judge

KEPT = "dashboard.json"  # in the sweep's directory: the same dashboard is brought up to date, not made once more
CURVES = ("train/loss",)  # besides every metric


def main(argv: Sequence[str]) -> int:
    options = arguments().parse_intermixed_args(argv)
    found = find([options.sweep], "dashboard")
    if found.sweep is None:
        raise ConfigError(
            Problem("dashboard", options.sweep, "is no sweep: its runs are no group in W&B", "name a folder like runs/<name>/sweeps/<id>")
        )
    try:
        api = import_module("wandb_workspaces.reports.v2")
    except ImportError:
        raise ConfigError(
            Problem("dashboard", "wandb_workspaces", "W&B's report API is not installed", 'pip install "trainyard[views]"')
        ) from None
    if not has_key():
        raise ConfigError(Problem("W&B", "no key", "there are no credentials for the server", "wandb login, or WANDB_API_KEY=..."))
    project = options.project or project_of(found)
    try:
        print(save(api, found, judge(found), project, options.entity))
    except ConfigError:
        raise
    except Exception as error:  # of W&B's client, which raises whatever its transport does
        raise DistributedError(f"W&B did not take the dashboard: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    return 0


def project_of(found: Found) -> str:
    """The project that the runs were logged to."""
    from trainer.sweep.configs import read_plain

    for run in found.runs:
        try:
            return str(read_plain(run.directory.config_path)["logger"]["wandb"]["project"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return "trainyard"


def save(api: Any, found: Found, verdict: Verdict, project: str, entity: str | None) -> str:
    """Make the dashboard, or bring the one that was made before up to date. Its address."""
    assert found.sweep is not None
    where = {"entity": entity} if entity else {}
    report = api.Report(project=project, title=f"Sweep {verdict.title}"[:128], width="fluid", description=" ".join(found.sweep.argv)[:500],
                        blocks=[api.MarkdownBlock(text=markdown(verdict)), grid(api, found, verdict, project, where)], **where)  # fmt: skip
    kept = found.sweep.path / KEPT
    try:
        before = json.loads(kept.read_text())
        if (before["project"], before["entity"]) == (project, report.entity):
            report.id = str(before["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the first time
    report.save()
    write_atomically(kept, json.dumps({"id": report.id, "project": project, "entity": report.entity, "url": report.url}, indent=1) + "\n")
    return report.url


def grid(api: Any, found: Found, verdict: Verdict, project: str, where: dict[str, str]) -> Any:
    """The live part: W&B fills it from the runs themselves, also from those that still go."""
    expr = import_module("wandb_workspaces.expr")
    assert found.sweep is not None
    keys = [config_key(key, found) for key in dict.fromkeys(key for row in verdict.rows for key in row.arm.settings)]
    group = found.sweep.sweep
    metrics = [*verdict.metrics, *verdict.others]
    runs = api.Runset(
        project=project, name="runs, by arm", groupby=[f"config.{key}" for key in keys],
        filters=[expr.Metric("Group") == group, expr.Metric("JobType") != "report"], **where,
    )  # fmt: skip
    panels = [
        api.LinePlot(title=name, x=STEP, y=[name], groupby_aggfunc="mean", groupby_rangefunc="stddev", aggregate=True)
        for name in [*(metric.name for metric in metrics), *CURVES]
    ]
    axes = [api.ParallelCoordinatesPlotColumn(api.Config(key)) for key in keys]
    axes += [api.ParallelCoordinatesPlotColumn(api.SummaryMetric(f"best/{metric.short}")) for metric in metrics]
    panels += [
        api.ParallelCoordinatesPlot(title="parallel coordinates", columns=axes, layout=api.Layout(w=24, h=9)),
        api.RunComparer(diff_only="split"),
    ]
    return api.PanelGrid(runsets=[runs], panels=panels)


def config_key(key: str, found: Found) -> str:
    """Where W&B has what the sweep calls `key`: a choice of a group is a whole part of the config, told by its name or its class."""
    config = next((run.config for run in found.runs if run.config), {})
    return key if "." in key or key not in config else f"{key}.name" if f"{key}.name" in config else f"{key}._schema_"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer dashboard", description="A saved report in W&B, of a sweep's runs.")
    parser.add_argument("sweep", type=Path, metavar="SWEEP")
    parser.add_argument("--project", help="default: the one the runs were logged to")
    parser.add_argument("--entity", help="user or team; default: that of your key")
    return parser
