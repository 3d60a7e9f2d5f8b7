"""Who am I among the ranks, and how do they speak? A plain process, torchrun, a SLURM step and submitit all answer here.

gloo between CPUs, NCCL between GPUs; always a gloo group for objects, and another for the background `Pulse`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from trainer.config.run import DistributedConfig
from trainer.errors import DistributedError, Interrupted, Stopped, TrainyardError
from trainer.rendezvous import meet
from trainer.surroundings import Surroundings, die_with_parent, granted_cores, surroundings, usable_cores
from trainer.watchdog import Pulse, RankFailed, dump_stacks, exit_code, have_read, let_read, stacks_on_demand

_worlds = itertools.count()  # opened by this process: one run after the other, in a sweep
_LINGER = 15.0  # seconds a failed rank has to end in good order before it ends at once


@dataclass(frozen=True)
class World:
    """This rank among all ranks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # ranks on this host
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cores: int = 1  # this rank's share of the host's cores
    pulse: Pulse | None = field(default=None, repr=False, compare=False)  # None for a rank on its own

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in a tensor of its own; the tensor itself where there is one rank."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Many small tensors in one message for each (data type, device): six messages cost three times as much as one."""
        if self.size == 1:
            return list(tensors)
        summed: list[Tensor] = list(tensors)
        for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):  # not a set: its order differs from rank to rank
            places = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == kind]
            packed = torch.cat([tensors[i].detach().reshape(-1) for i in places])
            dist.all_reduce(packed)
            for i, part in zip(places, packed.split([tensors[i].numel() for i in places]), strict=True):
                summed[i] = part.view(tensors[i].shape)
        return summed

    def gather(self, item: Any) -> list[Any]:
        """Every rank's object, in the order of ranks, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Any) -> Any:
        """Rank 0's object."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def align(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the main rank's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Wait for every rank. On the CPU: what the devices have queued goes on."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))

    def fail(self, error: BaseException) -> BaseException:
        """This rank cannot go on: tell the others why, or learn from them what has happened. Returns the error to end with.

        `open_world` does so in the end; calling it where the error is caught spares the others the time that lies between.
        """
        pulse = self.pulse
        if pulse is None or pulse.is_failing or isinstance(error, Stopped | Interrupted):
            return error
        known = self._cause(error, pulse) if is_communication(error) else error
        _end_within(_LINGER, exit_code(known))
        pulse.fail(known)
        if not isinstance(known, RankFailed):
            get_error_handler().record_exception(known)  # where torchrun or our launcher asked for it
        return known

    def _cause(self, error: BaseException, pulse: Pulse) -> BaseException:
        cause = pulse.cause()
        if cause is None:
            cause = DistributedError(f"rank {self.rank} of {self.size} waited for the others in vain: {error}")
            dump_stacks(str(cause))
        return cause


@contextmanager
def open_world(cfg: DistributedConfig, *, cuda: bool | None = None) -> Iterator[World]:
    """Meet the other ranks, if there are any; leave together, or all fail together.

    Args:
        cuda: compute on GPUs; None where there are some.

    Raises:
        DistributedError: a rank could not be reached, died or hung. Its exit code is that of the first rank that failed.
    """
    die_with_parent()
    here = surroundings()
    cuda = torch.cuda.is_available() if cuda is None else cuda
    if here.size == 1:
        torch.set_num_threads(_threads(usable_cores(), here))
        yield World(device=_device(here.local_rank) if cuda else torch.device("cpu"), cores=usable_cores())
        return
    stacks_on_demand()
    world = _join(here, cfg, cuda)
    assert world.pulse is not None
    stopped: TrainyardError | None = None
    try:
        try:
            yield world
        except (Stopped, Interrupted) as error:  # agreed on, so no rank has failed
            stopped = error
        world.pulse.leave()
    except BaseException as error:
        known = world.fail(error)
        if world.device.type == "cpu" and dist.is_initialized():
            dist.destroy_process_group()  # closes the connections: ranks that wait for this one learn it now
        if known is error:
            raise
        raise known from error
    dist.destroy_process_group()
    if stopped is not None:
        raise stopped


@dataclass(frozen=True)
class _Facts:
    """What a rank tells the others before they form a group."""

    host: str
    cpus: list[int]
    granted: float  # cores the container grants all of its processes
    gpu: str | None  # its UUID: ranks that are each given one GPU all call it cuda:0


