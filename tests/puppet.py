"""A rank without torch, for tests of the launcher: it writes down what it was given and does as it is told.

python tests/puppet.py DIRECTORY WHAT [RANK]: what rank RANK does; the others do what it is for them to do then.
"""

import os
import signal
import sys
import time
from pathlib import Path

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
directory, what, who = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1
mine = who == RANK
got: list[int] = []


def write(name: str, text: str = "") -> None:
    (directory / f"{name}.{RANK}.{ATTEMPT}").write_text(text)


def wait_for(*numbers: int, seconds: float = 60.0) -> int:
    """The first of these signals; all that come are written down."""
    write("ready")
    end = time.monotonic() + seconds
    while not any(number in numbers for number in got):
        if time.monotonic() > end:
            sys.exit("nothing came")
        time.sleep(0.01)
    time.sleep(0.3)  # for one that comes twice
    write("got", " ".join(signal.Signals(n).name for n in got))
    return next(n for n in got if n in numbers)


if what != "unprepared":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda n, frame: got.append(n))
write("pid", str(os.getpid()))
write("env", "\n".join(f"{k}={v}" for k, v in os.environ.items()))
print(f"rank {RANK} says hello", flush=True)

if what.startswith("exit "):  # exit CODE [CODE of the others]
    codes = [int(code) for code in what.split()[1:]]
    time.sleep(0 if mine else 0.3)
    sys.exit(codes[0] if mine else codes[-1])
elif what == "die once":
    if mine and ATTEMPT == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(6 if ATTEMPT == 0 else 0)
elif what == "die":
    if mine:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(6)
elif what == "complain":
    if mine:
        raise ValueError("this rank is not well")
    time.sleep(0.5)
    sys.exit(1)
elif what == "stop":  # as a run stops: told, it ends with 75 or 130, and the rank that saves takes its time
    number = wait_for(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    if mine:
        time.sleep(1)
        write("saved")
    sys.exit(130 if number == signal.SIGINT else 75)
elif what == "hang":  # one fails, the other does not notice
    if mine:
        time.sleep(0.5)
        sys.exit(3)
    write("ready")
    time.sleep(60)
elif what in ("unprepared", "endless"):
    write("ready")
    while True:
        time.sleep(0.1)
