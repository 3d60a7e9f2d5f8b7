"""How ranks agree to stop at the same step: a ballot held in the background, off the device and off the training thread.

Every rank counts the boundaries it comes to; all ranks come to the same ones in the same order. Twice a second the ranks'
background threads (`trainer.watchdog.Pulse`) exchange what their ballots say. Once one has been told to stop, a boundary a little
ahead of the foremost rank is proposed. A rank agrees by promising to wait at that boundary, should it get there, until the ranks
have spoken once more, or refuses because it is past it already; then one further ahead is proposed. So the agreement takes
half a second and a step or two, however long or uneven the steps are, and the training thread pays an addition and a comparison.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer.errors import DistributedError

if TYPE_CHECKING:
    from trainer.distributed import World

NEVER = sys.maxsize


class StopVote:
    """Whether all ranks stop here. `told` gives this rank's own reason, 0 for none; the greatest of all ranks' is agreed on.

    Every rank must call `poll` equally often, between the same collectives: after each step, or each round of a validation
    in which a rank that has run out of batches still takes part.
    """

    def __init__(self, world: World, told: Callable[[], int]) -> None:
        if world.pulse is None:
            self._ask: Callable[[], int] = told
            return
        world.pulse.ballot.told = told
        self._ask = world.pulse.ballot.arrive

    def poll(self, step: int) -> int:
        """0 to go on, or the reason to stop at this boundary, the same on every rank; from then on always that reason."""
        return self._ask()


class Ballot:
    """One rank's part in the agreement. `arrive` belongs to the training thread, `say` and `hear` to the background thread."""

    def __init__(self) -> None:
        self.told: Callable[[], int] = lambda: 0
        self.arrived = 0  # boundaries the training thread has come to
        self.stop_at = NEVER  # the boundary proposed, and later agreed on
        self.reason = 0  # agreed on, once it is not 0
        self.broken = ""  # why there will be no agreement any more
        self._proposed = 0  # the reason that goes with the proposal
        self._margin = 1  # boundaries between the foremost rank and the next proposal
        self._news = threading.Condition()

    def arrive(self) -> int:
        # The order matters: counting before looking, as `hear` proposes before `say` counts. Either this thread sees the
        # proposal in time, or the other thread sees that it came too late.
        self.arrived += 1
        if self.arrived < self.stop_at:
            return 0
        return self.reason or self._await_the_verdict()

    def _await_the_verdict(self) -> int:
        with self._news:
            while not self.reason and self.arrived >= self.stop_at:
                if self.broken:
                    raise DistributedError(self.broken)
                self._news.wait(timeout=1.0)  # a signal handler of this thread gets its turn
        return self.reason

    def say(self) -> tuple[int, int, int]:
        """(reason, boundary, refusal), to be combined with the other ranks' by taking the maximum of each."""
        return self.told(), self.arrived, int(self.arrived >= self.stop_at)

    def hear(self, reason: int, foremost: int, refused: int) -> bool:
        """Take in the maxima over all ranks. True if the ranks should speak again at once."""
        if self.reason:
            return False
        if self.stop_at == NEVER:
            if not reason:
                return False
        elif not refused:
            with self._news:
                self.reason = self._proposed
                self._news.notify_all()
            return False
        else:
            self._margin *= 2  # the steps are faster than the exchange
        self._proposed = max(self._proposed, reason)
        with self._news:  # a training thread that waits at the boundary refused goes on
            self.stop_at = foremost + self._margin
            self._news.notify_all()
        return True

    def abandon(self, why: str) -> None:
        """The ranks can no longer speak to one another; a training thread that waits for them gives up."""
        with self._news:
            self.broken = why
            self._news.notify_all()
