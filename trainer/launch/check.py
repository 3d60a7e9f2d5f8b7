"""`python -m trainer validate <overrides>`: is this run sound, and where would it lie?"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from trainer.launch.door import checked_run, override_arguments


def arguments() -> ArgumentParser:
    return override_arguments("validate", "Everything that is wrong with a run, without starting it.")


def main(argv: Sequence[str]) -> int:
    """Compose and check a run without starting it. Raises ConfigError with everything that is wrong."""
    from trainer.config import Resume
    from trainer.rundir import run_directory

    options = arguments().parse_intermixed_args(argv)
    run = checked_run(options.overrides, options.config_dir)
    run.resume = Resume.auto  # never and must look for, or make, directories
    print(f"sound: {run_directory(run)}")
    return 0
