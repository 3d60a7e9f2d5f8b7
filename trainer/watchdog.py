"""The thread through which ranks know of one another while they train: who wants to stop, who has failed, who hangs.

It speaks over a CPU group of its own, twice a second, and never touches the device. It does not know what is trained.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from trainer.errors import DistributedError, TrainyardError
from trainer.vote import Ballot

if TYPE_CHECKING:
    from trainer.distributed import World

logger = logging.getLogger(__name__)

INTERVAL = 0.5  # seconds between two exchanges
GRACE = 10.0  # seconds the training thread has to end by itself once another rank has failed
ROLL_CALL = 1.5  # seconds the survivors have to answer once a rank is gone
READING = 2.0  # seconds the others have, at most, to read why: the store may end with this rank
_FAILED = "failed"  # the store's key for the first failure


class Store(Protocol):
    """What is needed of torch's key-value store."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...
    def set(self, key: str, value: str, /) -> None: ...


class RankFailed(DistributedError):
    """Another rank has failed. Ends this one with the same exit code, so that the run has one."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code  # type: ignore[misc]


class Pulse(threading.Thread):
    """`exchange` gives the maxima over all ranks of a short list of integers; it raises when a rank is gone."""

    def __init__(self, exchange: Callable[[list[int]], list[int]], store: Store, rank: int, hosts: Sequence[str], timeout: float) -> None:
        super().__init__(name="pulse", daemon=True)
        self.ballot = Ballot()
        self.rank, self.hosts, self.timeout = rank, hosts, timeout  # hosts: of each rank
        self.ticks = 0  # signs of life of the training thread
        self.watching = False
        self.failure: DistributedError | None = None  # what happened elsewhere
        self.abort: Callable[[], None] = lambda: None  # unblocks a training thread that waits for the device
        self._exchange, self._store = exchange, store
        self._failing = self._failed_here = False
        self._gone: list[int] = []  # ranks that do not speak any more
        self._leaving = False
        self._rounds = 0  # exchanges so far
        self._left = threading.Event()  # the training thread is on its way out
        self._over = threading.Event()  # no further exchange
        self._wake = threading.Event()

    # For the training thread

    def leave(self) -> None:
        """Wait until every rank is done, and end the thread."""
        self.watching, self._leaving = False, True
        self._left.set()
        self._wake.set()
        if not self._over.wait(self.timeout):
            raise DistributedError(f"rank {self.rank} was done, and other ranks were not {self.timeout:g} s later (distributed.timeout)")
        if self.failure is not None:
            raise self.failure

    @property
    def is_failing(self) -> bool:
        """Whether the training thread is on its way out with an error."""
        return self._failing

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank fails, and why; nothing where they told it."""
        self.watching, self._failing = False, True
        self._left.set()
        if self.failure is None:
            self._report(error)
            self._failed_here = True
            self._wake.set()
            self._over.wait(GRACE)
        let_read(self._store, [rank for rank in range(len(self.hosts)) if rank not in self._gone])

    def cause(self) -> DistributedError | None:
        """What has happened elsewhere, for a rank that has lost another; None if all of them are there."""
        self._left.set()
        self._wake.set()
        rounds, started = self._rounds, time.monotonic()
        while not self._over.wait(0.05):
            waited = time.monotonic() - started
            if (self._rounds >= rounds + 2 and waited > 2 * INTERVAL) or waited > self.timeout + 2 * ROLL_CALL:
                break  # everyone has spoken since, and nobody of a failure
        return self.failure

    # The thread

    def run(self) -> None:
        seen, since = self.ticks, time.monotonic()
        while True:
            asked = time.monotonic()
            try:
                heard = self._exchange([*self.ballot.say(), int(self._failed_here), int(not self._leaving)])
            except Exception as error:
                logger.debug("the pulse stops: %s", error)
                return self._end(self._first_failure() or self._roll_call(time.monotonic() - asked))
            self._rounds += 1
            *votes, failed, staying = heard
            if failed:
                return self._end(None if self._failed_here else self._first_failure() or DistributedError("another rank failed"))
            if not staying:
                self._over.set()
                return None
            again = self.ballot.hear(*votes)
            if not again:
                self._wake.wait(INTERVAL)
                self._wake.clear()
            if self.ticks != seen or not self.watching:
                seen, since = self.ticks, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                self._hangs()

    def _end(self, failure: DistributedError | None) -> None:
        """The ranks are no longer whole. See to it that this process ends."""
        have_read(self._store, self.rank)
        if failure is not None and failure.exit_code == DistributedError.exit_code:
            dump_stacks(str(failure))  # while the training thread is still where it was
        self.failure = failure
        self.ballot.abandon(str(failure))
        self._over.set()
        if failure is None:
            return
        if not self._left.wait(GRACE / 2):
            self.abort()
        if not self._left.wait(GRACE / 2):
            dump_stacks(f"rank {self.rank} does not end by itself: {failure}")
            os._exit(failure.exit_code)

    def _hangs(self) -> None:
        text = f"rank {self.rank} on {socket.gethostname()} has finished no step for {self.timeout:g} s (distributed.timeout)"
        failure = DistributedError(text)
        self._report(failure)
        have_read(self._store, self.rank)
        dump_stacks(text)
        os._exit(failure.exit_code)

    def _roll_call(self, silence: float) -> DistributedError:
        """A rank does not speak any more. Which one?"""
        missing = list(range(len(self.hosts)))
        try:
            self._store.set(f"survivor/{self.rank}", "")
            deadline = time.monotonic() + ROLL_CALL
            while missing and time.monotonic() < deadline:
                missing = [rank for rank in missing if not self._store.check([f"survivor/{rank}"])]
                time.sleep(0.1)
        except RuntimeError as error:
            return DistributedError(f"rank {self.rank} lost the others and the store that they share: {_first_line(error)}")
        self._gone = missing
        gone = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in missing)
        # The first rank whose patience ends closes its connections, which ends the others' within an interval.
        frozen = silence > self.timeout - 2 * INTERVAL
        fate = (
            f"has not answered for {self.timeout:g} s (distributed.timeout)"
            if frozen
            else "is gone without a word: killed, or out of memory"
        )
        return DistributedError(f"{gone} {fate}" if gone else "the connection between the ranks broke")

    def _report(self, error: BaseException) -> None:
        """Put the failure where every rank can read it; the first one stays."""
        text = f"rank {self.rank} of {len(self.hosts)} failed: {type(error).__name__}: {error}"
        try:
            self._store.compare_set(_FAILED, "", json.dumps([text, exit_code(error)]))
        except RuntimeError as second:  # the store went down with the rank that held it
            logger.debug("could not report %r: %s", error, second)

    def _first_failure(self) -> DistributedError | None:
        try:
            if self._store.check([_FAILED]):
                return RankFailed(*json.loads(self._store.get(_FAILED)))
        except RuntimeError as error:
            logger.debug("could not ask who failed: %s", error)
        return None


