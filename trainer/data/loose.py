"""Images that belong to no data set: whatever lies in a folder, without labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.data.images import EXTENSIONS, decode, open_image, read_file
from trainer.data.source import BadSample, Sample


class LooseImages:
    """Every image below `root`, by path; arrays [H, W, C] of .npy files where a network takes neither 1 nor 3 channels."""

    classes: Sequence[str] = ()

    def __init__(self, root: Path, channels: int = 3) -> None:
        self.root, self.channels, self.lazy = root, channels, False
        endings = EXTENSIONS if channels in (1, 3) else (".npy",)
        found = (
            [root]
            if root.is_file()
            else [p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts)]
        )
        self.paths = sorted(str(p) for p in found if p.suffix.lower() in endings and not p.is_dir())
        self.fingerprint = hashlib.sha256("\0".join(self.paths).encode(errors="surrogateescape")).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        if self.channels not in (1, 3):
            return {"image": self._array(path)}
        image = open_image(read_file(path), path)
        if self.channels == 1:
            return {"image": np.asarray(decode(image, path).convert("L"))[..., None]}
        return {"image": image if self.lazy else decode(image, path)}

    def _array(self, path: str) -> np.ndarray:
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BadSample(path, f"cannot be read: {error}") from None
        if array.ndim != 3 or array.shape[2] != self.channels:
            raise BadSample(path, f"is {list(array.shape)}, and the network takes [height, width, {self.channels}]")
        return array

    def name(self, index: int) -> str:
        return self.paths[index]

    def labels(self) -> np.ndarray | None:
        return None

    def relative(self, path: str) -> str:
        return os.path.relpath(path, self.root) if self.root.is_dir() else os.path.basename(path)
