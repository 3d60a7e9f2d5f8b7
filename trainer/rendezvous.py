"""How ranks find one another. torchrun says where; for the ranks of a SLURM step or a submitit job, torch brings nothing.

There, every rank works out the same few ports from the job's name. Rank 0 listens on the first that is free and tells whoever says the
job's name the port of its key-value store, which the operating system has chosen. A stranger's server on one of the ports does
not know the name, so the search goes on.
"""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from trainer.errors import DistributedError
from trainer.surroundings import Surroundings

_PATIENCE = 1.0  # seconds given to a server to answer


def meet(here: Surroundings, timeout: timedelta) -> dist.Store:
    """The store that all ranks share."""
    if here.store_port:
        return _settled(here, timeout)
    if here.rank == 0:
        return _host(here, timeout)
    return dist.TCPStore(here.address, _find(here, timeout), is_master=False, timeout=timeout)


def _settled(here: Surroundings, timeout: timedelta) -> dist.Store:
    """torchrun has said where: its agent's own store, or one for rank 0 to open."""
    hosts = here.rank == 0 and not here.agent_store
    try:
        return dist.TCPStore(here.address, here.store_port, is_master=hosts, wait_for_workers=False, timeout=timeout)
    except dist.DistNetworkError as error:
        if hosts and "EADDRINUSE" in str(error):
            raise DistributedError(
                f"MASTER_PORT={here.store_port} is taken on {here.address}: choose another, or let torchrun choose with --standalone"
            ) from error
        raise


def _host(here: Surroundings, timeout: timedelta) -> dist.Store:
    store = dist.TCPStore(here.address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    server = _listen(here)
    answer = f"{here.job} {store.port}\n".encode()
    threading.Thread(target=_tell, args=(server, f"{here.job}\n".encode(), answer, here.size - 1), daemon=True).start()
    return store


def _listen(here: Surroundings) -> socket.socket:
    for port in here.ports:
        try:
            return socket.create_server(("", port), backlog=1024)
        except OSError:
            continue
    raise DistributedError(
        f"none of {len(here.ports)} ports on {here.address} is free ({', '.join(map(str, here.ports))}): end what listens there, or start the ranks with torchrun"
    )


def _tell(server: socket.socket, name: bytes, answer: bytes, askers: int) -> None:
    """Answer as many as know the name; then nobody is left to ask."""
    with server:
        while askers:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(_PATIENCE)
                try:
                    if connection.makefile("rb").readline(256) == name:
                        connection.sendall(answer)
                        askers -= 1
                except OSError:
                    continue


def _find(here: Surroundings, timeout: timedelta) -> int:
    """The port of rank 0's store."""
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        for port in here.ports:
            try:
                with socket.create_connection((here.address, port), timeout=_PATIENCE) as connection:
                    connection.sendall(f"{here.job}\n".encode())
                    name, _, answer = connection.makefile("rb").readline(256).decode(errors="replace").strip().rpartition(" ")
            except OSError:
                continue
            if name == here.job and answer.isdigit():
                return int(answer)
        time.sleep(0.1)
    raise DistributedError(
        f"rank {here.rank} found no rank 0 of job {here.job} on {here.address} within {timeout.total_seconds():g} s (distributed.timeout)"
    )
