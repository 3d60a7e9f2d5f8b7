"""Sources whose samples are image files listed in a table: what the formats on disk share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.data.images import decode, open_image, read_file
from trainer.data.source import Sample
from trainer.data.table import Table


class FileSource:
    """Rows of a table with a column `path` (relative to `root`) and, where there are labels, `label` and `size`.

    A format adds what else a sample holds in `fields`.
    """

    channels = 3

    def __init__(self, root: Path, table: Table, classes: Sequence[str] = ()) -> None:
        self.root, self.table, self.classes = os.path.abspath(root), table, tuple(classes)
        self.fingerprint = table.fingerprint
        self.lazy = False
        self.least: int | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = self.name(index)
        image = open_image(read_file(name), name)
        fields = self.fields(index, name, image.size)
        if not self.lazy:
            image = decode(image, name, least=self.least)
        return {"image": image, **fields}

    def fields(self, index: int, name: str, size: tuple[int, int]) -> Sample:
        """Everything but the image. `size` is the image's (width, height), known before it is decoded."""
        return {"label": int(self.table["label"][index])}

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.table["path"][index])

    def labels(self) -> np.ndarray | None:
        return np.asarray(self.table["label"]).astype(np.int64) if "label" in self.table else None

    def encoded(self, index: int) -> tuple[bytes, str]:
        name = self.name(index)
        return read_file(name), os.path.splitext(name)[1].lower()

    def decode_hint(self, least: int | None) -> None:
        self.least = least
