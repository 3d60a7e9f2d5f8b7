"""`python -m benchmarks [--quick] [--json FILE] [row ...]`: measure, print a table, fail where a target is missed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

from benchmarks import rows
from benchmarks.table import ROWS, Effort, Line

PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "accelerate", "lightning", "mosaicml", "webdataset", "pillow")


def main(arguments: list[str] | None = None) -> int:
    rows.load()
    chosen = _parse(arguments)
    report: dict[str, list[Line]] = {}
    for name in chosen.rows or ROWS:
        report[name] = measure(name, quick=chosen.quick)
    missed = [(name, line) for name, lines in report.items() for line in lines if line.passed is False]
    judged = sum(line.passed is not None for lines in report.values() for line in lines)
    print(f"\n{judged - len(missed)} of {judged} targets met")
    for name, line in missed:
        print(f"MISSED {name}: {line.what} against {line.against}, {_ratio(line)} {line.target} {line.note}")
    if chosen.json:
        Path(chosen.json).write_text(
            json.dumps({"machine": machine(), "rows": {n: [dataclasses.asdict(x) for x in r] for n, r in report.items()}}, indent=1)
        )
    return 1 if missed else 0


def measure(name: str, *, quick: bool) -> list[Line]:
    """Measure one row and print it. A row that misses is measured a second time, three times as long: the machine may
    have been busy. The second measurement counts, whatever it says."""
    title, function = ROWS[name]
    print(f"\n{name}: {title}", flush=True)
    started = time.perf_counter()
    lines = list(function(Effort(quick)))
    if any(line.passed is False and line.ratio for line in lines):
        missed = ", ".join(f"{line.what} {_ratio(line)}" for line in lines if line.passed is False)
        print(f"  missed at first ({missed}): measuring again, three times as long", flush=True)
        lines = list(function(Effort(quick, factor=3)))
    for line in lines:
        print("  " + _format(line))
    print(f"  ({time.perf_counter() - started:.0f} s, load {os.getloadavg()[0]:.1f})", flush=True)
    return lines


def machine() -> dict[str, object]:
    """What the figures depend on besides the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {"python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg(), "packages": versions}


def _format(line: Line) -> str:
    verdict = {True: "ok    ", False: "MISSED", None: "      "}[line.passed]
    figures = f"{line.ours:>12} / {line.theirs:<12}" if line.theirs else f"{line.ours:>12}   {'':<12}"
    return f"{verdict} {line.what:<34} {figures} {_ratio(line):<24} {line.target:<8} {line.against} {line.note}".rstrip()


def _ratio(line: Line) -> str:
    return f"{line.ratio.median:.3f} [{line.ratio.low:.2f}-{line.ratio.high:.2f}]" if line.ratio else ""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:<20} {title}" for name, (title, _) in ROWS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=f"rows:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="row", choices=[*ROWS, []], help="which rows; all without one")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller inputs")
    parser.add_argument("--json", metavar="FILE", help="write figures, versions and load here as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
