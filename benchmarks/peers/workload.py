"""What every engine trains: two small networks, batches that lie in memory, and the clock that all are timed with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_EVERY = 50  # optimizer steps
CLIP = 1.0  # global L2 norm of the gradients
EMA_WEIGHT = 0.001  # of the new weights
PEAK_RATE = 1e-3
HORIZON = 100_000  # optimizer steps of the schedule; longer than any measurement

Pair = tuple[Tensor, Tensor]  # images or features [N, ...], labels [N]


@dataclass(frozen=True)
class Workload:
    model: nn.Module
    batches: list[Pair]
    steps: int  # in one block


def workload(net: str, device: str = "cpu") -> Workload:
    """`mlp`: a step of about 170 us, so that everything around it shows. `vit`: 152 parameter tensors, about 8 ms."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = _workload(net)
    return Workload(work.model.to(device), [(x.to(device), y.to(device)) for x, y in work.batches], work.steps)


def _workload(net: str) -> Workload:
    labels = [torch.randint(10, (32,)) for _ in range(16)]
    if net == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        return Workload(model, [(torch.randn(32, 64), y) for y in labels], steps=200)
    assert net == "vit"
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=12, num_heads=2, num_classes=10)
    assert len(list(model.parameters())) == 152
    return Workload(model, [(torch.randn(4, 3, 32, 32), y[:4]) for y in labels], steps=50)


class Stamped:
    """The batches over and over, `warm + steps + 1` of them, with the time at which each was asked for.

    Time between two requests is a whole step of whatever engine asks, its own bookkeeping included. It is the CPU time of
    the process, all its threads: the same as wall time here, as nothing waits, but blind to what else the machine does.
    """

    warm = 10

    def __init__(self, batches: list, steps: int) -> None:
        self.batches, self.steps = batches, steps
        self.batch_size = len(batches[0][1]) if isinstance(batches[0], tuple) else 0  # Composer asks
        self.stamps: list[float] = []

    def __len__(self) -> int:
        return self.warm + self.steps + 1

    def __iter__(self) -> Iterator:
        self.stamps = []
        for i in range(len(self)):
            self.stamps.append(self._now(i))
            yield self.batches[i % len(self.batches)]

    def _now(self, i: int) -> float:
        first = self.batches[0]
        if not (first["image"] if isinstance(first, dict) else first[0]).is_cuda:
            return time.process_time()
        if i in (self.warm, self.warm + self.steps):
            torch.cuda.synchronize()
        return time.perf_counter()

    def microseconds(self) -> float:
        """Per step, the warm-up left out."""
        return (self.stamps[self.warm + self.steps] - self.stamps[self.warm]) / self.steps * 1e6


def loss_and_hits(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(x)  # [N, C]
    loss = F.cross_entropy(logits, y)
    with torch.no_grad():
        hits = (logits.argmax(1) == y).float().mean()
    return loss, hits
