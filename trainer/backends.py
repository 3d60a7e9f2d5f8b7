"""Process-wide switches: torch's, and those of the heap it works on."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from trainer.config import RunConfig

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 32 << 20  # bytes; glibc takes no larger one, and blocks beyond it are mapped and unmapped as before
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "LD_PRELOAD", "GLIBC_TUNABLES")


def set_backends(run: RunConfig, device: torch.device) -> None:
    """As the run asks for, for the rest of the process."""
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high" if run.precision.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = run.precision.tf32
    torch.backends.cudnn.benchmark = run.loop.cudnn_benchmark and not run.loop.deterministic
    torch.use_deterministic_algorithms(run.loop.deterministic)


def keep_freed_memory() -> bool:
    """Tell the C library to keep what a step frees: the next step asks for the same sizes again.

    By default glibc gives large blocks back to the system and takes them anew. The system hands them out in pages of 4 KB, each
    cleared at its first touch: 20,000 of them in a step of a small residual network with 128 images of CIFAR-10, and a tenth
    of its time (`python -m benchmarks heap`). It matters on a CPU alone: on a GPU torch keeps freed memory itself.

    Returns: False where the user has chosen, or the C library is another one, and nothing was changed.
    """
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in _USERS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
