"""`python -m trainer sync [PATH ...]`: upload what W&B could not be told while the runs went, of many runs at once.

wandb's own `sync` does the uploading; this knows which of the files in run directories it has not had yet.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.errors import ConfigError, Problem
from trainer.log.wandb_sink import SENT, UNSENT, has_key
from trainer.sweep.found import find

AT_ONCE = 8  # runs uploaded side by side; the starts of one run follow one another


def main(argv: Sequence[str]) -> int:
    options = arguments().parse_intermixed_args(argv)
    directories = _directories(options.paths)
    waiting = [(directory, list(unsent(directory, every=options.all))) for directory in directories]
    waiting = [(directory, starts) for directory, starts in waiting if starts]
    if not waiting:
        print("W&B has had everything")
        return 0
    for directory, starts in waiting:
        print(f"{directory}: {len(starts)} start{'s' if len(starts) > 1 else ''}")
    if options.dry_run:
        return 0
    if not has_key():
        raise ConfigError(Problem("W&B", "no key", "there are no credentials for the server", "wandb login, or WANDB_API_KEY=..."))
    code = upload([start for _, starts in waiting for start in starts])
    for directory, starts in waiting:
        if all(_is_sent(start) for start in starts):
            (directory / UNSENT).unlink(missing_ok=True)
    return code


def _directories(paths: Sequence[Path]) -> list[Path]:
    """Those that may hold W&B's files: the runs, and the sweeps themselves, whose report may have been logged."""
    found = [find([path], "sync") for path in paths]
    sweeps = [one.sweep.path for one in found if one.sweep]
    return [*dict.fromkeys([*(run.directory.path for one in found for run in one.runs), *sweeps])]


def unsent(directory: Path, *, every: bool) -> Iterator[Path]:
    """The files of starts that the server lacks: those made offline, and those of an online start that it did not take whole."""
    online = every or (directory / UNSENT).exists()
    sent = set((directory / SENT).read_text().split()) if (directory / SENT).is_file() and not every else set()
    for start in sorted((directory / "wandb").glob("*run-*")):
        if start.is_dir() and not _is_sent(start) and start.name not in sent and (online or start.name.startswith("offline-")):
            yield start


def _is_sent(start: Path) -> bool:
    """wandb marks what it has uploaded."""
    return any(start.glob("*.wandb.synced"))


def upload(starts: Sequence[Path]) -> int:
    """Have wandb upload these, all in one command, so that it joins the starts of each run in their order."""
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", "-n", str(AT_ONCE), *map(str, starts)]
    done = subprocess.run(command, env=os.environ | {"WANDB_ERROR_REPORTING": "false"})
    missed = [start for start in starts if not _is_sent(start)]
    if missed:
        print(f"{len(missed)} of {len(starts)} could not be uploaded; the same command tries them again", file=sys.stderr)
    return 1 if missed or done.returncode else 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer sync", description="Upload to W&B what it has not had yet.")
    parser.add_argument(
        "paths", nargs="*", type=Path, default=[Path("runs")], metavar="PATH", help="runs, sweeps, or folders (default: runs)"
    )
    parser.add_argument("--all", action="store_true", help="also the files of online starts that ended well, or were killed")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded")
    return parser
