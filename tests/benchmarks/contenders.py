"""Contenders whose figures are known, to test the harness with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


def constant(value: float, journal: str = "") -> Callable[[], float]:
    """Always `value`; writes its process and its turn into `journal`."""

    def block() -> float:
        print("noise on the standard output must not reach the harness")
        if journal:
            with Path(journal).open("a") as file:
                file.write(f"{value:g} {os.getpid()}\n")
        return value

    return block


def missing() -> Callable[[], float]:
    import a_package_that_nobody_has  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]

    return a_package_that_nobody_has.block


def broken() -> Callable[[], float]:
    def block() -> float:
        sys.exit("something gave way")

    return block


def environment(name: str) -> Callable[[], float]:
    return lambda: float(os.environ[name])
