"""One rank of a job on SLURM that trains nothing: it does what the file `job` in its run directory says, or what a search asks
for. `light_job.py RUN_DIR`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import trainer
from tests.trainer.sweep import light, light_search
from trainer.rundir import RunDirectory

if __name__ == "__main__":
    directory = RunDirectory(sys.argv[1])
    rank = int(os.environ["SLURM_PROCID"])
    (directory.path / f"rank{rank}").write_text(f"{os.environ['SLURMD_NODENAME']} {os.environ.get('SLURM_RESTART_COUNT', 0)} {os.getpid()}")
    (directory.path / f"end{rank}").write_text(os.environ.get("SLURM_JOB_END_TIME", ""))
    (directory.path / "code").write_text(str(trainer.__file__))
    if rank == 0:
        sys.exit((light if (directory.path / light.SCRIPT).exists() else light_search).be(directory))
    told: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, frame: told.append(number))
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    while not (told or Path(directory.result_path).exists()):
        time.sleep(0.05)
    sys.exit(75 if told else 0)
