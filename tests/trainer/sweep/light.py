"""The pool's server without torch: its jobs do what the file `job` in their run directory says, and note that they ran."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time

from trainer.errors import Diverged, Interrupted, Stopped
from trainer.launch.guard import guarded
from trainer.rundir import RunDirectory
from trainer.sweep import server

SERVER = [__file__]
SCRIPT, RAN, CORES, LEFT = "job", "ran", "cores", "left"


def die_after_writing(files: int) -> None:
    """From now on this process is killed as soon as it has put so many files in their places, as if power had failed between two."""
    count, replace = 0, os.replace

    def counting(*arguments, **more):
        nonlocal count
        replace(*arguments, **more)
        count += 1
        if count == files:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counting


def be(directory: RunDirectory) -> int:
    return guarded(lambda: _be(directory))


def _be(directory: RunDirectory) -> int:
    if directory.is_finished():
        return 0
    script = directory.path / SCRIPT
    what, _, argument = (script.read_text() if script.exists() else "work 0").partition(" ")
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda n, frame: told.append(n))
    with directory.claim():
        with (directory.path / RAN).open("a") as file:
            file.write(f"{time.time()}\n")
        (directory.path / CORES).write_text(f"{sorted(os.sched_getaffinity(0))} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        if what == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise RuntimeError("the weights are gone")
        if what == "promise":
            atexit.register((directory.path / LEFT).write_text, "at the end")
            threading.Timer(0.2, print, ["a thread has ended"]).start()
        if what == "diverge":
            raise Diverged("nan")
        for step in range(int(argument) if what == "count" else 0):
            time.sleep(0.05)
            directory.status("running", step=step + 1)
            directory._write_status()  # as a heartbeat does, every five seconds
        end = time.monotonic() + (60 if what == "after" else 0 if what == "count" else float(argument or 0))
        while time.monotonic() < end and not (what == "after" and (directory.path.parent / argument / RAN).exists()):
            time.sleep(0.01)
            directory.status("running", step=100)
            if told:
                time.sleep(1.0 if what == "save" else 0)
                raise (Interrupted if signal.SIGINT in told else Stopped)("told to stop")
        directory.result_path.write_text('{"metric": "val/top1", "mode": "max", "best": {"val/top1": 0.5}}')
        directory.status("completed")
    return 0


if __name__ == "__main__":
    sys.exit(server.main(sys.argv[1:], (), be))
