"""Writing files so that a reader never sees half of one, and so that a crash leaves the old content or the new.

Knows bytes and directories; knows nothing of runs or checkpoints. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import StorageError

PARTIAL = ".partial"  # suffix of a file that is still being written; whoever owns the directory may delete those it finds
_CHUNK = 1 << 22  # bytes: large enough that reading, not Python, sets the speed
_counter = itertools.count()


def write_atomically(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Replace the content of `path` in one step.

    With `durable`, it also survives a power cut from the moment this returns; heartbeats do without.
    """
    path = Path(path)
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise storage_error(path, error) from error


def json_by_lines(head: Mapping[str, Any], name: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a JSON object: a line for each entry of `head`, then the list `name` with a line for each row. As readable as
    indented, and several times as fast, as Python's encoder in C does not indent."""

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    lines = [f" {text(key)}: {text(value)}," for key, value in head.items()]
    listed = ",\n".join(f"  {text(row)}" for row in rows)
    return "\n".join(["{", *lines, f" {text(name)}: [", *([listed] if listed else []), " ]", "}"]) + "\n"


def partial_path(path: Path) -> Path:
    """A name beside `path` that no other writer uses, on this host or another that mounts the same directory."""
    return path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}-{next(_counter)}{PARTIAL}")


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power cut: renames live in the directory, not in the file."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems have no fsync of a directory
            raise
    finally:
        os.close(handle)


def sha256_of(path: Path, *, from_disk: bool = False) -> str:
    """The hash of a file's content, in hex. `from_disk` asks the kernel to forget its cached copy first."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    with open(path, "rb", buffering=0) as file:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def storage_error(path: Path, error: OSError) -> StorageError:
    """What went wrong with writing `path`, with the way out."""
    ways_out = {
        errno.ENOSPC: f"the disk is full ({_free(path)}): free some space, or set runs_dir= to another disk",
        errno.EDQUOT: "the disk quota is used up: free some space, or set runs_dir= to another disk",
        errno.EFBIG: "the file would be larger than allowed here (see `ulimit -f`)",
        errno.EROFS: "the disk is mounted read-only: set runs_dir= to a place you can write to",
        errno.EACCES: "no permission: set runs_dir= to a place you can write to",
        errno.EPERM: "not permitted: set runs_dir= to a place you can write to",
        errno.ENOTDIR: "a file stands where a directory should be: set runs_dir= to a directory",
    }
    why = ways_out.get(error.errno or 0, error.strerror or str(error))
    return StorageError(f"cannot write {path}: {why}")


def _free(path: Path) -> str:
    parent = next((p for p in path.parents if p.is_dir()), Path("/"))
    try:
        return f"{shutil.disk_usage(parent).free / 1e6:.1f} MB free in {parent}"
    except OSError:
        return f"in {parent}"
