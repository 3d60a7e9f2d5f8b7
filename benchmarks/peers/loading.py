"""Loaders with one worker that read the same JPEGs into batches of random 224-pixel crops, ready to train on; and what
reading, decoding and cropping alone take in one process. All figures are microseconds per image."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

BATCH = 64
SIDE = 224  # pixels
WARM, TIMED = 5, 5  # batches; what a worker has ready when it is asked again is used up in the first ones
EPOCH = 100_000  # images; longer than any measurement, so that nobody's end of an epoch is in it


def rate(batches: Iterator[Any]) -> Callable[[], float]:
    def block() -> float:
        for _ in islice(batches, WARM):
            pass
        started = time.perf_counter()
        for _ in islice(batches, TIMED):
            pass
        return (time.perf_counter() - started) / (TIMED * BATCH) * 1e6

    torch.set_num_threads(1)
    return block


def ours(root: str, dataset: str) -> Callable[[], float]:
    from trainer.data.loader import train_loader
    from trainer.data.order import Order
    from trainer.distributed import World

    source, augmentation = parts(root, dataset)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    return rate(iter(train_loader(source, augmentation, Order(len(source), 0, BATCH), world, workers=1, num_classes=4)))


def parts(root: str, dataset: str, image_size: int = SIDE) -> tuple[Any, Any]:
    """This project's source of training images and its augmentation of them."""
    cfg, augmentation = configs(root, dataset, image_size)
    return cfg.build("train"), augmentation.build(cfg, train=True)


def configs(root: str, dataset: str, image_size: int) -> tuple[Any, Any]:
    """The typed configs of dataset and augmentation."""
    import tasks  # noqa: F401  (registers the tasks' schemas)
    from trainer.launch.compose import compose_run

    folder = {"image_folder": "folder", "webdataset": "shards"}[dataset]
    path = Path(root) / folder
    run = compose_run(
        f"dataset={dataset}", f"dataset.path={path}", "augmentation=basic", f"dataset.image_size={image_size}", "loop.batch_size=1"
    )
    return run.dataset, run.augmentation


def limit_ours(root: str, dataset: str, image_size: int = SIDE, cpu_time: bool = False) -> Callable[[], float]:
    """This project's own reading, decoding and cropping, called in a loop."""
    from trainer.random import SampleRandom

    source, augmentation = parts(root, dataset, image_size)
    source.lazy = augmentation.lazy
    calls = cycle(range(len(source)))
    return one_by_one(
        lambda: augmentation.sample(source[i := next(calls)], SampleRandom(i * 7919)), time.process_time if cpu_time else time.perf_counter
    )


def limit_pil(root: str, image_size: int = SIDE, cpu_time: bool = False) -> Callable[[], float]:
    """The same by hand, with PIL: the file, a random crop, its pixels as bytes."""
    import numpy as np
    from PIL import Image
    from torchvision.transforms import RandomResizedCrop

    paths = cycle(sorted(Path(root, "plain", "train").rglob("*.jpg")))
    random.seed(0)

    def one() -> torch.Tensor:
        with Image.open(next(paths)) as image:
            top, left, height, width = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])  # type: ignore[arg-type]
            crop = image.convert("RGB").resize(
                (image_size, image_size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
            )
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1)

    return one_by_one(one, time.process_time if cpu_time else time.perf_counter)


def one_by_one(read: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    torch.set_num_threads(1)

    def block() -> float:
        started = clock()
        for _ in range(TIMED * BATCH):
            read()
        return (clock() - started) / (TIMED * BATCH) * 1e6

    return block


def image_folder(root: str) -> Callable[[], float]:
    """torchvision's ImageFolder in torch's DataLoader, as its reference scripts have it."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(Path(root, "plain", "train")), recipe())
    dataset.samples = repeated(dataset.samples)
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=1, prefetch_factor=2, persistent_workers=True)
    return rate(iter(loader))


def recipe() -> Any:
    from torchvision import transforms

    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return transforms.Compose([transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])


def timm_loader(root: str) -> Callable[[], float]:
    from timm.data import create_dataset, create_loader

    dataset: Any = create_dataset("", root=str(Path(root, "plain", "train")), is_training=True)
    dataset.reader.samples = repeated(dataset.reader.samples)
    loader: Iterable[Any] = create_loader(
        dataset, (3, SIDE, SIDE), BATCH, is_training=True, color_jitter=0.0, num_workers=1,
        use_prefetcher=False, persistent_workers=True, device=torch.device("cpu"),
    )  # fmt: skip
    return rate(iter(loader))


def repeated(samples: list[Any]) -> list[Any]:
    return list(islice(cycle(samples), EPOCH))


def webdataset_pipeline(root: str) -> Callable[[], float]:
    from webdataset.compat import WebDataset, WebLoader

    shards = sorted(str(p) for p in Path(root, "shards").glob("train-*.tar"))
    dataset = (
        WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(100)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(recipe(), int)
        .batched(BATCH)
    )
    loader = WebLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=2, persistent_workers=True)
    return rate(iter(loader))
