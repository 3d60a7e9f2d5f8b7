"""Sources for tests: small, in memory, and misbehaving when told to."""

from __future__ import annotations

import os
import pickle
import random as python_random
import signal
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer.data.loader import Loader, train_loader
from trainer.data.order import Order
from trainer.data.source import BadSample, Sample
from trainer.random import SampleRandom


@dataclass
class Pictures:
    """Noise, each sample its own. `bad` cannot be read, `dies` kills the reading process, `hangs` never comes back."""

    size: int = 37
    num_classes: int = 3
    bad: frozenset[int] = frozenset()
    dies: int = -1
    hangs: int = -1
    channels: int = 3
    fingerprint: str = "pictures"
    parent: int = field(default_factory=os.getpid)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("abcdefghij"[: self.num_classes])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSample(self.name(index), "made so")
        if os.getpid() != self.parent:
            if index == self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if index == self.hangs:
                time.sleep(3600)
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        return {"image": Image.fromarray(pixels), "label": index % self.num_classes}

    def name(self, index: int) -> str:
        return f"picture-{index}"

    def labels(self) -> np.ndarray:
        return np.arange(self.size) % self.num_classes


class Plain:
    """The least an augmentation does; `draws` makes it draw from the global generators too."""

    num_classes: int | None = None

    def __init__(self, draws: bool = False) -> None:
        self.draws = draws

    def sample(self, sample: Sample, random: SampleRandom) -> dict[str, Any]:
        pixels = torch.from_numpy(np.array(sample["image"])).permute(2, 0, 1)
        moved = {"image": pixels, "label": sample["label"], "drawn": random.uniform()}
        if self.draws:
            with random.global_generators():
                moved["torch"], moved["numpy"] = torch.rand(2), float(np.random.rand())  # noqa: NPY002
        return moved

    def batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


@dataclass
class Rank:
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")


def batches(
    number: int, order: Order, *, source: Any = None, augmentation: Any = None, rank: int = 0, world: int = 1, **options: Any
) -> list[dict[str, Any]]:
    """The first micro-batches of a rank."""
    loader = train_loader(source or Pictures(order.size), augmentation or Plain(), order, Rank(rank, world), **options)
    return take(loader, number)


def take(loader: Loader, number: int | None = None) -> list[dict[str, Any]]:
    try:
        return list(islice(loader, number))
    finally:
        loader.close()


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(v.equal(b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def global_generators() -> bytes:
    """The state of everything in this process that draws without being told a seed."""
    return pickle.dumps((python_random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))  # noqa: NPY002