def _join(here: Surroundings, cfg: DistributedConfig, cuda: bool) -> World:
    """Meet, say who is where, form the groups."""
    timeout = timedelta(seconds=cfg.timeout)
    device = _device(here.local_rank) if cuda else torch.device("cpu")
    try:
        # torch's agent keeps its store when it starts the ranks again, with the addresses of the dead in it.
        store = dist.PrefixStore(f"trainyard/{here.job}/{next(_worlds)}", meet(here, timeout))
        mine = _Facts(
            socket.gethostname(),
            sorted(os.sched_getaffinity(0)),
            granted_cores(),
            str(torch.cuda.get_device_properties(device).uuid) if cuda else None,
        )
        facts = _exchange_facts(store, here, mine, cfg.timeout)
        backend = _backend(facts, here.rank)
        # NCCL ends the process on its own timeout without a word; the watchdog's is to come first.
        dist.init_process_group(
            backend, store=store, rank=here.rank, world_size=here.size, timeout=timeout + timedelta(seconds=60) if cuda else timeout
        )
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    except (RuntimeError, OSError) as error:
        raise DistributedError(f"rank {here.rank} of {here.size} could not join the others through {here.address}: {error}") from error
    cores = _share_of_cores(facts, here.rank)
    torch.set_num_threads(_threads(cores, here))
    pulse = Pulse(lambda values: _maxima(values, group), store, here.rank, [f.host for f in facts], cfg.timeout)
    if "nccl" in backend:
        pulse.abort = _abort_nccl
    pulse.start()
    local_size = sum(f.host == mine.host for f in facts)
    return World(here.rank, here.size, here.local_rank, local_size, device, cores, pulse)


def _exchange_facts(store: dist.Store, here: Surroundings, mine: _Facts, timeout: float) -> list[_Facts]:
    keys = [f"facts/{rank}" for rank in range(here.size)]
    store.set(keys[here.rank], json.dumps(mine.__dict__))
    deadline, pause = time.monotonic() + timeout, 0.02
    # Asking again and again, as a wait that has timed out leaves the store unable to say who is missing.
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            have_read(store, here.rank)
            let_read(store, [rank for rank in range(here.size) if rank not in missing])
            raise DistributedError(
                f"rank {here.rank} waited {timeout:g} s (distributed.timeout) for rank {', '.join(map(str, missing))} to start: "
                "look into their logs"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return [_Facts(**json.loads(text)) for text in store.multi_get(keys)]


def _backend(facts: Sequence[_Facts], rank: int) -> str:
    without = [i for i, f in enumerate(facts) if f.gpu is None]
    if len(without) == len(facts):
        return "gloo"
    if without:
        raise DistributedError(
            f"rank {without[0]} on {facts[without[0]].host} sees no GPU, others do: give every rank one, or hide them all with CUDA_VISIBLE_DEVICES="
        )
    if len({(f.host, f.gpu) for f in facts}) == len(facts):
        return "cpu:gloo,cuda:nccl"
    if rank == 0:
        warnings.warn("several ranks share a GPU: they speak over gloo, as NCCL refuses; this is slow", stacklevel=2)
    return "gloo"


def _share_of_cores(facts: Sequence[_Facts], rank: int) -> int:
    """Cores for this rank where those of a host may be bound to ranks, shared by all, or anything between."""
    mine = facts[rank]
    here = [f for f in facts if f.host == mine.host]
    share = sum(1 / sum(cpu in f.cpus for f in here) for cpu in mine.cpus)
    return max(1, int(min(share, mine.granted / len(here)) + 1e-6))  # sums of thirds fall short of whole numbers


def _threads(cores: int, here: Surroundings) -> int:
    """Threads for torch's CPU operators: the user's OMP_NUM_THREADS, else one a core."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    # torchrun sets 1 for several ranks on a host where the user has set nothing.
    from_torchrun = chosen == "1" and here.launcher == "torchrun" and here.local_size > 1
    return int(chosen) if chosen.isdigit() and not from_torchrun else cores


def _device(local_rank: int) -> torch.device:
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _maxima(values: list[int], group: dist.ProcessGroup) -> list[int]:
    box = torch.tensor(values)  # [len(values)] int64
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=group)
    return box.tolist()


def _abort_nccl() -> None:
    assert dist.group.WORLD is not None
    dist.group.WORLD._get_backend(torch.device("cuda")).abort()


# How it ends badly


_COMMUNICATION = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|process ?group|tcpstore|socket", re.IGNORECASE)


def is_communication(error: BaseException) -> bool:
    """Whether an error comes from speaking to other ranks. gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _COMMUNICATION.search(str(error)) is not None)


def _end_within(seconds: float, code: int) -> None:
    """A failed rank must not live on because something waits at its end: a connection, a thread."""

    def end() -> None:
        dump_stacks(f"this failed rank has not ended within {seconds:g} s")
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
