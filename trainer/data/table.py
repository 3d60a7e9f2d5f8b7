"""Columns of a million rows in one file, read row by row where they lie: no list of strings, nothing copied into workers.

Rows are read with pread, not through a mapping: a worker that has walked over a mapped file holds all of it in its
resident memory, and a file that is cut short under a mapping kills the reader instead of raising.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import DataError

MAGIC = b"trainyd1"
ALIGNMENT = 64  # bytes; every column starts on a cache line


class Stored:
    """An array in a file. `stored[3]` and `stored[3:7]` read those rows; `np.asarray(stored)` reads it all."""

    def __init__(self, file: _File, dtype: np.dtype, shape: tuple[int, ...], position: int) -> None:
        self.file, self.dtype, self.shape, self.position = file, dtype, shape, position
        self.row_bytes = dtype.itemsize * math.prod(shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> Any:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self._read(start, max(stop, start))
        if not 0 <= rows < len(self):
            raise IndexError(rows)
        return self._read(int(rows), int(rows) + 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self._read(0, len(self))
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def _read(self, start: int, stop: int) -> np.ndarray:
        data = self.file.read(self.position + start * self.row_bytes, (stop - start) * self.row_bytes)
        # bytearray: a caller may write into what it gets, as it may with an array in memory
        return np.frombuffer(bytearray(data), self.dtype).reshape(stop - start, *self.shape[1:])


class _File:
    """An open file, closed when nobody holds it any more. Safe after a fork: pread has no position to share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, position: int, size: int) -> bytes:
        parts = []
        while size:
            part = os.pread(self.descriptor, size, position)
            if not part:
                raise DataError(f"the index {self.path} was cut short while it was in use; delete it and start again")
            parts.append(part)
            position, size = position + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at hand when the interpreter ends and `os` is gone
        if hasattr(self, "descriptor"):
            close(self.descriptor)


Array = np.ndarray | Stored


class Strings:
    """Strings end to end in one array, and where each starts."""

    def __init__(self, blob: Array, offsets: Array) -> None:
        self.blob, self.offsets = blob, offsets  # uint8 [bytes], int64 [N + 1]

    @classmethod
    def pack(cls, strings: Iterable[str | bytes]) -> Strings:
        encoded = [s if isinstance(s, bytes) else os.fsencode(s) for s in strings]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(s) for s in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def bytes(self, index: int) -> bytes:
        start, stop = self.offsets[index : index + 2]
        return self.blob[start:stop].tobytes()

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.bytes(index))  # file names are bytes; those that are not UTF-8 survive the round trip

    def all(self) -> list[bytes]:
        """Every string, for work that goes over all of them once: many times faster than one at a time."""
        blob, offsets = np.asarray(self.blob).tobytes(), np.asarray(self.offsets).tolist()
        return [blob[start:stop] for start, stop in itertools.pairwise(offsets)]


class Ragged:
    """Rows of different lengths: all values end to end, and where each row starts."""

    def __init__(self, values: Array, offsets: Array) -> None:
        self.values, self.offsets = values, offsets  # [total, ...], int64 [N + 1]

    @classmethod
    def pack(cls, counts: Iterable[int] | np.ndarray, values: np.ndarray) -> Ragged:
        counts = np.asarray(list(counts) if not isinstance(counts, np.ndarray) else counts, dtype=np.int64)
        offsets = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        assert offsets[-1] == len(values)
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        start, stop = self.offsets[index : index + 2]
        return self.values[start:stop]


Column = np.ndarray | Stored | Strings | Ragged


