"""What a step frees is there for the next one: counted in page faults, in a process of its own, as it holds for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from trainer.backends import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        step = [torch.ones(2 << 20) for _ in range(20)]  # 8 MB each, 2048 pages
        del step
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
faults()
print(kept, faults())
"""


def ask(how: str, **environment: str) -> tuple[str, int]:
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "LD_PRELOAD"}
    command = [sys.executable, "-c", PROGRAM, how]
    said = subprocess.run(command, env={**surroundings, **environment}, capture_output=True, text=True, check=True).stdout.split()
    return said[0], int(said[1])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_what_is_freed_is_used_again():
    as_documented = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}  # glibc moves them as it sees fit
    assert ask("leave", **as_documented)[1] > 1000
    kept, faults = ask("keep")
    assert kept == "True"
    assert faults < 200


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_who_has_chosen_for_himself_is_left_alone():
    assert ask("keep", MALLOC_MMAP_THRESHOLD_="65536")[0] == "False"
