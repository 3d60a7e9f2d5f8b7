"""The side of a contender's process: prepare once, then measure a block for every line that arrives.

Answers go to the standard output as JSON lines; whatever the contender itself prints goes to the standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable

from benchmarks.measure import Absent


def main(function: str, options: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        measure = prepare(function, json.loads(options))
    except (Absent, ModuleNotFoundError) as reason:
        print(json.dumps({"absent": str(reason)}), file=answers, flush=True)
        return
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps({"value": measure()}), file=answers, flush=True)


def prepare(function: str, options: dict[str, object]) -> Callable[[], float]:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(**options)


if __name__ == "__main__":
    main(*sys.argv[1:])
