"""Counts the places where the host would wait for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_consecutive", "_assert_async"}
)
"""Kernels whose result's value or shape the host has to know. `aten::_local_scalar_dense` is `.item()`, `float()`, `if tensor:`."""

METHODS = frozenset({"tolist", "cpu", "numpy", "__array__", "__repr__", "__format__"})
"""These read memory without an operator of their own while the tensor is on the CPU; on a GPU they wait."""


def is_mask(index: Any) -> bool:
    """`x[mask]` has as many entries as the mask has ones, which the host has to know."""
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


class SyncCounter:
    """Counts on the CPU what would be a synchronisation on a GPU. Both modes are needed: operators see what C++ does,
    functions see what never becomes an operator here."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> SyncCounter:
        counts = self.counts

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = func._schema.name.removeprefix("aten::")
                if name in OPERATORS or (name in {"index", "index_put_"} and any(map(is_mask, args[1]))):
                    counts[name] += 1
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = getattr(func, "__name__", "")
                if name in METHODS:
                    counts[name] += 1
                return func(*args, **(kwargs or {}))

        self._modes = (Operators(), Methods())
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)

    @property
    def total(self) -> int:
        return self.counts.total()


class Watched:
    """Batches, with the count at each request: the differences are what each step waited."""

    def __init__(self, batches: list, steps: int, counter: SyncCounter) -> None:
        self.batches, self.steps, self.counter = batches, steps, counter
        self.batch_size = 0
        self.totals: list[int] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Any:
        self.totals = []
        for i in range(self.steps):
            self.totals.append(self.counter.total)
            yield self.batches[i % len(self.batches)]


def between_logs(totals: list[int], log_every: int) -> float:
    """The largest count of any step that does not end in a log line; `totals[i]` was taken as step i began."""
    steps = [after - before for before, after in pairwise(totals)]
    return float(max(count for i, count in enumerate(steps, start=1) if i % log_every))


def ours(overrides: list[str] | None = None, accumulate: int = 1) -> Callable[[], float]:
    """Synchronisations of the worst step between two log points, over 120 steps."""
    from benchmarks.peers import ours
    from benchmarks.peers.workload import LOG_EVERY, workload

    work = workload("mlp")
    fit = ours.prepare(work.model, 10, [f"loop.accumulate={accumulate}", *(overrides or [])])
    batches = [ours._batch(x, y) for x, y in work.batches]
    fit(batches * 2, steps=10)  # optimizers make their state in the first step

    def block() -> float:
        with SyncCounter() as counter:
            watched = Watched(batches, 120 * accumulate, counter)
            fit(watched, steps=120)
        # Ten steps came before, so a log line falls on every 50th less ten.
        return between_logs([*[0] * 10, *watched.totals[::accumulate]], LOG_EVERY)

    return block


def item_every_step() -> Callable[[], float]:
    """The loop of most scripts, `loss.item()` at every step: the counter has to see it."""
    from benchmarks.peers.workload import loss_and_hits, workload

    work = workload("mlp")
    optimizer = torch.optim.AdamW(work.model.parameters(), fused=True)

    def block() -> float:
        with SyncCounter() as counter:
            watched = Watched(work.batches, 60, counter)
            for x, y in watched:
                optimizer.zero_grad()
                loss, _ = loss_and_hits(work.model, x, y)
                loss.backward()
                optimizer.step()
                loss.item()
        return between_logs(watched.totals, 50)

    return block


def ours_on_gpu() -> Callable[[], float]:
    """The same, as CUDA sees it: torch warns of every wait."""
    import warnings

    from benchmarks.peers import ours
    from benchmarks.peers.workload import LOG_EVERY, workload

    work = workload("mlp", "cuda")
    fit = ours.prepare(work.model, 10)
    batches = [ours._batch(x, y) for x, y in work.batches]
    fit(batches * 2, steps=10)

    def block() -> float:
        counter = SyncCounter()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: counter.counts.update(["sync"] * ("synchroniz" in str(message)))
            torch.cuda.set_sync_debug_mode("warn")
            watched = Watched(batches, 120, counter)
            fit(watched, steps=120)
            torch.cuda.set_sync_debug_mode("default")
        return between_logs([*[0] * 10, *watched.totals], LOG_EVERY)

    return block
