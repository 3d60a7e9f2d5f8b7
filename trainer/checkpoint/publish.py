"""How a finished file gets its names: in one step each, with a `.sha256` beside it that fits at every moment.

A name and its sidecar cannot change in one step, so the sidecar lists the old and the new hash while the name moves from one
file to the other. What was `last.pt` becomes `previous.pt`: the way back if the disk loses what it has acknowledged. Several
names of one checkpoint are hard links and cost the space of one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from trainer.checkpoint.faults import strike
from trainer.files import partial_path, sha256_of, storage_error, sync_directory, write_atomically

PREVIOUS = "previous"
DAMAGED = ".damaged"  # suffix of a checkpoint that could not be used: kept for the user, never read again


def publish(partial: Path, digest: str, directory: Path, names: list[str]) -> None:
    """Give a finished file its names, each with a sidecar. `partial` stays, for the caller to delete."""
    for name in names:
        if name == "last.pt" and (directory / name).exists():
            strike("previous")
            _place(directory / name, listed(directory / name) or [sha256_of(directory / name)], directory / f"{PREVIOUS}.pt")
        _place(partial, [digest], directory / name)


def _place(source: Path, digests: list[str], target: Path) -> None:
    """Make `target` another name of `source`, in one step, never without a sidecar that fits."""
    link = partial_path(target)
    try:
        try:
            os.link(source, link)
        except OSError:  # no hard links here: a copy does it, at the price of the space
            shutil.copyfile(source, link)
            with open(link, "rb+") as file:
                os.fsync(file.fileno())
        _write_sidecar(target, [*digests, *(listed(target) if target.exists() else [])])
        strike("sidecar")
        os.replace(link, target)
        sync_directory(target.parent)
        strike("rename")
        _write_sidecar(target, digests)
    finally:
        with contextlib.suppress(OSError):
            link.unlink()


def sidecar_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _write_sidecar(path: Path, digests: list[str]) -> None:
    """In the format of `sha256sum`, which checks it with `-c`."""
    write_atomically(sidecar_path(path), "".join(f"{digest}  {path.name}\n" for digest in dict.fromkeys(digests)))


def listed(path: Path) -> list[str]:
    """The hashes that `path` may have: one, or two if a writer was killed between renaming it and saying so."""
    try:
        lines = sidecar_path(path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line.split()[0] for line in lines if line.split()]


def set_aside(path: Path) -> None:
    """Take the name from a file that cannot be used, if it is there: else it would become `previous.pt`, in the place of a good one."""
    try:
        for file in (path, sidecar_path(path)):
            if os.path.lexists(file):
                os.replace(file, file.with_name(f"{file.name}{DAMAGED}"))
        sync_directory(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error


def delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    sidecar_path(path).unlink(missing_ok=True)
