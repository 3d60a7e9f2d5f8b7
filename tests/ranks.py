"""Ranks for tests: what they do, in processes of their own, and what became of each."""

from __future__ import annotations

import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import SERVER, free_port


@dataclass(frozen=True)
class Outcome:
    code: int | None  # of the process; -n: ended by signal n
    value: Any  # what the program returned
    output: str  # stdout and stderr
    seconds: float  # from the start of the first rank to the end of this one


def torchrun_environments(size: int, port: int | None = None) -> list[dict[str, str]]:
    """What torchrun would set on one host."""
    port = port or free_port()
    return [
        {"RANK": str(r), "WORLD_SIZE": str(size), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for r in range(size)
    ]  # fmt: skip


def slurm_environments(size: int, job: int = 4711) -> list[dict[str, str]]:
    """What srun would set for a step of `size` tasks on this host."""
    return [
        {"SLURM_PROCID": str(r), "SLURM_NTASKS": str(size), "SLURM_LOCALID": str(r), "SLURM_STEP_ID": "0", "SLURM_JOB_ID": str(job),
         "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_TASKS_PER_NODE": str(size), "SLURM_NODEID": "0"}
        for r in range(size)
    ]  # fmt: skip


def run_ranks(
    program: Callable[..., Any],
    environments: Sequence[Mapping[str, str]],
    directory: Path,
    *arguments: Any,
    timeout: float = 60.0,
    frozen: int | None = None,
) -> list[Outcome]:
    """Run `program(*arguments)` as each of the ranks, to its end; a `frozen` rank is not waited for."""
    directory.mkdir(exist_ok=True)
    started = time.monotonic()
    ends: dict[int, float] = {}
    ranks = [
        SERVER.Process(target=_be_rank, args=(program, dict(e), str(directory / f"rank{r}"), arguments)) for r, e in enumerate(environments)
    ]
    for rank in ranks:
        rank.start()
    while len(ends) < len(ranks) - (frozen is not None) and time.monotonic() - started < timeout:
        ends |= {r: time.monotonic() - started for r, rank in enumerate(ranks) if r not in ends and not rank.is_alive()}
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.join()
    return [Outcome(rank.exitcode, *_left_behind(directory / f"rank{r}"), ends.get(r, timeout)) for r, rank in enumerate(ranks)]


def _left_behind(stem: Path) -> tuple[Any, str]:
    value = stem.with_suffix(".pickle")
    return pickle.loads(value.read_bytes()) if value.exists() else None, stem.with_suffix(".txt").read_text()


def _be_rank(program: Callable[..., Any], environment: dict[str, str], stem: str, arguments: tuple[Any, ...]) -> None:
    from trainer.watchdog import exit_code

    os.environ.update({"OMP_NUM_THREADS": "1"} | environment)
    with open(f"{stem}.txt", "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    try:
        value = program(*arguments)
        Path(f"{stem}.pickle").write_bytes(pickle.dumps(value))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(exit_code(error))
    os._exit(0)


# What ranks do


def distributed(timeout: float = 30.0) -> Any:
    from trainer.config import DistributedConfig, Mode

    return DistributedConfig(mode=Mode.auto, timeout=timeout)


def collectives() -> dict[str, Any]:
    """Every way to speak."""
    import torch

    from trainer.distributed import open_world

    with open_world(distributed(), cuda=False) as world:
        mine = torch.full((2, 2), float(world.rank))
        counts, flag = torch.tensor([2**53 + world.rank]), torch.tensor(world.rank, dtype=torch.int32)  # float64 could not count that far
        facts = {
            "place": (world.rank, world.size, world.local_rank, world.local_size, world.is_main, world.device.type),
            "threads": (world.cores, torch.get_num_threads()),
            "sum": world.sum(mine).tolist(),
            "kept": mine.tolist(),
            "sums": [t.tolist() for t in world.sums([mine, counts, mine[0] * 2, flag])],
            "gather": world.gather({"rank": world.rank}),
            "broadcast": world.broadcast(f"from {world.rank}"),
        }
        world.barrier()
    return facts


def steps(count: int, seconds: float, what: str = "", at: int = 0, timeout: float = 30.0, who: int = 1) -> dict[str, Any]:
    """A training loop reduced to its skeleton. Rank `who` does `what` after step `at`."""
    import torch

    from trainer.distributed import open_world
    from trainer.errors import DataError
    from trainer.signals import StopSignals
    from trainer.vote import StopVote
    from trainer.watchdog import Watchdog

    told_at, reason, step = 0.0, 0, 0
    draw = random.Random(os.environ.get("RANK"))
    with StopSignals() as signals, open_world(distributed(timeout), cuda=False) as world:
        vote, watchdog = StopVote(world, signals.told), Watchdog(timeout, world)
        for step in range(count):
            if seconds:
                time.sleep(seconds * draw.uniform(0.5, 1.5))
            world.sum(torch.ones(1))
            watchdog.tick()
            if step == at and world.rank == who:
                told_at = time.time()
                if what.startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, what))
                elif what == "hang":
                    time.sleep(1000)
                elif what == "raise":
                    raise DataError("a picture of rank 1 is torn")
                elif what == "bug":
                    raise ZeroDivisionError("1/0 on rank 1")
            if reason := vote.poll(step):
                break
        return {"step": step, "reason": reason, "told": told_at, "stopped": time.time()}


def steps_beside_a_slow_rank(*arguments: Any) -> dict[str, Any]:
    """`steps`, where the last rank asks why another failed a second later than it could."""
    from trainer.watchdog import Pulse

    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        ask = Pulse._first_failure

        def ask_late(self: Pulse) -> Any:
            time.sleep(1.0)
            return ask(self)

        Pulse._first_failure = ask_late
    return steps(*arguments)


if __name__ == "__main__":  # python -m tests.ranks count seconds what at: the same for launchers, which start programs
    print(f"rank {os.environ.get('RANK')} attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", flush=True)
    _count, _seconds, _what, _at = sys.argv[1:]
    if _what == "SIGKILL once":
        _what = "SIGKILL" if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else ""
    assert collectives()["sums"][1] == [int(os.environ["WORLD_SIZE"]) * 2**53 + sum(range(int(os.environ["WORLD_SIZE"])))]
    print(steps(int(_count), float(_seconds), _what, int(_at)), flush=True)
