"""`python -m trainer describe-data <overrides>`: what is in a run's dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.launch.door import checked_run


def main(argv: Sequence[str]) -> int:
    """Compose a run, look through its data, print and plot. `--limit N` reads N images of each split, `--out DIR` draws there."""
    import argparse

    from trainer.data.describe import describe

    parser = argparse.ArgumentParser(
        prog="python -m trainer describe-data", description="Counts per class, sizes, colours, duplicates and bad files of a dataset."
    )
    parser.add_argument("--limit", type=int, help="images of each split to read, evenly spread (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/describe-data"), help="folder of the drawing (default: outputs/describe-data)"
    )
    options, overrides = parser.parse_known_args(argv)
    describe(checked_run(overrides).dataset, options.out, options.limit)
    return 0
