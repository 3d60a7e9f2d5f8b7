"""`python -m trainer bench-loader <overrides>`: how fast this machine feeds the network, for each number of workers.

Reads training batches as the run would and throws them away; builds no network.
"""

from __future__ import annotations

import dataclasses
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.launch.door import checked_run, override_arguments

if TYPE_CHECKING:
    from trainer.config import DatasetConfig, RunConfig

ENOUGH = 0.95  # of the best rate: fewer workers that reach it are recommended, as each costs memory and a core


def arguments() -> ArgumentParser:
    parser = override_arguments("bench-loader", "Images per second over workers x prefetch.")
    parser.add_argument("--workers", type=int, nargs="+", help="numbers of workers to try (default: 0, 1, 2, 4 … up to the cores)")
    parser.add_argument("--prefetch", type=int, nargs="+", default=[2, 4], help="batches each worker keeps ready (default: 2 4)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure each combination (default: 5)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Measure the grid, print it as a table with a recommendation."""
    options = arguments().parse_intermixed_args(argv)
    run = checked_run(options.overrides, options.config_dir)
    workers = options.workers if options.workers is not None else [w for w in default_workers() if can_feed(run.dataset, w)]
    grid = [(w, p) for w in workers for p in (options.prefetch if w else options.prefetch[:1])]
    rates: dict[tuple[int, int], float] = {}
    images_per_second(run, *grid[0], options.seconds)  # the first to read finds nothing in the system's cache: not comparable
    print(f"{'workers':>8} {'prefetch':>9} {'images/s':>10} {'per worker':>11}")
    for w, p in grid:
        rates[w, p] = rate = images_per_second(run, w, p, options.seconds)
        print(f"{w:8d} {p if w else '-':>9} {rate:10,.0f} {rate / max(w, 1):11,.0f}", flush=True)
    best_workers, best_prefetch = recommend(rates)
    print(
        f"\nuse dataset.num_workers={best_workers} dataset.prefetch={best_prefetch}  ({rates[best_workers, best_prefetch]:,.0f} images/s)"
    )
    return 0


def default_workers() -> list[int]:
    """0, 1, 2, 4 … and the number of cores this process may use."""
    from trainer.surroundings import usable_cores

    cores = usable_cores()
    return sorted({0, cores, *(2**i for i in range(10) if 2**i <= cores)})


def can_feed(dataset: DatasetConfig, workers: int) -> bool:
    """Whether there is something for each worker: a stream of shards is divided among them."""
    problems_with = getattr(dataclasses.replace(dataset, num_workers=workers), "reader_problems", None)
    return problems_with is None or not any(problems_with(1))


def recommend(rates: dict[tuple[int, int], float]) -> tuple[int, int]:
    """The fewest workers, and of those the least prefetch, that come within 5 % of the best rate."""
    best = max(rates.values())
    return min(choice for choice, rate in rates.items() if rate >= ENOUGH * best)


def images_per_second(run: RunConfig, workers: int, prefetch: int, seconds: float) -> float:
    """Steady rate of one rank: the first batches, which wait for workers to start, are not counted."""
    import torch

    from trainer.build import build_data
    from trainer.data.loader import train_loader
    from trainer.distributed import World

    data = build_data(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    augmentation = run.augmentation.build(run.dataset, train=True)
    loader = train_loader(
        data.train,
        augmentation,
        data.order,
        World(device=device),
        workers=workers,
        prefetch=prefetch,
        num_classes=len(data.train.classes) or None,
    )
    stream = iter(loader)
    try:
        for _ in range(2 * max(workers, 1)):
            next(stream)
        images, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            images += next(stream)["count"]
        return images / elapsed
    finally:
        loader.close()
