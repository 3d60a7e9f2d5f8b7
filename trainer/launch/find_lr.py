"""`python -m trainer find-lr <overrides>`: a sweep of the learning rate for a run, without starting it.

Under torchrun it sweeps with the ranks it finds. The picture and the table go to `--out`; no run directory is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError, Problem
from trainer.launch.door import checked_run


def main(argv: Sequence[str]) -> int:
    """Print suggestions and write lr_finder.csv, .json and .png."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m trainer find-lr", description="Loss over exponentially rising learning rates.")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the curve (default: outputs)")
    options, overrides = parser.parse_known_args(argv)
    run = checked_run(overrides)
    from trainer.surroundings import ranks_to_start

    if (count := ranks_to_start(run.distributed)) > 1:
        fix = f"torchrun --nproc-per-node={count} -m trainer find-lr …, or distributed.processes=1"
        raise ConfigError(Problem("distributed.processes", run.distributed.processes, f"would be {count} ranks, and this starts none", fix))
    from trainer.run import find_lr

    find_lr(run, options.out)
    return 0
