"""The pool's server for searches, without torch: a job's score follows from its config.yaml, one validation after another."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time

from tests.trainer.sweep.light import RAN
from trainer.errors import Diverged, Pruned, Stopped
from trainer.launch.guard import guarded
from trainer.rundir import RunDirectory
from trainer.sweep import server

VALIDATIONS = 5
SLOW = "LIGHT_SECONDS"  # of a validation of a bad trial


def score(rate: float, dropped: float) -> float:
    """Best, 1.0, at a rate of 1e-2 without dropping anything."""
    return 1.0 - 0.2 * abs(math.log10(rate) + 2) - dropped


def be(directory: RunDirectory) -> int:
    return guarded(lambda: _be(directory))


def _be(directory: RunDirectory) -> int:
    if directory.is_finished():
        return 0
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, frame: told.append(n))
    run = directory.read_config()
    reached = score(run.optimizer.lr, getattr(run.model, "drop_rate", None) or 0.0)
    with directory.claim():
        with (directory.path / RAN).open("a") as file:
            file.write(f"{time.time()}\n")
        if run.optimizer.weight_decay == 0.5:
            raise Diverged("nan")
        directory.metrics_path.write_text("")
        for step in range(1, VALIDATIONS + 1):
            value = reached * step / VALIDATIONS
            with directory.metrics_path.open("a") as record:
                record.write(json.dumps({"step": step, "val/top1": value}) + "\n")
            end = time.monotonic() + (float(os.environ.get(SLOW, "0")) if reached < 0.5 else 0.0)
            while not told and time.monotonic() < end:
                time.sleep(0.01)
            if told:
                why = directory.asked_to_prune()
                directory.status("pruned" if why else "preempted", reason=why or "told to stop")
                raise Pruned(why) if why else Stopped("told to stop")
        directory.result_path.write_text(json.dumps({"metric": "val/top1", "mode": "max", "best": {"val/top1": reached}}))
        directory.status("completed")
    return 0


if __name__ == "__main__":
    sys.exit(server.main(sys.argv[1:], (), be))
