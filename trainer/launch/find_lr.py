"""`python -m trainer find-lr <overrides>`: a sweep of the learning rate for a run, without starting it.

Under torchrun it sweeps with the ranks it finds; otherwise it starts those that the run would have on this host. The picture and
the table go to `--out`; no run directory is made.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from trainer.launch.door import checked_run, override_arguments
from trainer.surroundings import ranks_to_start


def arguments() -> ArgumentParser:
    parser = override_arguments("find-lr", "Loss over exponentially rising learning rates.")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the curve (default: outputs)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print suggestions and write lr_finder.csv, .json and .png."""
    options = arguments().parse_intermixed_args(argv)
    run = checked_run(options.overrides, options.config_dir)
    count = ranks_to_start(run.distributed)
    if count > 1:
        from trainer.launch.local import start_local_ranks

        options.out.mkdir(parents=True, exist_ok=True)  # where ranks other than the first write their logs
        return start_local_ranks(options.out, count, 0, command=[sys.executable, "-m", "trainer", "find-lr", *argv])
    from trainer.run import find_lr

    find_lr(run, options.out)
    return 0
