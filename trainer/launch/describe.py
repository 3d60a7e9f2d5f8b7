"""`python -m trainer describe-data <overrides>`: what is in a run's dataset."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from trainer.launch.door import checked_run, override_arguments


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
    describe(checked_run(options.overrides, options.config_dir).dataset, options.out, options.limit)
    return 0
