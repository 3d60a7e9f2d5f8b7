"""`python -m trainer report PATH ...`: the table over seeds of a sweep, or of any runs, in five formats, and a line for each run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.files import storage_error, write_atomically
from trainer.sweep.found import find
from trainer.sweep.page import page
from trainer.sweep.summary import write_summary
from trainer.sweep.tables import comma_separated, heading, json_text, lines_for_terminal, markdown, tex
from trainer.sweep.verdict import Verdict, judge


def main(argv: Sequence[str]) -> int:
    options = arguments().parse_intermixed_args(argv)
    found = find(options.paths)
    verdict = judge(found, options.metric, at=options.at, reference=options.reference, interval=options.interval)
    for line in [verdict.title, *heading(verdict), "", *lines_for_terminal(verdict), ""]:
        print(line)
    home = options.out or found.home
    for path in [*write(verdict, home), *write_summary(verdict, home)]:
        print(path)
    if options.wandb:
        from trainer.sweep.to_wandb import log_report

        print(log_report(found, verdict, home, project=options.wandb))
    return 0


def write(verdict: Verdict, home: Path) -> list[Path]:
    """The five files; their paths."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(home, error) from error
    contents = {
        "md": markdown(verdict), "csv": comma_separated(verdict), "tex": tex(verdict), "json": json_text(verdict),
        "html": page(verdict, home),
    }  # fmt: skip
    paths = [home / f"report.{kind}" for kind in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_atomically(path, content, durable=False)
    return paths


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer report",
        description="Means over seeds with intervals, paired comparisons, and which seeds are missing: report.{md,csv,tex,json,html}; "
        "and what became of each run: final_summary.{json,csv,md}.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="sweeps, run directories, or folders of runs")
    parser.add_argument(
        "--metric", action="append", default=[], help="which metric decides; may be given several times, ranks are then means over them"
    )
    parser.add_argument("--at", choices=("best", "last"), default="best", help="the scores of the best validation, or of the last")
    parser.add_argument("--reference", metavar="ARM", help="the arm to compare with: its number, or words like lr=0.1; the first without")
    parser.add_argument("--interval", choices=("t", "bootstrap"), default="t", help="of the mean: Student's t, or BCa bootstrap")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: the sweep's directory)")
    parser.add_argument("--wandb", metavar="PROJECT", help="log the table to this W&B project, too")
    return parser
