"""Runs in processes of their own, started from a server that has imported torch once: a start costs milliseconds, not seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trainer.run", "timm", "tasks", "tests.processes"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_job(directory: str, overrides: Sequence[str], environment: dict[str, str], any_task: bool) -> None:
    """One process of a run, as `python -m trainer start` would be: the exit code is the contract's."""
    os.environ.update(environment)
    log = Path(f"{directory}.{environment.get('RANK', '0')}.log")
    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        import tasks  # noqa: F401
        from tests.any_task import with_any_task
        from trainer.launch.compose import checked, compose, compose_run
        from trainer.launch.guard import guarded
        from trainer.run import train
        from trainer.rundir import RunDirectory

        def job() -> int:
            if any_task:  # what is wrong with the run as it stands is that its own task cannot use the data
                made, _ = checked(compose(overrides))
                assert made is not None
                train(with_any_task(made), RunDirectory(directory))
            else:
                train(compose_run(*overrides), RunDirectory(directory))
            return 0

        try:
            code = guarded(job)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)


def start(
    directory: Path,
    overrides: Sequence[str],
    *,
    rank: int = 0,
    size: int = 1,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
    any_task: bool = False,
) -> multiprocessing.Process:
    environment = {"OMP_NUM_THREADS": "1", **(environment or {})}
    if size > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    directory.parent.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=run_job, args=(str(directory), list(overrides), environment, any_task))
    process.start()
    return process  # pyright: ignore[reportReturnType]


def start_ranks(
    directory: Path, overrides: Sequence[str], size: int, environment: Mapping[str, str] | None = None, *, any_task: bool = False
) -> list[multiprocessing.Process]:
    port = free_port()
    return [
        start(directory, overrides, rank=rank, size=size, port=port, environment=environment, any_task=any_task) for rank in range(size)
    ]


def finish(processes: Sequence[multiprocessing.Process], timeout: float = 120.0) -> list[int | None]:
    """The exit codes. Whoever is not done in `timeout` seconds is killed, and its code is -9."""
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def logs(directory: Path) -> str:
    return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(directory.parent.glob(f"{directory.name}.*.log")))
