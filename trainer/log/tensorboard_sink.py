"""TensorBoard events in the run directory, fed from the journal. Imports tensorboard when it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_CURVES = ("step", "samples")


class TensorboardSink:
    def __init__(self, directory: Path, start_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # What an earlier start wrote beyond the step this one goes on from is hidden: purge_step is the first one hidden.
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1 if start_step else None, flush_secs=10)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name not in NOT_CURVES and isinstance(value, int | float):
                self.writer.add_scalar(name if "/" in name else f"run/{name}", value, row["step"])

    def images(self, step: int, paths: Sequence[Path]) -> None:
        import numpy as np
        from PIL import Image

        for path in paths:
            with Image.open(path) as image:
                self.writer.add_image(f"previews/{path.stem}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def best(self, row: Mapping[str, Any]) -> None:
        """TensorBoard has no place for it."""

    def failed(self, why: str) -> None:
        self.writer.add_text("run/failed", why)

    def close(self, state: str) -> None:
        self.writer.close()
