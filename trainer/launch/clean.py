"""`python -m trainer clean DIR [--dry-run]`: the disk space of checkpoints that nobody needs once a run is done.

Of a finished run `best.pt`, `last.pt` and `model.safetensors` stay: it can be used, evaluated and extended. Runs that are not
done are left alone. Imports no torch.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.errors import ConfigError, Problem
from trainer.files import PARTIAL, storage_error
from trainer.rundir import RunDirectory

KEPT = ("best.pt", "last.pt")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer clean", description="Delete old checkpoints of runs that are done.")
    parser.add_argument("directory", type=Path, nargs="+", help="a run, a sweep, or a folder of runs")
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
    return parser


def main(argv: Sequence[str]) -> int:
    """Delete, or with --dry-run only say what would be deleted; print how much space that is."""
    options = arguments().parse_intermixed_args(argv)
    found = [run for directory in options.directory for run in runs_below(directory)]
    freed, gone, left = 0, 0, 0
    for run in found:
        if not run.is_finished() or run.live_writer() is not None:
            left += 1
            print(f"{run}: not finished, left alone")
            continue
        files = superfluous(run)
        freed += space_of(files)
        gone += sum(path.suffix == ".pt" for path in files)
        for path in files:
            if path.suffix == ".pt":
                print(f"{'would delete' if options.dry_run else 'deleted'} {path}")
            if not options.dry_run:
                _delete(path)
    what = "would be deleted" if options.dry_run else "deleted"
    print(f"{gone} checkpoints {what}, {freed / 1e6:,.1f} MB; {len(found) - left} finished runs, {left} others left alone")
    return 0


def runs_below(directory: Path) -> Iterator[RunDirectory]:
    """The run at `directory`, or every run below it.

    Raises:
        ConfigError: there is none.
    """
    if (directory / "config.yaml").is_file():
        yield RunDirectory(directory)
        return
    paths = sorted(path.parent for path in directory.rglob("config.yaml") if not path.is_symlink()) if directory.is_dir() else []
    if not paths:
        reason = "there is no run in it" if directory.is_dir() else "there is no such directory"
        raise ConfigError(Problem("directory", directory, reason, "name a run, a sweep, or a folder of runs"))
    yield from map(RunDirectory, paths)


def superfluous(run: RunDirectory) -> list[Path]:
    """Numbered and damaged checkpoints, what a killed writer left, and their sidecars."""
    files = sorted(run.checkpoints.glob("*.pt")) if run.checkpoints.is_dir() else []
    old = [path for path in files if path.name not in KEPT and not path.is_symlink()]
    rest = [*run.checkpoints.glob("*.damaged"), *run.checkpoints.glob(f".*{PARTIAL}")]
    sidecars = [path.with_name(f"{path.name}.sha256") for path in old]
    return [*old, *rest, *(path for path in sidecars if path.exists())]


def space_of(files: Sequence[Path]) -> int:
    """Bytes that deleting these frees: a checkpoint of several names is there until its last name goes."""
    stats = [path.stat() for path in files]
    names = Counter(s.st_ino for s in stats)
    return sum(s.st_size for s in {s.st_ino: s for s in stats}.values() if names[s.st_ino] >= s.st_nlink)


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(path, error) from error
