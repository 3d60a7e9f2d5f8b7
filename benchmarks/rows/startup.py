"""How long until the command line answers. Each contender is a command, timed from outside."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks.measure import Command, race
from benchmarks.table import Effort, Line, at_least, at_most, row

CFG, TYPO, HELP = "launch.py --cfg job", "launch.py optimizer.lrr=1", "launch.py --help"
HYDRA_APP, HYDRA, TIMM = "minimal Hydra app, --cfg job", "python -c 'import hydra'", "imports of timm's train.py --help"


@row("startup", "the command line answers without importing torch")
def startup(effort: Effort) -> Iterator[Line]:
    commands = [
        _python(CFG, "launch.py", "--cfg", "job"),
        _python(TYPO, "launch.py", "optimizer.lrr=1", exit_code=2),
        _python(HELP, "launch.py", "--help"),
        _python(HYDRA_APP, "benchmarks/peers/hydra_app/app.py", "--cfg", "job"),
        _python(HYDRA, "-c", "import hydra"),
        _python(TIMM, "benchmarks/peers/timm_train_help.py", "--help"),
    ]
    times = race(commands, effort.rounds(full=15, quick=5)).scaled(1e3)
    yield at_most(times, CFG, HYDRA_APP, 2.0, unit="ms")
    yield at_most(times, TYPO, HYDRA_APP, 2.0, unit="ms", what="a mistyped override")
    yield at_most(times, HELP, HYDRA, 4.0, unit="ms")
    yield at_least(times, TIMM, CFG, 8.0, unit="ms", what="timm's, times launch.py --cfg job")
    yield at_least(times, TIMM, HELP, 8.0, unit="ms", what="timm's, times launch.py --help")


def _python(name: str, *arguments: str, exit_code: int = 0) -> Command:
    return Command(name, [sys.executable, *arguments], exit_code=exit_code)