class Watchdog:
    """While entered, a rank of several that shows no sign of life for `timeout` seconds ends with exit 6 and its stacks.

    A process on its own is not watched: it may wait at a breakpoint.
    """

    def __init__(self, timeout: float, world: World) -> None:
        self._pulse = world.pulse
        if self._pulse is not None:
            self._pulse.timeout = timeout

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pulse is not None:
            self._pulse.watching = False

    def tick(self) -> None:
        """A sign of life: a step, a validation batch. The first one starts the watch, so compiling may take its time."""
        if self._pulse is not None:
            self._pulse.ticks += 1
            self._pulse.watching = True

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """For what may take longer than the timeout without a sign of life."""
        pulse = self._pulse
        watching = pulse is not None and pulse.watching
        if pulse is not None:
            pulse.watching = False
        try:
            yield
        finally:
            if pulse is not None:
                pulse.watching = watching


def have_read(store: Store, rank: int) -> None:
    """Say that this rank, which is about to end, needs the store no more."""
    try:
        store.set(f"read/{rank}", "")
    except RuntimeError as error:
        logger.debug("the store has ended: %s", error)


def let_read(store: Store, ranks: Sequence[int]) -> None:
    """Wait for those that still live: on a busy machine one may ask the store for the reason long after another did."""
    deadline = time.monotonic() + READING
    try:
        while not store.check([f"read/{rank}" for rank in ranks]) and time.monotonic() < deadline:
            time.sleep(0.05)
    except RuntimeError as error:
        logger.debug("the store has ended: %s", error)


def dump_stacks(why: str) -> None:
    """Every thread's stack on stderr."""
    stream = sys.__stderr__
    if stream is None:
        return
    print(f"\n{why}\nStacks of process {os.getpid()}:", file=stream, flush=True)
    faulthandler.dump_traceback(stream)
    stream.flush()


def stacks_on_demand() -> None:
    """Have a crash, and SIGQUIT at any time, print every thread's stack: `kill -QUIT PID` shows where a rank is."""
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
        faulthandler.register(signal.SIGQUIT, sys.__stderr__)


def exit_code(error: BaseException) -> int:
    """The code a process ends with where nothing catches `error`."""
    if isinstance(error, TrainyardError):
        return error.exit_code
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1


def _first_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
