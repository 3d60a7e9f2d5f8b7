"""Processes that fill blocks of shared memory with samples. They know rows and blocks; which samples, they are told.

Workers are forked, so a source of millions of samples is shared and not copied, and write straight into blocks that the
parent reads (and a GPU copies) from: no batch travels through a pipe. The rows of a batch are divided among all workers, so
the first batch is there after a fraction of the time that one of them would need.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import multiprocessing.util
import os
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import ceil
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.reading import Filled, Layout, Reading
from trainer.errors import DataError

SMALLEST_PART = 8  # rows of a message to a worker: its 0.1 ms should be lost in the reading of them
ORPHANED = 2.0  # seconds between two looks of an idle worker at whether its parent lives
SLICE = 1.0  # seconds between two looks at whether everyone is alive

Part = tuple[int, int, int, int, int]  # batch number, block, first row, stop, epoch


def part_size(rows: int, workers: int) -> int:
    """Rows of a batch that one worker is asked for at a time."""
    return max(ceil(rows / workers), SMALLEST_PART)


class Pool:
    """A fixed number of workers and blocks. `submit` batches, then `collect` them in the same order.

    Args:
        blocks: how many batches can be in flight or in use.
        timeout: seconds of silence from all workers after which they count as hung.
    """

    def __init__(self, reading: Reading, layout: Layout, workers: int, blocks: int, timeout: float) -> None:
        self.reading, self.layout, self.timeout = reading, layout, timeout
        self.blocks = [_shared(layout.bytes) for _ in range(blocks)]
        self.views = [layout.views(block) for block in self.blocks]
        self.free = list(range(blocks))
        self.current = _shared(8 * workers).view(torch.int64)  # [workers] the index each is reading
        self.waiting: dict[int, tuple[int, int, list[Filled]]] = {}  # batch: (block, rows to come, parts that came)
        self.submitted = 0
        self.load = [0] * workers  # rows that each has been given and not returned
        self.processes: list[ForkProcess] = []
        self.pipes: list[Connection] = []
        context = multiprocessing.get_context("fork")
        with warnings.catch_warnings():
            # Forking beside threads is unsafe where the child needs their locks; ours touches numpy, PIL and its pipe.
            warnings.simplefilter("ignore", DeprecationWarning)
            for number in range(workers):
                ours, theirs = context.Pipe()
                self.pipes.append(ours)
                arguments = (number, theirs, list(self.pipes), reading, self.views, self.current[number : number + 1].numpy(), os.getpid())
                process = context.Process(target=_serve, args=arguments, name=f"loader-{number}", daemon=True)
                with _signals_blocked():  # until the worker has chosen to ignore them
                    process.start()
                theirs.close()
                self.processes.append(process)
        # Before multiprocessing's own exit handler, which would wait for workers that ignore its SIGTERM.
        self._close = multiprocessing.util.Finalize(self, _close, (self.pipes, self.processes), exitpriority=10)

    def submit(self, index: np.ndarray, key: np.ndarray, epoch: int) -> int:
        """Have samples of an epoch read into a free block. Returns the batch's number."""
        block = self.free.pop()
        rows, number = len(index), self.submitted
        self.submitted += 1
        self.views[block]["index"][:rows] = torch.from_numpy(index)
        self.views[block]["key"][:rows] = torch.from_numpy(key)
        self.waiting[number] = (block, rows, [])
        size = part_size(rows, len(self.processes))
        for first in range(0, rows, size):
            worker = min(range(len(self.load)), key=self.load.__getitem__)
            part: Part = (number, block, first, min(first + size, rows), epoch)
            self.load[worker] += part[3] - part[2]
            try:
                self.pipes[worker].send(part)
            except OSError:
                raise self._obituary(worker) from None
        return number

    def is_ready(self, number: int) -> bool:
        """Whether `collect` would return at once."""
        self._receive(0)
        return self.waiting[number][1] == 0

    def collect(self, number: int) -> tuple[int, list[Filled]]:
        """The block of a batch and what is in it. The block is the caller's until `release`."""
        silent = 0.0
        while self.waiting[number][1]:
            # The clock is the number of slices waited, not the wall: a job that was suspended has not hung.
            silent = 0.0 if self._receive(min(SLICE, self.timeout)) else silent + min(SLICE, self.timeout)
            if silent >= self.timeout:
                raise self._hung()
        block, _, parts = self.waiting.pop(number)
        return block, sorted(parts, key=lambda part: part.first)

    def release(self, block: int) -> None:
        self.free.append(block)

    def forget(self, number: int) -> None:
        """Wait for a batch that nobody wants any more, and free its block."""
        self.release(self.collect(number)[0])

    def close(self) -> None:
        self._close()

    @property
    def is_closed(self) -> bool:
        return not self._close.still_active()

    def _receive(self, timeout: float) -> bool:
        """Take in what workers have finished; False where nothing came in time."""
        ends: dict[Any, int] = {pipe: i for i, pipe in enumerate(self.pipes)}
        ends.update((process.sentinel, i) for i, process in enumerate(self.processes))
        ready = wait(list(ends), timeout)
        pipes = [end for end in ready if isinstance(end, Connection)]
        for pipe in pipes:
            worker = ends[pipe]
            try:
                (number, _, first, stop, _), filled, error = pipe.recv()
            except (EOFError, OSError):
                raise self._obituary(worker) from None
            if error is not None:
                raise error
            self.load[worker] -= stop - first
            block, missing, parts = self.waiting[number]
            parts.append(filled)
            self.waiting[number] = (block, missing - (stop - first), parts)
        if ready and not pipes:
            raise self._obituary(ends[ready[0]])
        return bool(ready)

    def _last_sample(self, worker: int) -> str:
        index = int(self.current[worker])
        return f"sample {index} ({self.reading.source.name(index)})"

    def _obituary(self, worker: int) -> DataError:
        process = self.processes[worker]
        process.join(5)
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with exit code {code}"
        hint = "; the system kills whom memory has run out for: try fewer dataset.num_workers" if code == -signal.SIGKILL else ""
        return DataError(f"loader worker {worker} (pid {process.pid}) {how} while reading {self._last_sample(worker)}{hint}")

    def _hung(self) -> DataError:
        busy = [w for w, rows in enumerate(self.load) if rows]
        listed = "\n".join(f"  worker {w} (pid {self.processes[w].pid}): {self._last_sample(w)}" for w in busy)
        return DataError(
            f"no loader worker has finished anything for {self.timeout:g} s (dataset.worker_timeout); each is still reading:\n{listed}"
        )


@contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    number: int,
    pipe: Connection,
    others: Sequence[Connection],
    reading: Reading,
    views: list[dict[str, Tensor]],
    current: np.ndarray,
    parent: int,
) -> None:
    """A worker's life."""
    gc.freeze()  # a collection would write to every object's header and so copy the parent's memory page by page
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        # Schedulers and terminals signal the whole group; when to stop is the parent's decision.
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    for other in others:
        other.close()  # the parent's ends: as long as a sibling held one, none would see that the parent is gone
    torch.set_num_threads(1)
    reading.in_main_process = False
    while True:
        while not pipe.poll(ORPHANED):
            if os.getppid() != parent:
                return
        try:
            part: Part | None = pipe.recv()
        except (EOFError, OSError):
            return
        if part is None:
            return
        filled, error = None, None
        try:
            filled = reading.fill(views[part[1]], *part[2:], current)
        except Exception as problem:
            error = _portable(problem, number)
        try:
            pipe.send((part, filled, error))
        except BrokenPipeError:
            return


def _portable(error: Exception, worker: int) -> Exception:
    """The error in a shape that survives a pipe, with the place it came from."""
    import pickle

    where = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"in loader worker {worker}:\n{where}")
    return copy


def _close(pipes: list[Connection], processes: list[ForkProcess]) -> None:
    for pipe in pipes:
        with suppress(OSError):
            pipe.send(None)
        pipe.close()
    deadline = time.monotonic() + 1  # for a part in hand; nothing is lost with it
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


def _shared(size: int) -> Tensor:
    """Zeroed memory that forked processes share, uint8 [size]. Anonymous, so /dev/shm's limit in a container is no matter."""
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size]