class Table:
    """Named columns, and `meta`: small facts as JSON. Compared by `fingerprint`, the hash of all of its content."""

    def __init__(self, columns: Mapping[str, Column], meta: dict[str, Any], fingerprint: str, path: Path | None = None) -> None:
        self.columns, self.meta, self.fingerprint, self.path = dict(columns), meta, fingerprint, path

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __len__(self) -> int:
        return self.meta["rows"]

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            return Table, (self.columns, self.meta, self.fingerprint)
        return _reopen, (self.path, self.fingerprint)  # a spawned worker maps the file itself

    @classmethod
    def of(cls, columns: Mapping[str, Column], meta: Mapping[str, Any] | None = None) -> Table:
        """A table in memory. Its fingerprint covers the columns and `meta`."""
        meta = dict(meta or {})
        meta["rows"] = len(next(iter(columns.values()))) if columns else 0
        digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
        for name, array in _arrays(columns):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.data if array.size else b"")
        return cls(columns, meta, digest.hexdigest()[:32])

    def write(self, path: Path, note: Mapping[str, Any] | None = None) -> Table:
        """Put the table into `path`, whole or not at all, and return it as read back from there.

        Args:
            note: what belongs to this file but not to the content: when it was made, from what.
        """
        places, position = [], 0
        for name, array in _arrays(self.columns):
            places.append({"name": name, "dtype": array.dtype.str, "shape": list(array.shape), "at": position})
            position += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        header = {"columns": places, "bytes": position, "meta": self.meta, "fingerprint": self.fingerprint, "note": dict(note or {})}
        text = json.dumps(header).encode()
        text += b" " * (-(len(MAGIC) + 8 + len(text)) % ALIGNMENT)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + struct.pack("<Q", len(text)) + text)
                for _, array in _arrays(self.columns):
                    file.write(array.data if array.size else b"")
                    file.write(b"\0" * (-array.nbytes % ALIGNMENT))
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared dataset's index from everyone else
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return read_table(path)


def read_table(path: Path) -> Table:
    """Open a table. Costs the same for ten rows and ten million.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a table, or it is cut short.
    """
    return read_table_and_note(path)[0]


def read_table_and_note(path: Path) -> tuple[Table, dict[str, Any]]:
    """A table, and what `write` noted beside it."""
    file = _File(path)
    size = os.fstat(file.descriptor).st_size
    start = len(MAGIC) + 8
    if size < start:
        raise ValueError(f"{path} is cut short")
    magic, (length,) = file.read(0, len(MAGIC)), struct.unpack("<Q", file.read(len(MAGIC), 8))
    if magic != MAGIC or start + length > size:
        raise ValueError(f"{path} is not an index")
    header = json.loads(file.read(start, length).decode())
    start += length
    if size != start + header["bytes"]:
        raise ValueError(f"{path} is cut short")
    arrays = {c["name"]: Stored(file, np.dtype(c["dtype"]), tuple(c["shape"]), start + c["at"]) for c in header["columns"]}
    return Table(_columns(arrays), header["meta"], header["fingerprint"], path), header["note"]


def _reopen(path: Path, fingerprint: str) -> Table:
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"the index {path} is gone or broken since the run began: {error}") from None
    if table.fingerprint != fingerprint:
        raise DataError(f"the index {path} was rebuilt since the run began: the data changed. Start the run again")
    return table


def _arrays(columns: Mapping[str, Column]) -> Iterable[tuple[str, np.ndarray]]:
    """The plain arrays behind the columns, under names that tell what they are parts of."""
    for name, column in columns.items():
        if isinstance(column, Strings):
            parts = {f"{name}|blob": column.blob, f"{name}|starts": column.offsets}
        elif isinstance(column, Ragged):
            parts = {f"{name}|values": column.values, f"{name}|rows": column.offsets}
        else:
            parts = {name: column}
        for part, array in parts.items():
            yield part, np.ascontiguousarray(array)


def _columns(arrays: Mapping[str, Array]) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for key, array in arrays.items():
        name, _, part = key.partition("|")
        if part == "blob":
            columns[name] = Strings(array, arrays[f"{name}|starts"])
        elif part == "values":
            columns[name] = Ragged(array, arrays[f"{name}|rows"])
        elif not part:
            columns[name] = array
    return columns
