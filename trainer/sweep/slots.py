"""What each of the jobs that run side by side on this host may use: its own GPUs, or its own share of the cores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Slot:
    """What one job may use."""

    cores: tuple[int, ...] = ()  # () = all there are
    gpus: tuple[str, ...] | None = None  # as CUDA_VISIBLE_DEVICES names them; None = not restricted

    @property
    def environment(self) -> dict[str, str]:
        return {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}


def slots_for(settings: Mapping[str, Any], num_jobs: int) -> list[Slot]:
    """Divide this host: sets of GPUs where there are any, else shares of its cores."""
    from trainer.surroundings import usable_cores, visible_gpus

    names = _gpu_names(visible_gpus())
    per_job = settings.get("gpus_per_job")
    per_job = (1 if names else 0) if per_job is None else per_job
    cores_each = settings.get("cores_per_job")
    by_cores = max(1, usable_cores() // (cores_each or (1 if per_job else 2)))
    count = settings.get("slots") or (len(names) // per_job if per_job else by_cores)
    count = max(1, min(count, num_jobs))
    cpus = sorted(os.sched_getaffinity(0))
    share = cores_each or max(1, usable_cores() // count)
    slots = []
    for n in range(count):
        mine = tuple(cpus[n * share : (n + 1) * share]) if count > 1 or cores_each else ()
        gpus = tuple(names[n * per_job : (n + 1) * per_job]) if per_job else () if names else None
        slots.append(Slot(mine if len(mine) == share else (), gpus))
    return slots


def _gpu_names(count: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(n) for n in range(count)]
