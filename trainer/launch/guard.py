"""What the user sees where a command goes wrong, and the exit code it ends with. Imports neither Hydra nor torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from trainer.errors import ConfigError, Interrupted, Stopped, TrainyardError

FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own switch: every traceback, whole


def guarded(action: Callable[[], int | None]) -> int:
    """The exit code of `action`. An error of ours is said in words; anything else is a fault and keeps its traceback."""
    try:
        return action() or 0
    except TrainyardError as error:
        if _wants_tracebacks():
            raise
        report(error)
        return error.exit_code
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return Interrupted.exit_code


def report(error: TrainyardError) -> None:
    """Say what went wrong, on stderr, once."""
    if getattr(error, "reported", False):
        return
    error.reported = True  # type: ignore[attr-defined]
    if isinstance(error, Stopped | Interrupted) and not speaks():
        return  # all ranks stop for one reason
    if not isinstance(error, ConfigError):
        print(f"\n{error}", file=sys.stderr)
        return
    count = len(error.problems)
    print(f"{count} problem{'s' if count > 1 else ''} with this configuration:", file=sys.stderr)
    for problem in error.problems:
        print("\n  " + str(problem).replace("\n", "\n  "), file=sys.stderr)


def speaks() -> bool:
    """Whether it is for this process to say what concerns all ranks: under torchrun every one of them composes and stops."""
    from trainer.surroundings import surroundings

    return surroundings().is_main


def _wants_tracebacks() -> bool:
    return os.environ.get(FULL_ERROR, "0") not in ("0", "")
