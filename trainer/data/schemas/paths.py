"""What schemas have to say about paths and class files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.config.names import nearest
from trainer.data.source import LayoutError
from trainer.errors import Problem


def directory_problem(key: str, path: str | Path) -> Problem | None:
    """What is wrong with a path that must be a readable directory, if anything. Names the nearest one that is there."""
    path = Path(path).expanduser()
    if path.is_dir():
        if os.access(path, os.R_OK | os.X_OK):
            return None
        return Problem(key, str(path), "may not be read by this user", f"chmod -R u+rX {path}")
    if path.exists():
        return Problem(key, str(path), "is a file, not a directory", f"{key}={path.parent}")
    parent = path.parent
    beside = sorted(e.name for e in os.scandir(parent) if e.is_dir()) if parent.is_dir() and os.access(parent, os.R_OK) else []
    close = nearest(path.name, beside)
    there = f"{parent} holds {', '.join(beside[:6]) or 'no folders'}" if parent.is_dir() else f"not even {parent} exists"
    return Problem(key, str(path), f"no such directory: {there}", f"{key}={parent / close}" if close else f"{key}=/path/to/data")


def read_class_file(path: str | Path) -> list[str]:
    """Class names, one a line, index = line.

    Raises:
        LayoutError: it is not such a file; the message says why.
        OSError: it cannot be read.
    """
    return parse_classes(Path(path).expanduser().read_bytes())


def parse_classes(data: bytes) -> list[str]:
    """The names in a class file. Blank lines at its end do not count."""
    try:
        names = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise LayoutError("is not a text file in UTF-8") from None
    while names and not names[-1]:
        names.pop()
    if not names:
        raise LayoutError("is empty: one class name a line is expected")
    blank = next((i for i, name in enumerate(names) if not name), None)
    if blank is not None:
        raise LayoutError(f"has an empty line {blank + 1}: the line number is the class index, so none may be left out")
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        if name in seen:
            raise LayoutError(f"has the class {name!r} twice, in lines {seen[name] + 1} and {i + 1}")
        seen[name] = i
    return names


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" … ({len(names)})" if len(names) > 5 else "")


def class_file_problems(path: str | None) -> Iterator[Problem]:
    """What is wrong with the file that dataset.class_file names, if one is named."""
    if path:
        try:
            read_class_file(path)
        except OSError as error:
            yield Problem("dataset.class_file", path, why(error), "dataset.class_file=null" if not Path(path).expanduser().exists() else "")


def why(error: OSError) -> str:
    """What went wrong, to follow the name of the path."""
    return str(error) if isinstance(error, LayoutError) else f"cannot be read: {error.strerror or error}"
