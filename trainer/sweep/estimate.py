"""What runs will cost, from what runs like them have cost: images per second, and the size of their checkpoints. Reads run directories."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.errors import TrainyardError
from trainer.identity import differences
from trainer.rundir import RunDirectory
from trainer.validation import steps_per_epoch

_MOST_LOOKED_AT = 40  # finished runs of a name, the newest first
_FREE = ("seed", "init_from", "optimizer.", "scheduler.", "loop.", "debug.")
"""Settings that two runs of one speed may differ in."""
_NUMBERS_FREE = ("augmentation.", "task.")
"""Of these it is numbers with a point that do not matter (weights, probabilities); a method, a detector or a count of views does."""
_BINDING = ("loop.batch_size", "loop.stages", "loop.deterministic")
_SWITCHES = ("compile", "channels_last", "activation_checkpointing", "accumulate")
"""Of `loop`: they change a run's speed, though not what comes of it."""


@dataclass(frozen=True)
class Speed:
    """How fast a finished run was."""

    run: RunConfig
    images_per_second: float
    ranks: int
    disk: int  # bytes of its directory


@dataclass(frozen=True)
class Cost:
    """What a run will take."""

    images: int | None  # None: nobody knows how many there are before the data are looked through
    hours: float | None  # None: no run like it is finished yet
    gpu_hours: float | None  # of processes, where there are no GPUs
    disk: int | None  # bytes
    source: str  # where the figures come from, in words


class History:
    """Finished runs, looked up once for each name."""

    def __init__(self) -> None:
        self._by_name: dict[Path, list[Speed]] = {}
        self._probes: list[Speed] = []

    def probed(self, run: RunConfig, directory: Path) -> None:
        """Take a short run as a measure for those like `run`, of which none is finished. `directory` is the short one's."""
        (speed,) = _speeds(directory.parent)
        self._probes.append(dataclasses.replace(speed, run=run))

    def cost(self, run: RunConfig, ranks: int) -> Cost:
        """What `run` will take on so many ranks."""
        images = None
        if (steps := total_steps(run)) is not None:
            images = steps * run.loop.batch_size
        alike = [speed for speed in self._of(Path(run.runs_dir) / run.name) if _is_alike(speed.run, run)]
        probes = [speed for speed in self._probes if _is_alike(speed.run, run)] if not alike else []
        same = [speed for speed in alike if speed.ranks == ranks] or alike or probes
        if not same or images is None:
            return Cost(images, None, None, None, "no finished run like it" if images is not None else "the length is not known yet")
        rate = statistics.median(speed.images_per_second / speed.ranks for speed in same) * ranks
        hours = images / rate / 3600
        exact = "" if same[0].ranks == ranks else f", from {same[0].ranks} ranks"
        disk = round(statistics.median(speed.disk for speed in same))
        what = "a short probe on this host" if probes else f"{len(same)} finished run{'s' if len(same) > 1 else ''} like it"
        return Cost(images, hours, hours * ranks, disk, what + exact)

    def _of(self, folder: Path) -> list[Speed]:
        if folder not in self._by_name:
            self._by_name[folder] = list(_speeds(folder))
        return self._by_name[folder]


def total_steps(run: RunConfig) -> int | None:
    """Optimizer steps of the whole run; None where nobody knows yet how many images there are."""
    if run.loop.steps is not None:
        return run.loop.steps
    try:
        num_train = run.dataset.facts().num_train
    except (TrainyardError, OSError):
        return None
    return None if num_train is None else run.loop.num_epochs * steps_per_epoch(run, num_train)


def _speeds(folder: Path) -> Iterator[Speed]:
    results = sorted(folder.glob("*/result.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in results[:_MOST_LOOKED_AT]:
        directory = RunDirectory(path.parent)
        try:
            result, run = directory.read_result() or {}, directory.read_config()
        except TrainyardError:  # of an older version of the code
            continue
        rate = result.get("images_per_second")
        if isinstance(rate, int | float) and rate > 0:
            disk = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
            yield Speed(run, float(rate), int(directory.read_environment().get("ranks") or 1), disk)


def _is_alike(one: RunConfig, other: RunConfig) -> bool:
    """Whether two runs take the same time for an image."""
    if any(getattr(one.loop, name) != getattr(other.loop, name) for name in _SWITCHES):
        return False
    return all(_is_free(key, before, after) for key, before, after in differences(one, other))


def _is_free(key: str, before: Any, after: Any) -> bool:
    if key.startswith(_NUMBERS_FREE):
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (before, after))
        return numbers and (isinstance(before, float) or isinstance(after, float))
    return key.startswith(_FREE) and key not in _BINDING
