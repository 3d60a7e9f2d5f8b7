"""How fast data come, and what a large dataset costs that is not being read."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.measure import ROOT, Worker, race
from benchmarks.table import Effort, Line, at_least, at_most, limit, row

LOADING, INDEXING = "benchmarks.peers.loading", "benchmarks.peers.indexing"
OURS, ALONE, PIL = "trainyard's loader", "its decode + crop alone, in one process", "the same by hand, with PIL"
PEERS = {"timm create_loader": "timm_loader", "ImageFolder + DataLoader": "image_folder"}
STREAM = "webdataset pipeline"


@contextmanager
def corpus(count: int, width: int, height: int, shards: int = 4, slope: float = 1.0, quality: int = 92) -> Iterator[dict[str, str]]:
    """A folder of JPEGs for the time of a row."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "benchmarks.peers.corpus", root, *map(str, (count, width, height, shards, slope, quality))]
        subprocess.run(command, cwd=ROOT, check=True)
        yield {"root": root}


@row("loader", "one worker reads JPEGs (500x375) into random crops of 224 pixels, images a second")
def loader(effort: Effort) -> Iterator[Line]:
    with corpus(effort.rounds(512, 192), 500, 375) as root:
        options = {**root, "dataset": "image_folder"}
        contenders = [
            Worker(OURS, f"{LOADING}:ours", options),
            Worker(ALONE, f"{LOADING}:limit_ours", options),
            Worker(PIL, f"{LOADING}:limit_pil", root),
        ]
        contenders += [Worker(name, f"{LOADING}:{function}", root) for name, function in PEERS.items()]
        contenders += [Worker(STREAM, f"{LOADING}:webdataset_pipeline", root)]
        rates = race(contenders, effort.rounds(12, 5)).inverted(1e6)
        yield at_least(rates, OURS, ALONE, 0.95, unit="/s")
        yield at_least(rates, OURS, PIL, 0.95, unit="/s")
        for peer in (*PEERS, STREAM):
            yield at_least(rates, OURS, peer, 1.2, unit="/s")


@row("loader_shards", "the same from shards")
def loader_shards(effort: Effort) -> Iterator[Line]:
    with corpus(effort.rounds(512, 192), 500, 375) as root:
        options = {**root, "dataset": "webdataset"}
        contenders = [
            Worker(OURS, f"{LOADING}:ours", options),
            Worker(ALONE, f"{LOADING}:limit_ours", options),
            Worker(STREAM, f"{LOADING}:webdataset_pipeline", root),
        ]
        rates = race(contenders, effort.rounds(12, 5)).inverted(1e6)
        yield at_least(rates, OURS, ALONE, 0.95, unit="/s")
        yield at_least(rates, OURS, STREAM, 1.2, unit="/s")


@row("index", "an index of 1,000,000 samples: opening it, and what a worker grows by")
def index(effort: Effort) -> Iterator[Line]:
    opening, reading = "open, a name, all labels", "reading the index file"
    times = race([Worker(opening, f"{INDEXING}:open_index"), Worker(reading, f"{INDEXING}:read_index")], effort.rounds(15, 7))
    yield at_most(times, opening, reading, 1.2, unit="ms")
    grown = "a worker that has looked up all"
    yield limit(race([Worker(grown, f"{INDEXING}:growth")], rounds=1), grown, 10.0, unit="B a sample")


@row("shards", "time to the first batch, whatever the number of shards")
def shards(effort: Effort) -> Iterator[Line]:
    many, one = "200 shards", "1 shard"
    with corpus(200, 500, 375, shards=200) as dealt, corpus(200, 500, 375, shards=1) as whole:
        contenders = [Worker(many, f"{INDEXING}:first_batch", dealt), Worker(one, f"{INDEXING}:first_batch", whole)]
        yield at_most(race(contenders, effort.rounds(15, 7)), many, one, 1.1, unit="ms")


@row("resume", "time to the first batch 90 % into an epoch of 1,000,000 images")
def resume(effort: Effort) -> Iterator[Line]:
    late, early = "at 90 %", "at 0 %"
    contenders = [Worker(name, f"{INDEXING}:resume", {"at": at}) for name, at in ((late, 0.9), (early, 0.0))]
    yield at_most(race(contenders, effort.rounds(15, 7)), late, early, 1.1, unit="ms")


@row("progressive", "decoding and cropping 1000x750 JPEGs for smaller images")
def progressive(effort: Effort) -> Iterator[Line]:
    # A JPEG read at a fraction of its size saves the transform of its pixels, not the unpacking of the bits of rows above the
    # crop's bottom, which no decoder gets around. So the gain is judged on files of a usual quality: 112 pixels against the whole
    # image, and against 224, though random crops let that read at half size too. With large files both are shown only.
    for kind, slope, quality, target in (("75 KB", 1.6, 75, 1.5), ("520 KB", 1.0, 92, None)):
        with corpus(effort.rounds(64, 24), 1000, 750, slope=slope, quality=quality) as root:
            options = {**root, "dataset": "image_folder", "cpu_time": True}
            contenders = [Worker(f"{size} px", f"{LOADING}:limit_ours", {**options, "image_size": size}) for size in (56, 112, 224)]
            contenders += [Worker("whole, PIL", f"{LOADING}:limit_pil", {**root, "image_size": 112, "cpu_time": True})]
            times = race(contenders, effort.rounds(9, 5))
            yield at_least(times, "whole, PIL", "112 px", target, what=f"whole image over ours at 112 px, {kind}")
            yield at_least(times, "224 px", "112 px", target or 1.0, what=f"224 over 112 px, {kind}")
            yield at_least(times, "112 px", "56 px", 1.0, what=f"112 over 56 px, {kind}")
