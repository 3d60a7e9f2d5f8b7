"""Strikes the process at a chosen point of writing a checkpoint, so that tests can show that no point is dangerous.

TRAINYARD_CHECKPOINT_FAULT=<point>:<kill|pause|SECONDS>[:<n>], at the n-th passing or at all of them. The points, in order: write,
sync, verify, previous, sidecar, rename, prune. Does nothing where the variable is not set.
"""

from __future__ import annotations

import os
import signal
import time

_passings: dict[str, int] = {}


def strike(point: str) -> None:
    """Fail here, if the variable says so."""
    wanted = os.environ.get("TRAINYARD_CHECKPOINT_FAULT")
    if not wanted:
        return
    at, action, *nth = wanted.split(":")
    if at != point:
        return
    _passings[point] = _passings.get(point, 0) + 1
    if nth and _passings[point] != int(nth[0]):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600 if action == "pause" else float(action))
