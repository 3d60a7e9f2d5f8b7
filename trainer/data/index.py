"""An index of a dataset is scanned once, kept in a file and trusted until what it was scanned from changes.

It lies in `.trainyard/` with the data, or, where nothing may be written there, under $XDG_CACHE_HOME/trainyard; where
neither works it is scanned anew each time. Scanning is the format's business; this file knows only when to do it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.table import Column, Strings, Table, read_table_and_note

logger = logging.getLogger(__name__)

FOLDER = ".trainyard"
VERSION = 2  # raise it when what a scan writes changes its meaning
# A file system's clock ticks in up to 2 s (FAT), so a change this soon after a scan may leave the same time behind.
SETTLED = 2_000_000_000  # ns
ALL_FILES = "*"  # in a watched path: the newest time and the total size of a directory's files


class Watch:
    """What a scan looked at: when one of these changes, the index is scanned again.

    A directory's time changes with every file that comes, goes or is renamed; a file's with every write. A file that is
    overwritten in place inside a watched directory is not noticed (`add_files` would): delete `.trainyard/` after doing that.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started = time.time_ns()
        self.paths: list[str] = []  # relative to the directory, so that an index moves with its data
        self.stamps: list[tuple[int, int]] = []  # (modification time in ns, size in bytes)

    def add(self, path: str | Path) -> None:
        """Call it before reading `path`, so that a change during the scan is noticed."""
        self.paths.append(os.path.relpath(path, self.directory))
        self.stamps.append(_stamp(os.fspath(path)))

    def add_files(self, directory: str | Path) -> None:
        """Watch the content of every file in a directory too: label files are corrected in place."""
        self.add(os.path.join(directory, ALL_FILES))

    def columns(self) -> dict[str, Column]:
        return {"watched": Strings.pack(self.paths), "stamps": np.array(self.stamps, dtype=np.int64).reshape(-1, 2)}


Scan = Callable[[Watch], tuple[Mapping[str, Column], Mapping[str, Any]]]


def cached(root: Path, kind: str, options: Mapping[str, Any], scan: Scan, *, outside: bool = False) -> Table:
    """The table that `scan` makes of what lies at `root`, from the cache where it is still true.

    Args:
        root: the directory the data lie in, or the one file.
        kind: the format's name; with `options` (all that changes what a scan finds) it names the index.
        scan: looks at the data, tells `Watch` what it looked at, returns columns and small facts.
        outside: keep the index beside the directory, not in it: other programs take every folder in there for a class.
    """
    root = Path(os.path.abspath(root))
    directory = root if root.is_dir() else root.parent
    home = directory if not outside else _parent_of(directory)
    what = [VERSION, kind, os.path.relpath(root, home or directory), dict(options)]
    key = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]
    places = list(_places(directory, home, f"{kind}-{key}.index"))
    for place in places:
        try:
            table, note = read_table_and_note(place)
        except (OSError, ValueError):
            continue
        if _is_current(table, note, directory):
            return _without_watch(table)
    place = next((p for p in places if _can_write(p.parent)), None)  # its folder is made now: that changes the directory's time
    watch = Watch(directory)
    with _patience(root):
        columns, meta = scan(watch)
    table = Table.of(columns, meta)
    if place is not None:
        try:
            whole = Table({**table.columns, **watch.columns()}, table.meta, table.fingerprint)
            return _without_watch(whole.write(place, note={"started": watch.started, "key": key}))
        except OSError:
            pass  # a full disk costs time at every start, not the run
    return table


@contextmanager
def _patience(root: Path) -> Iterator[None]:
    """Say what is being waited for, where it takes long."""
    notice = threading.Timer(3.0, logger.warning, ["looking through %s; this is done once", root])
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()


def cache_directory(name: str) -> Path:
    """A folder for indexes of what lies nowhere on this machine."""
    directory = _cache() / name
    _can_write(directory)
    return directory


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainyard"


def _parent_of(directory: Path) -> Path | None:
    """The folder above, as long as it belongs to the same file system and is not the root of everything."""
    parent = directory.parent
    try:
        belongs = parent != parent.parent and os.stat(parent).st_dev == os.stat(directory).st_dev
    except OSError:
        return None
    return parent if belongs else None


def _places(directory: Path, home: Path | None, name: str) -> Iterator[Path]:
    if home is not None and home.is_dir():  # a mistyped path is not to be made true
        yield home / FOLDER / name
    yield _cache() / "indexes" / hashlib.sha256(str(directory).encode()).hexdigest()[:16] / name


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _stamp(path: str) -> tuple[int, int]:
    try:
        if os.path.basename(path) == ALL_FILES:
            with os.scandir(os.path.dirname(path)) as entries:
                found = [(status.st_mtime_ns, status.st_size) for status in (e.stat() for e in entries if e.is_file())]
            return max((time_ns for time_ns, _ in found), default=0), sum(size for _, size in found)
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_mtime_ns, status.st_size


def _is_current(table: Table, note: Mapping[str, Any], directory: Path) -> bool:
    stamps = np.asarray(table["stamps"])  # [paths, 2]
    watched = map(os.fsdecode, table["watched"].all())
    if any(_stamp(os.path.join(directory, path)) != tuple(stamp) for path, stamp in zip(watched, stamps.tolist(), strict=True)):
        return False
    recent = stamps[:, 0] > note["started"] - SETTLED
    # Data put down moments before the scan: scan once more, now that the clock has moved on (the racy case of git's index).
    return not bool(recent.any()) or bool((stamps[recent, 0] > time.time_ns() + SETTLED).all())


def _without_watch(table: Table) -> Table:
    columns = {name: column for name, column in table.columns.items() if name not in ("watched", "stamps")}
    return Table(columns, table.meta, table.fingerprint, table.path)
