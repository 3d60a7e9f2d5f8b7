"""`python -m trainer describe-data <overrides>`: what is in a run's dataset, whether a run could train on it or not."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from trainer.config import DatasetConfig
from trainer.errors import ConfigError
from trainer.launch import diagnose
from trainer.launch.compose import checked, compose
from trainer.launch.door import override_arguments


def arguments() -> ArgumentParser:
    parser = override_arguments("describe-data", "Counts per class, sizes, colours, duplicates and bad files of a dataset.")
    parser.add_argument("--limit", type=int, help="images of each split to read, evenly spread (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/describe-data"), help="folder of the drawing (default: outputs/describe-data)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Compose a run, look through its data, print and plot. `--limit N` reads N images of each split, `--out DIR` draws there."""
    from trainer.data.describe import describe

    options = arguments().parse_intermixed_args(argv)
    describe(looked_at(options.overrides, options.config_dir), options.out, options.limit)
    return 0


def looked_at(overrides: Sequence[str], config_dir: str | None = None) -> DatasetConfig:
    """The dataset of a command line; of one that lacks a split, or has a bad one, the other alone, with a warning.

    Raises:
        ConfigError: there is nothing to look at.
    """
    from trainer.validation import problems_of_data

    composed = compose(overrides, config_dir)
    run, problems = checked(composed, lambda run: ())
    if run is None or problems:
        raise ConfigError(*problems)
    found = [diagnose.with_fix(p, composed.before) for p in problems_of_data(run.dataset)]
    if not found:
        return run.dataset
    for one in map(run.dataset.alone, run.dataset.splits):
        if not any(problems_of_data(one)):
            print(f"warning: only the {one.splits[0]} split can be looked at:", *found, sep="\n", file=sys.stderr)
            return one
    raise ConfigError(*found)
