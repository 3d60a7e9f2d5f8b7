"""metrics.jsonl, the record of a run: one JSON object a line, whole lines only, in the order of the steps.

Every other view (CSV, plots, W&B, TensorBoard) can be made from it again. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from trainer.files import storage_error

# JSON has no NaN or infinity. A string keeps which of them it was, every parser accepts it, and float() reads it back.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Kept = TypeVar("Kept")

_encode = json.JSONEncoder(allow_nan=False, separators=(", ", ": ")).encode


class Record:
    """Appends rows. A row is in the kernel's hands when `append` returns, so a kill of the process loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        try:
            line = _encode(row)
        except (ValueError, TypeError):  # a number JSON does not know, or one of numpy's or torch's: rare, so tried last
            line = _encode({key: plain(value) for key, value in row.items()})
        if self.file is None:
            self.file = open_append(self.path)
        append_line(self.file, self.path, line)

    def rewind(self, step: int) -> dict[str, Any] | None:
        """Drop every row after `step`, and a last line that a kill tore. Returns the last row that stays."""
        self.close()
        return cut_after(self.path, lambda line: _row_up_to(line, step))

    def sync(self) -> None:
        """Wait until the disk has it: for what must survive a power cut."""
        if self.file is not None:
            os.fsync(self.file)

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl, with NaN and infinities as floats again; a torn last line is left out."""
    with open(path, "rb") as file:
        for line in file:
            row = parse(line)
            if row is not None:
                yield row


def rows_after(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows beyond `step`, read from the end: costs as much as there are of them."""
    rows: list[dict[str, Any]] = []
    data = path.read_bytes()
    end = len(data)
    while end > 0:
        begin = data.rfind(b"\n", 0, end - 1) + 1
        row = parse(data[begin:end])
        if row is not None and row["step"] <= step:
            break
        if row is not None:
            rows.append(row)
        end = begin
    return rows[::-1]


def parse(line: bytes) -> dict[str, Any] | None:
    """One line of a metrics.jsonl; None where it is not a whole row."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or "step" not in row:
        return None
    return {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}


def plain(value: Any) -> Any:
    """`value` as JSON knows it: numpy's and torch's numbers as Python's, NaN and infinities as their names."""
    if value is None or isinstance(value, str | bool | int):
        return value
    number = value.item() if hasattr(value, "item") else float(value)
    if isinstance(number, float) and not math.isfinite(number):
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    return number


def append_line(file: int, path: Path, line: str) -> None:
    """Write one whole line, or leave the file as it was and raise StorageError."""
    data = line.encode() + b"\n"
    try:
        written = os.write(file, data)
        if written < len(data):  # a disk that fills up takes what fits
            os.ftruncate(file, os.fstat(file).st_size - written)
            raise OSError(28, "No space left on device")
    except OSError as error:
        raise storage_error(path, error) from error


def cut_after(path: Path, keep: Callable[[bytes], Kept | None]) -> Kept | None:
    """Cut the end of `path` off after the last line for which `keep(line)` is not None, and return what it gave.

    Rows lie in the order of their steps, so what has to go is at the end: one truncation, which a kill either finds
    done or not done.
    """
    try:
        with open(path, "r+b") as file:
            data = file.read()
            end, kept = len(data), None
            while end > 0:
                begin = data.rfind(b"\n", 0, end - 1) + 1
                kept = keep(data[begin:end])
                if kept is not None:
                    break
                end = begin
            if end < len(data):
                file.truncate(end)
                os.fsync(file.fileno())
            return kept
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error(path, error) from error


def _row_up_to(line: bytes, step: int) -> dict[str, Any] | None:
    row = parse(line)
    return row if row is not None and row["step"] <= step else None


def open_append(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise storage_error(path, error) from error
