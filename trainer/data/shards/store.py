"""Reading from anywhere: a path, a web address, or one that fsspec knows (s3://, gs://, hf:// …). Imports fsspec for those only."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

from trainer.data.shards.http import Http
from trainer.errors import DataError

OPEN_FILES = 32  # kept open per process; a thousand shards must not exhaust the process's descriptors


def is_remote(place: str) -> bool:
    scheme, separator, _ = place.partition("://")
    return bool(separator) and scheme.isidentifier()


def join(base: str, name: str) -> str:
    """`name` as seen from the folder `base`: itself where it is a full address or path already."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{base.rstrip('/')}/{name}" if is_remote(base) else os.path.join(base, name)


def parent(place: str) -> str:
    return place.rpartition("/")[0] if is_remote(place) else os.path.dirname(os.path.abspath(place))


def read_all(place: str) -> bytes:
    """A whole small file. Raises OSError."""
    if not is_remote(place):
        with open(place, "rb") as file:
            return file.read()
    try:
        return _system(place).cat_file(place)
    except OSError:
        raise
    except Exception as error:  # each file system raises its own
        raise OSError(f"{place}: {error}") from None


def exists(place: str) -> bool:
    if not is_remote(place):
        return os.path.exists(place)
    try:
        return bool(_system(place).exists(place))
    except Exception:  # each file system raises its own
        return False


def describe(place: str) -> tuple[int, str]:
    """Size in bytes, and what changes when the content does: a time, or the server's tag. Raises OSError."""
    if not is_remote(place):
        status = os.stat(place)
        return status.st_size, str(status.st_mtime_ns)
    try:
        info = _system(place).info(place)
    except OSError:
        raise
    except Exception as error:  # as above
        raise OSError(f"{place}: {error}") from None
    if info.get("size") is None:
        raise OSError(f"{place}: its server does not tell its size, so no part of it can be read by itself: dataset.streaming=true")
    return int(info["size"]), str(
        next((info[k] for k in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created") if info.get(k)), "")
    )


def open_stream(place: str) -> Any:
    """A file from its beginning, as a context manager. Raises OSError."""
    if not is_remote(place):
        return open(place, "rb")
    system = _system(place)
    return system.open(place) if isinstance(system, Http) else system.open(place, "rb")


def _system(place: str) -> Any:
    if place.startswith(("http://", "https://")):
        return Http()
    try:
        import fsspec

        return fsspec.core.url_to_fs(place)[0]  # cached by fsspec, per process
    except (ImportError, ValueError) as error:
        raise OSError(f"{place}: {error}") from None


class Window:
    """A remote file read from front to back in large pieces: a request for each header would cost a round trip each."""

    PIECE = 1 << 22  # bytes

    def __init__(self, place: str, size: int) -> None:
        self.place, self.size, self.start, self.data = place, size, 0, b""

    def read_at(self, position: int, count: int) -> bytes:
        count = max(min(count, self.size - position), 0)
        if not self.start <= position <= position + count <= self.start + len(self.data):
            end = min(position + max(count, self.PIECE), self.size)
            self.start, self.data = position, Files().read_at(self.place, position, end - position)
        return self.data[position - self.start : position - self.start + count]


class Files:
    """Parts of files by place. Survives fork (nothing with a position is shared) and pickling (nothing is open in a copy)."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple[type[Files], tuple[()]]:
        return Files, ()

    def read_at(self, place: str, position: int, count: int, size: int | None = None) -> bytes:
        """`count` bytes from `position`, fewer only at the end of the file.

        Args:
            size: what the file's size must be; a file that was replaced since it was indexed is refused.
        """
        if is_remote(place):
            try:
                return _system(place).cat_file(place, start=position, end=position + count) if count else b""
            except Exception as error:  # each file system raises its own
                raise OSError(f"{place}: {error}") from None
        descriptor = self._descriptor(place, size)
        parts = []
        while count:
            part = os.pread(descriptor, count, position)
            if not part:
                break
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _descriptor(self, place: str, size: int | None) -> int:
        if place in self._open:
            self._open.move_to_end(place)
            return self._open[place]
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        there = os.fstat(descriptor).st_size
        if size is not None and there != size:
            os.close(descriptor)
            raise DataError(
                f"{place} has {there:,} bytes, but {size:,} when it was indexed: it changed since the run began. Start the run again"
            )
        self._open[place] = descriptor
        if len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)
