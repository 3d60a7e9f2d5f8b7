"""What keeping averaged weights costs at every step."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Worker, race
from benchmarks.table import Effort, Line, at_most, row

OURS, LERP, TIMM = "trainer.ema.Ema", "bare _foreach_lerp_, cached lists", "timm ModelEmaV3(foreach)"


@row("ema", "one update of the averaged weights")
def ema(effort: Effort) -> Iterator[Line]:
    for model in ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"):
        options = {"model": model}
        contenders = [
            Worker(OURS, "benchmarks.peers.averaging:ours", options),
            Worker(LERP, "benchmarks.peers.averaging:bare_lerp", options),
            Worker(TIMM, "benchmarks.peers.averaging:timm_v3", options),
        ]
        times = race(contenders, effort.rounds(full=60, quick=24))
        yield at_most(times, OURS, LERP, 1.1, what=model)
        yield at_most(times, OURS, TIMM, 1.0, what=model)
