"""Batches from a block of memory to the device they are trained on, and through the second stage of augmentation."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.data.augment import Augmentation
    from trainer.data.order import Draw
    from trainer.data.reading import Filled
    from trainer.data.workers import Pool
    from trainer.task import Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Taken:
    """A block with a batch in it, until it is released."""

    draw: Draw
    views: dict[str, Tensor]
    parts: list[Filled]
    release: Callable[[], None]


@dataclass(frozen=True)
class Placed:
    """A batch on its device. On CUDA its kernels may still be running; `done` says when they are through."""

    batch: Batch
    done: torch.cuda.Event | None = None


class OnCpu:
    looks_ahead = False

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation

    def take_in(self, batch: Batch, taken: Taken) -> Placed:
        block = taken.views["key"].untyped_storage().data_ptr()
        batch = self.augmentation.batch(batch)
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == block:
                batch[name] = value.clone()  # the block's memory is about to be used again
        taken.release()
        return Placed(batch)

    def hand_over(self, placed: Placed) -> Batch:
        return placed.batch

    def reclaim(self, *, wait: bool) -> None:
        pass


class OnCuda:
    """Copies and augments on a stream of its own, beside the training step before it. The host waits for neither."""

    looks_ahead = True

    def __init__(self, augmentation: Augmentation, device: torch.device) -> None:
        self.augmentation, self.device = augmentation, device
        self.stream = torch.cuda.Stream(device)
        self.copying: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()

    def take_in(self, batch: Batch, taken: Taken) -> Placed:
        with torch.cuda.stream(self.stream):
            moved = {name: self._move(value) for name, value in batch.items()}
            copied = torch.cuda.Event()
            copied.record(self.stream)
            self.copying.append((copied, taken.release))
            moved = self.augmentation.batch(moved)
            done = torch.cuda.Event()
            done.record(self.stream)
        return Placed(moved, done)

    def hand_over(self, placed: Placed) -> Batch:
        """The batch for the current stream, which waits for it."""
        assert placed.done is not None
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(placed.done)
        for value in placed.batch.values():
            for tensor in value if isinstance(value, list) else (value,):
                if isinstance(tensor, Tensor) and tensor.is_cuda:
                    tensor.record_stream(stream)  # its memory is not given away while this stream may still read it
        return placed.batch

    def reclaim(self, *, wait: bool) -> None:
        """Release the blocks whose copies are through; with `wait`, at least one."""
        while self.copying and (wait or self.copying[0][0].query()):
            copied, release = self.copying.popleft()
            copied.synchronize()
            release()
            wait = False

    def _move(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._move(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        # Only from pinned memory does a copy run by itself; what is not pinned already is small.
        return (value if value.is_pinned() else value.pin_memory()).to(self.device, non_blocking=True)


def pin(pool: Pool) -> None:
    """Page-lock a pool's blocks, so that the GPU copies straight from what the workers wrote.

    After the fork: the workers have no business with CUDA.
    """
    runtime: Any = torch.cuda.cudart()
    locked: list[Tensor] = []
    # The blocks are held until they are unlocked: memory must not go back to the system while CUDA knows of it.
    weakref.finalize(pool, _unpin, runtime, locked).atexit = False
    for block in pool.blocks:
        error = int(runtime.cudaHostRegister(block.data_ptr(), block.numel(), 0))
        if error:
            logger.warning(
                "the loader's memory cannot be page-locked (CUDA error %d): batches take one more copy on their way to the GPU", error
            )
            return
        locked.append(block)


def _unpin(runtime: Any, locked: list[Tensor]) -> None:
    for block in locked:
        runtime.cudaHostUnregister(block.data_ptr())
