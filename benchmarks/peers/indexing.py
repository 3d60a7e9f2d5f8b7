"""Opening a million samples, and where in an epoch reading begins."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 1_000_000
REPEATS = 5


def median_ms(action: Callable[[], object]) -> Callable[[], float]:
    def block() -> float:
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            action()
            times.append(time.perf_counter() - started)
        return statistics.median(times) * 1e3

    return block


def million(directory: str) -> Path:
    """An index of a million files, which need not exist."""
    from trainer.data.table import Strings, Table

    path = Path(directory) / "million.index"
    names = Strings.pack(b"class_%04d/image_%08d.jpg" % (i % 1000, i) for i in range(ROWS))
    columns = {"path": names, "label": np.arange(ROWS, dtype=np.int32) % 1000, "size": np.full(ROWS, 100_000)}
    Table.of(columns, {"classes": [f"class_{i:04d}" for i in range(1000)]}).write(path)
    return path


def open_index() -> Callable[[], float]:
    """Open it, and have a name and every label."""
    from trainer.data.files import FileSource
    from trainer.data.table import read_table

    directory = tempfile.TemporaryDirectory()
    path = million(directory.name)

    def action(_directory: object = directory) -> None:
        source = FileSource(Path(directory.name), read_table(path))
        assert source.name(ROWS // 2).endswith(f"{ROWS // 2:08d}.jpg")
        labels = source.labels()
        assert labels is not None
        assert len(labels) == ROWS

    return median_ms(action)


def read_index() -> Callable[[], float]:
    directory = tempfile.TemporaryDirectory()
    path = million(directory.name)
    return median_ms(lambda _directory=directory: path.read_bytes())


def growth() -> Callable[[], float]:
    """Bytes a sample by which a forked worker grows when it has looked up every name and label, as its own process sees it."""
    from trainer.data.files import FileSource
    from trainer.data.table import read_table

    directory = tempfile.TemporaryDirectory()
    table = read_table(million(directory.name))
    source = FileSource(Path(directory.name), table)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def block(_directory: object = directory) -> float:
        read_end, write_end = os.pipe()
        if os.fork() == 0:
            before = resident()
            for i in range(ROWS):
                _ = source.name(i), table["label"][i]
            os.write(write_end, str((resident() - before) / ROWS).encode())
            os._exit(0)
        os.wait()
        os.close(write_end)
        with os.fdopen(read_end) as answer:
            return float(answer.read())

    return block


def first_batch(root: str) -> Callable[[], float]:
    """Milliseconds from nothing but an indexed folder of shards to the first batch of 64."""
    import torch

    from benchmarks.peers.loading import BATCH, SIDE, configs
    from trainer.data.loader import train_loader
    from trainer.data.order import Order
    from trainer.distributed import World

    torch.set_num_threads(1)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    dataset, augmentation = configs(root, "webdataset", SIDE)

    def action() -> None:
        source = dataset.build("train")
        next(iter(train_loader(source, augmentation.build(dataset, train=True), Order(len(source), 0, BATCH), world, num_classes=4)))

    action()
    return median_ms(action)


class Wide:
    """A million samples, each one of the few that there are."""

    def __init__(self, few: Any) -> None:
        self.few = few
        self.classes, self.channels, self.fingerprint = few.classes, few.channels, "wide"

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return self.few[index % len(self.few)]

    def name(self, index: int) -> str:
        return str(index)

    def labels(self) -> None:
        return None


def resume(at: float) -> Callable[[], float]:
    """Milliseconds to the first batch, that fraction into an epoch of a million images that cost nothing to read."""
    import torch

    from trainer.config import AugmentationConfig
    from trainer.data.augment.standard import Standard
    from trainer.data.loader import train_loader
    from trainer.data.order import Order
    from trainer.data.schemas.embedded import SyntheticConfig
    from trainer.distributed import World
    from trainer.launch.compose import compose_run

    torch.set_num_threads(1)
    import tasks  # noqa: F401  (registers the tasks' schemas)

    run = compose_run("dataset=synthetic", "dataset.image_size=32", "augmentation=basic")
    assert isinstance(run.dataset, SyntheticConfig)
    assert isinstance(run.augmentation, AugmentationConfig)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))

    def action() -> None:
        order = Order(ROWS, 0, 64)
        start = int(order.steps_per_epoch * at)
        augmentation = Standard(run.augmentation, run.dataset, train=True)
        next(iter(train_loader(Wide(run.dataset.build("train")), augmentation, order, world, start_step=start, num_classes=10)))  # type: ignore[arg-type]

    action()
    return median_ms(action)
