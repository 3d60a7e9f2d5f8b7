"""A folder of classes divided into train/ and val/, class by class, by link or by copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer.data.formats.image_folder import scan_folder
from trainer.data.source import split_rows
from trainer.errors import ConfigError, Problem, StorageError


def link(source: str, target: str) -> None:
    """A hard link where both lie on one file system, else a symbolic one: neither takes room."""
    try:
        os.link(source, target)
    except OSError:
        os.symlink(source, target)


HOW: dict[str, Callable[[str, str], object]] = {"link": link, "symlink": os.symlink, "copy": shutil.copy2}


def split_folder(
    folder: Path,
    out: Path,
    fraction: float,
    seed: int,
    how: str,
    extensions: tuple[str, ...],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Put every image of <folder>/<class>/ into <out>/train/<class>/ or <out>/val/<class>/. Returns how many went where.

    The same images validate as with dataset.val_fraction and dataset.split_seed. Called again after it broke off, it goes on.

    Raises:
        ConfigError: the folder is not one of classes, or `out` holds other files.
        StorageError: `out` cannot be written.
    """
    if not folder.is_dir():
        raise ConfigError(Problem("DIR", str(folder), "no such directory"))
    table = scan_folder(folder, extensions)
    if not len(table):
        raise ConfigError(
            Problem("DIR", str(folder), "holds no image in class folders", "DIR is the folder that holds one folder for each class")
        )
    paths = table["path"].all()
    train, val = split_rows(np.asarray(table["label"]), fraction, seed, paths)
    wanted = {os.fsencode(part) + b"/" + paths[row] for part, rows in (("train", train), ("val", val)) for row in rows}
    _refuse_strangers(out, wanted)
    try:
        for number, target in enumerate(sorted(wanted)):
            if progress is not None:
                progress(number, len(wanted))
            source, there = os.fsencode(folder.resolve()) + b"/" + target.split(b"/", 1)[1], os.fsencode(out) + b"/" + target
            if not os.path.lexists(there):
                os.makedirs(os.path.dirname(there), exist_ok=True)
                _place(os.fsdecode(source), os.fsdecode(there), how)
    except OSError as error:
        raise StorageError(f"{error.filename or out}: {error.strerror or error}") from None
    return len(train), len(val)


def _place(source: str, target: str, how: str) -> None:
    """Under another name first, so that a copy that breaks off is not taken for a whole one."""
    part = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.part")
    if os.path.lexists(part):
        os.unlink(part)
    HOW[how](os.path.realpath(source), part)
    os.replace(part, target)


def _refuse_strangers(out: Path, wanted: set[bytes]) -> None:
    """Files of an earlier, different division would mix with this one."""
    for part in ("train", "val"):
        for directory, below, files in os.walk(os.fsencode(out / part)):
            below[:] = [name for name in below if not name.startswith(b".")]
            for name in files:
                relative = os.path.relpath(os.path.join(directory, name), os.fsencode(out))
                if not name.startswith(b".") and relative not in wanted:
                    raise ConfigError(
                        Problem(
                            "--out",
                            str(out),
                            f"already holds {os.fsdecode(relative)}, which this division does not put there",
                            "an empty folder, or the --val and --seed it was divided with",
                        )
                    )
