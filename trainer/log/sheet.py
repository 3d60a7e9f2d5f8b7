"""epochs.csv and batches.csv: the record for spreadsheets. Columns may come later; rows are never lost to that.

Imports no torch.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.files import write_atomically
from trainer.log.record import append_line, cut_after, open_append


class Sheet:
    """A CSV file that grows downwards by rows and, now and then, sideways by columns."""

    def __init__(self, path: Path, first: Sequence[str], last: Sequence[str]) -> None:
        self.path = path
        self.first, self.last = list(first), list(last)  # columns that every row has, on the left and on the right
        self.columns: list[str] = []
        self.known: frozenset[str] = frozenset()
        self.file: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        if not self.known.issuperset(row):
            self._widen(row)
        if self.file is None:
            self.file = open_append(self.path)
        append_line(self.file, self.path, ",".join([repr(v) if v.__class__ is float else cell(v) for v in map(row.get, self.columns)]))

    def rewind(self, step: int) -> dict[str, str] | None:
        """Drop every row after `step`, and a last line that a kill tore. Returns the last row that stays."""
        self.close()
        self._use(self._header())
        if not self.columns:
            return None
        at = self.columns.index("step")

        def keep(line: bytes) -> dict[str, str] | None:
            cells = next(csv.reader([line.decode(errors="replace").rstrip("\n")]), [])
            if cells == self.columns and line.endswith(b"\n"):
                return {}
            whole = line.endswith(b"\n") and len(cells) == len(self.columns) and cells[at].isdigit()
            return dict(zip(self.columns, cells)) if whole and int(cells[at]) <= step else None

        return cut_after(self.path, keep) or None

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def _widen(self, row: Mapping[str, Any]) -> None:
        """Take in the columns of `row` that are new, rewriting the file in one step if it has rows already."""
        if not self.columns:
            self._use(self._header())
        fixed = {*self.first, *self.last}
        middle = [c for c in [*self.columns, *row] if c not in fixed]
        columns = [*self.first, *dict.fromkeys(middle), *self.last]
        if columns == self.columns:
            return
        self.close()
        write_atomically(self.path, _rewritten(self.path, columns))
        self._use(columns)

    def _use(self, columns: list[str]) -> None:
        self.columns, self.known = columns, frozenset(columns)

    def _header(self) -> list[str]:
        """The columns of the file; none where there is no file or its first line is torn."""
        try:
            with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
                line = file.readline(1 << 20)
        except FileNotFoundError:
            return []
        columns = next(csv.reader([line.rstrip("\n")]), []) if line.endswith("\n") else []
        return columns if "step" in columns else []


def cell(value: Any) -> str:
    """A value as a CSV cell: no quotes but where they are needed, no line breaks, nothing for None."""
    if value.__class__ is float:
        return repr(value)
    if value is None:
        return ""
    text = str(value.item()) if hasattr(value, "item") else str(value)
    if text.isalnum():
        return text
    text = " ".join(text.splitlines())
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"') else text


def _rewritten(path: Path, columns: Sequence[str]) -> str:
    text = io.StringIO()
    text.write(",".join(map(cell, columns)) + "\n")
    if path.exists():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                text.write(",".join(cell(row.get(column)) for column in columns) + "\n")
    return text.getvalue()
