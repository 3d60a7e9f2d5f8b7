"""Why a job failed, and whether starting it again can help: the policy of `python -m trainer retry`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from enum import Enum

from trainer.config import RunConfig
from trainer.rundir import RunDirectory


class Cause(Enum):
    """Kinds of failure, by what can be done."""

    memory = "out of memory"
    node = "its node failed, or a rank was lost"
    time = "ran out of time"
    storage = "the disk"
    divergence = "diverged"
    data = "bad data"
    configuration = "the configuration"
    code = "an error in the code"


_SIGNS = (  # the first that is found in the reason decides
    # Not what a lost rank's neighbours guess ("killed, or out of memory"): its node is the likelier reason, and SLURM says if it is not.
    (Cause.memory, r"does not fit into the memory|(?<!killed, or )out of memory|OUT_OF_MEMORY|exceeded memory limit|OutOfMemory"),
    (Cause.divergence, r"^Diverged\b"),
    (Cause.data, r"^DataError\b"),
    (Cause.storage, r"^StorageError\b"),
    (Cause.node, r"NODE_FAIL|BOOT_FAIL|is gone without a word|its process is gone|killed by SIG(TERM|HUP|KILL|BUS)"),
    (Cause.time, r"TIMEOUT|DEADLINE|hydra\.launcher\.max_requeues"),
    (Cause.configuration, r"^ConfigError\b"),
    (Cause.node, r"^(DistributedError|RankFailed)\b"),
)
_HOPELESS = (Cause.divergence, Cause.data, Cause.configuration, Cause.code)


@dataclass(frozen=True)
class Remedy:
    """What `retry` does about a failure."""

    cause: Cause
    held: str | None = None  # why it is not started again
    told: str = ""  # what is changed, in words
    accumulate: int | None = None
    exclude: str | None = None  # a node
    timeout_min: int | None = None


def cause_of(reason: str | None) -> Cause:
    """What kind of failure a reason describes; an exception that nobody foresaw is the code's."""
    return next((cause for cause, sign in _SIGNS if re.search(sign, reason or "", re.MULTILINE)), Cause.code)


def remedy(
    reason: str | None,
    directory: RunDirectory,
    *,
    ranks: int = 1,
    nodes: int = 1,
    timeout_min: int | None = None,
    failed_node: str | None = None,
) -> Remedy:
    """How to go about a failed job. `ranks`, `nodes` and `timeout_min` are what it had, `failed_node` what SLURM says of it."""
    cause = cause_of(reason)
    if cause in _HOPELESS:
        return Remedy(cause, held=f"{cause.value}, which starting it again does not mend: {reason}")
    if cause is Cause.memory:
        run = directory.read_config()
        accumulate = smaller_pieces(run, run.distributed.processes or ranks)
        if accumulate is None:
            return Remedy(cause, held=f"{cause.value} with one image at a time already: {reason}")
        return Remedy(cause, told=f"loop.accumulate={accumulate}: half the micro-batch, the same batch", accumulate=accumulate)
    if cause is Cause.node:
        found = re.search(r"rank \d+ on ([\w.-]+) is gone", reason or "")
        host = directory.read_status().get("host") if nodes == 1 else None  # of several, the first rank's may be the healthy one
        node = found.group(1) if found else failed_node or host
        return Remedy(cause, told=f"without {node}" if node else "", exclude=node)
    if cause is Cause.time and timeout_min is not None and not directory.has_checkpoint():
        return Remedy(cause, told=f"with {2 * timeout_min} minutes, as it got nowhere in {timeout_min}", timeout_min=2 * timeout_min)
    return Remedy(cause, told="from its last checkpoint" if directory.has_checkpoint() else "")


def smaller_pieces(run: RunConfig, ranks: int = 1) -> int | None:
    """The next `loop.accumulate` that cuts the batch evenly into pieces of half the size; None where they cannot be halved."""
    size, pieces = run.loop.batch_size, ranks * run.loop.accumulate
    return next((n // ranks for n in range(2 * pieces, size + 1) if n % ranks == 0 and size % n == 0), None)


def with_accumulate(run: RunConfig, accumulate: int) -> RunConfig:
    return dataclasses.replace(run, loop=dataclasses.replace(run.loop, accumulate=accumulate))
