"""Where a run goes: into this process, into a rank for each device, or nowhere because it is finished."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainer.config import Resume, RunConfig
from trainer.errors import ConfigError, Problem
from trainer.rundir import RunDirectory, run_directory
from trainer.surroundings import ranks_to_start, surroundings, visible_gpus


def dispatch(run: RunConfig) -> int:
    """Start `run`, go on with it, or say that it is finished; the exit code.

    Raises:
        TrainyardError: with the exit code of the contract.
    """
    here = surroundings()
    if here.size > 1 and run.resume is Resume.never:
        return _train(run, None)  # the ranks agree on a new directory when they have met
    directory = RunDirectory(run_directory(run))
    if directory.is_finished():
        if here.is_main:
            report_finished(directory, run)
        return 0
    if directory.extensions():
        run = directory.read_config()
        if here.is_main:
            print("This run was extended since (python -m trainer extend); going on by its own config.yaml.")
    return run_in(run, directory)


def run_in(run: RunConfig, directory: RunDirectory) -> int:
    """Run in this directory, in this process or as ranks on this host, whatever the config's own place would be."""
    count = ranks_to_start(run.distributed)
    return _train(run, directory) if count == 1 else _start_ranks(run, directory, count)


def start(argv: Sequence[str]) -> int:
    """`python -m trainer start RUN_DIR`: be one rank of the run whose config.yaml lies there."""
    if len(argv) != 1:
        raise ConfigError(
            Problem("start", " ".join(argv), "takes one run directory", "python -m trainer start runs/<name>/<version>-<hash>")
        )
    directory = RunDirectory(argv[0])
    run = directory.read_config()
    if directory.is_finished():  # a job that ended while it was being preempted is started once more
        if surroundings().is_main:
            print(f"{directory} is finished")
        return 0
    return _train(run, directory)


def go_on(directory: RunDirectory) -> int:
    """Start, or go on with, the run whose config.yaml lies in `directory`: all of its ranks, in this process or from it."""
    run = directory.read_config()
    return 0 if directory.is_finished() else run_in(run, directory)


def report_finished(directory: RunDirectory, run: RunConfig) -> None:
    """The results of a run that is done, and whether its code or its data have changed since."""
    from trainer.data.source import fingerprints
    from trainer.environment import changes, code_state
    from trainer.log.table import show_result

    result = directory.read_result()
    assert result is not None
    print("This run is finished; resume=never starts a new one beside it.")
    show_result(result, directory.path)
    before = directory.read_environment()
    data = fingerprints(train=run.dataset.build("train"), val=run.dataset.build("val")) if before.get("data") else {}
    for change in changes(before, {"git": code_state(), "data": data}):
        print(f"warning: {change}; resume=never runs it again, beside this one", file=sys.stderr)


def _train(run: RunConfig, directory: RunDirectory | None) -> int:
    from trainer.run import train

    train(run, directory)
    return 0


def _start_ranks(run: RunConfig, directory: RunDirectory, count: int) -> int:
    """One process for each rank on this host. They start from config.yaml: nothing is composed a second time."""
    from trainer.launch.local import start_local_ranks

    directory.refuse_second_writer()
    directory.write_config(run)
    where = "one on each GPU" if visible_gpus() >= count else "on the CPU" if not visible_gpus() else f"on {visible_gpus()} GPUs"
    print(f"{count} ranks, {where}; distributed.processes=1 for a single one")
    return start_local_ranks(directory.path, count, run.distributed.max_restarts)
