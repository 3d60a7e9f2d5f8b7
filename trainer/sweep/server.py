"""A process that has imported what every job needs, and forks one process for each job: a start costs milliseconds, not seconds.

`python -m trainer.sweep.server FD` reads requests from a socket, one JSON object a line, and answers with what becomes of them:

    {"job": 3, "directory": …, "log": …, "environment": {…}, "cores": [0, 1]}  ->  {"job": 3, "pid": 17}, later {"job": 3, "code": 0}

It holds no state worth keeping, and ends, with all jobs, when the launcher that started it is gone.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from trainer.rundir import RunDirectory
from trainer.surroundings import end_with_parent

PRELOADED = ("tasks", "trainer.run", "trainer.launch.door", "trainer.launch.dispatch", "timm")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(argv: list[str], preloaded: Sequence[str] = PRELOADED, be: Callable[[RunDirectory], int] | None = None) -> int:
    """Serve until the other end of the socket closes. `be` runs one job, in its process; the default is to train. Returns in the
    server only."""
    end_with_parent()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # they are for the jobs
    with socket.socket(fileno=int(argv[0])) as line:
        for module in preloaded:
            import_module(module)
        _say(line, {"ready": os.getpid()})
        request = _serve(line)
    if request is not None:  # in a child
        _leave(_be(request, be))
    return 0


def _serve(line: socket.socket) -> dict[str, Any] | None:
    """Fork a child for every request. Returns the request, in the child; None when there will be no more."""
    waiting = selectors.DefaultSelector()
    waiting.register(line, selectors.EVENT_READ)
    parent, rest = os.getpid(), b""
    while True:
        for key, _ in waiting.select():
            if key.data is not None:  # a child has ended
                waiting.unregister(key.fd)
                os.close(key.fd)
                _, status = os.waitpid(key.data["pid"], 0)
                _say(line, {"job": key.data["job"], "code": os.waitstatus_to_exitcode(status)})
                continue
            received = line.recv(1 << 16)
            if not received:
                return None
            *lines, rest = (rest + received).split(b"\n")
            for text in lines:
                request = json.loads(text)
                pid = os.fork()
                if pid == 0:
                    waiting.close()
                    return request | {"parent": parent}
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, {"pid": pid, "job": request["job"]})
                _say(line, {"job": request["job"], "pid": pid})


def _say(line: socket.socket, message: Mapping[str, Any]) -> None:
    line.sendall(json.dumps(message).encode() + b"\n")


def _be(request: Mapping[str, Any], be: Callable[[RunDirectory], int] | None) -> int:
    """One job, in a session of its own: a signal to its group reaches its data workers and ranks, and nobody else."""
    os.setsid()
    end_with_parent(signal.SIGTERM)  # leaves the time for a checkpoint
    if os.getppid() != request["parent"]:
        return 1
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with open(request["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(request["environment"])
    if request["cores"]:
        os.sched_setaffinity(0, request["cores"])
    if be is not None:
        return be(RunDirectory(request["directory"]))
    from trainer.launch.dispatch import go_on
    from trainer.launch.guard import guarded

    return guarded(lambda: go_on(RunDirectory(request["directory"])))


def _leave(code: int) -> NoReturn:
    """End a forked process as multiprocessing does: what was promised for the end is done, but what was imported is not taken down
    object by object. That writes to every page shared with the server, which copies it: a second of a job's slot."""
    threading._shutdown()  # joins threads, and ends pools of them first; nothing public does  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the disk of the log is full: that is no failure of the job
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
