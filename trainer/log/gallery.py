"""Writes a task's pictures into previews/ on a thread of its own, and tells the sinks where they lie. Imports no torch."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds the last pictures may take
MOST_WAITING = 8  # sets of pictures; where the disk is slower than that, some are left out


class Gallery:
    """`previews/step-0000100/<name>.png`. A picture that cannot be written is reported once, and training goes on."""

    def __init__(self, directory: Path, show: Callable[[int, Sequence[Path]], None]) -> None:
        self.directory = directory
        self.show = show  # called on the gallery's thread, with the files of a step
        self.jobs: queue.Queue[tuple[int, Mapping[str, np.ndarray]] | None] = queue.Queue(MOST_WAITING)
        self.thread: threading.Thread | None = None
        self.failed = False

    def add(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Queue pictures, {name: uint8 [H, W, 3]}. Never waits."""
        if not pictures or self.failed:
            return
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="previews", daemon=True)
            self.thread.start()
        try:
            self.jobs.put_nowait((step, pictures))
        except queue.Full:
            logger.warning("the pictures of step %d are left out: %d sets are waiting for the disk", step, MOST_WAITING)

    def close(self) -> None:
        """Wait for what is queued."""
        if self.thread is not None:
            try:
                self.jobs.put(None, timeout=PATIENCE)
                self.thread.join(PATIENCE)
            except queue.Full:
                logger.warning("the last pictures are left out: the disk does not take them")

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            if not self.failed:
                try:
                    self.show(job[0], self._write(*job))
                except Exception as error:
                    self.failed = True
                    logger.warning("no more pictures are written to %s (%s: %s)", self.directory, type(error).__name__, error)

    def _write(self, step: int, pictures: Mapping[str, np.ndarray]) -> list[Path]:
        from PIL import Image

        folder = self.directory / f"step-{step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, picture in pictures.items():
            paths.append(folder / f"{name}.png")
            Image.fromarray(picture).save(paths[-1])
        return paths
