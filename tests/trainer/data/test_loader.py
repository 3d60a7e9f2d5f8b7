"""What the loader gives depends on seed and step alone: not on workers, ranks, micro-batches, or where it began."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.data.sources import Pictures, Plain, Rank, batches, equal, global_generators, take
from trainer.config.augmentation import Basic, Cub
from trainer.data.augment.standard import Standard
from trainer.data.augment.turned import Turned
from trainer.data.loader import available_cores, train_loader, validation_loader, worker_count
from trainer.data.order import Order


class Dataset:
    image_size = 16
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]
    offers = frozenset({"image", "label"})


def everything(train: bool = True) -> Standard:
    """An augmentation that draws in both stages (no mixing: partners do depend on the micro-batch)."""
    return Standard(Basic(hflip=0.5, crop_scale=[0.2, 1.0], val_crop=0.9, erasing=0.5), Dataset(), train=train)  # pyright: ignore[reportArgumentType]


@settings(max_examples=12)
@given(
    size=st.integers(4, 50), batch=st.integers(1, 8), drop_last=st.booleans(),
    world=st.integers(1, 4), workers=st.integers(0, 3), accumulate=st.integers(1, 3),
)  # fmt: skip
def test_an_epoch_holds_every_sample_once_with_the_same_bytes(size, batch, drop_last, world, workers, accumulate):
    order = Order(size, 1, min(batch, size), drop_last)
    steps = order.steps_per_epoch
    number = steps * accumulate
    found = [
        b
        for rank in range(world)
        for b in batches(number, order, augmentation=everything(), rank=rank, world=world, workers=workers, accumulate=accumulate)
    ]
    alone = batches(steps, order, augmentation=everything())
    assert sum(b["count"] for b in found) == order.epoch_length
    images = {int(i): image for b in alone for i, image in zip(b["index"], b["image"], strict=True)}
    counts = Counter(int(i) for b in found if b["count"] for i in b["index"])
    assert counts == dict.fromkeys(images, 1)
    for b in found:
        assert all(image.equal(images[int(i)]) for i, image in zip(b["index"], b["image"], strict=True))


class Counted(Pictures):
    """Says how often each picture was opened."""

    def __init__(self, size: int, bad: frozenset[int] = frozenset()) -> None:
        super().__init__(size, bad=bad)
        self.opened: Counter[int] = Counter()

    def __getitem__(self, index: int):
        self.opened[index] += 1
        return super().__getitem__(index)


def shifted(**more: object) -> Standard:
    """An augmentation of which only the batch's part draws."""
    return Standard(Basic(hflip=0.5, crop_scale=None, val_crop=1.0, shift=0.1, erasing=0.5, **more), Dataset(), train=True)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_kept_is_what_would_be_read_again(workers):
    order = Order(13, 0, 4, drop_last=False)  # four epochs
    read = batches(16, order, source=Pictures(13, bad=frozenset({5})), augmentation=shifted())
    kept = batches(16, order, source=Pictures(13, bad=frozenset({5})), augmentation=shifted(), workers=workers, keep=1_000_000)
    assert all(equal(a, b) for a, b in zip(kept, read, strict=True))


@pytest.mark.parametrize(("keep", "held"), [(1_000_000, 13), (5 * 3 * 16 * 16 + 100, 5), (0, 0)])
def test_as_much_is_kept_as_there_is_room_for(keep, held):
    source = Counted(13)
    batches(16, Order(13, 0, 4, drop_last=False), source=source, augmentation=shifted(), keep=keep)
    assert sum(times == 1 for times in source.opened.values()) == held
    assert sum(times >= 4 for times in source.opened.values()) == 13 - held


def turned() -> Turned:
    """One that is `Standard` but for its draws in the worker."""
    cfg = Cub(crop_scale=None, val_crop=1.0, hflip=0.0)
    return Turned(cfg, Dataset(), train=True)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("augmentation", [everything, turned])
def test_what_is_drawn_at_random_in_the_worker_is_not_kept(augmentation):
    source = Counted(13)
    batches(16, Order(13, 0, 4, drop_last=False), source=source, augmentation=augmentation(), keep=1_000_000)
    assert min(source.opened.values()) >= 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 7, 23])
def test_resuming_continues_the_sequence(workers, start):
    order = Order(37, 0, 8, drop_last=False)
    unbroken = batches(start + 4, order, augmentation=Plain(draws=True))
    resumed = batches(4, order, augmentation=Plain(draws=True), workers=workers, start_step=start)
    assert all(equal(a, b) for a, b in zip(resumed, unbroken[start:], strict=True))


def test_ranks_change_and_samples_stay():
    order = Order(64, 0, 8)

    def ids(world: int, start: int, steps: int) -> list[int]:
        ranks = [batches(steps, order, rank=r, world=world, start_step=start, workers=1) for r in range(world)]
        return [
            int(i) for step in range(steps) for place in zip(*(ranks[r][step]["index"] for r in range(world)), strict=True) for i in place
        ]

    assert ids(2, 0, 3) + ids(1, 3, 2) + ids(4, 5, 2) == ids(1, 0, 7)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_main_process_s_generators_are_left_alone(workers):
    torch.manual_seed(1)
    before = global_generators()
    batches(3, Order(37, 0, 8), augmentation=Plain(draws=True), workers=workers)
    take(validation_loader(Pictures(), Plain(draws=True), Rank(), batch_size=8, workers=workers))
    assert global_generators() == before


def test_draws_do_not_depend_on_the_main_process_s_generators():
    torch.manual_seed(1)
    first = batches(2, Order(37, 0, 8), augmentation=Plain(draws=True), workers=2)
    torch.manual_seed(2)
    assert all(equal(a, b) for a, b in zip(first, batches(2, Order(37, 0, 8), augmentation=Plain(draws=True)), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_short_batch_is_kept_and_counted_and_an_empty_share_has_count_0(workers):
    order = Order(9, 0, 8, drop_last=False)
    shares = [batches(4, order, rank=rank, world=2, accumulate=2, workers=workers) for rank in range(2)]
    assert [b["count"] for b in shares[0]] == [2, 2, 0, 1]
    assert [b["count"] for b in shares[1]] == [2, 2, 0, 0]
    assert all(len(b["image"]) == max(b["count"], 1) for share in shares for b in share)


@given(size=st.integers(1, 50), world=st.integers(1, 4), batch=st.integers(1, 9))
def test_validation_gives_every_sample_once_and_pads_nothing(size, world, batch):
    loaders = [validation_loader(Pictures(size), Plain(), Rank(rank, world), batch_size=batch) for rank in range(world)]
    found = [take(loader) for loader in loaders]
    assert sorted(int(i) for rank in found for b in rank for i in b["index"]) == list(range(size))
    assert all(b["count"] == len(b["image"]) for rank in found for b in rank)
    assert {loader.rounds for loader in loaders} == {max(map(len, found))}


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_can_be_repeated_cut_short_and_left_in_the_middle(workers):
    loader = validation_loader(Pictures(), everything(train=False), Rank(), batch_size=8, workers=workers)
    first = list(loader)
    next(iter(loader))  # abandoned at once, with batches in flight
    pids = [p.pid for p in loader.pool.processes] if loader.pool else []
    again = list(loader)
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert pids == ([p.pid for p in loader.pool.processes] if loader.pool else [])  # persistent
    loader.close()
    assert all(equal(a, b) for a, b in zip(first, take(loader), strict=True))  # new workers
    short = take(validation_loader(Pictures(), Plain(), Rank(), batch_size=8, workers=workers, max_batches=2))
    assert [b["count"] for b in short] == [8, 8]


def test_ragged_fields_are_lists_and_others_stack():
    class Boxes(Plain):
        ragged = ("extra",)

        def sample(self, sample, random):
            count = sample["label"] + 1
            return {
                "image": torch.zeros(3, 2, 2, dtype=torch.uint8), "boxes": np.ones((count, 4), np.float32), "extra": torch.arange(count),
                "group": np.int64(3), "weight": 0.5, "parts": np.zeros((2, 3), np.float32), "name": "n", "flag": True,
            }  # fmt: skip

    for workers in (0, 2):
        batch = batches(1, Order(37, 0, 8), augmentation=Boxes(), workers=workers)[0]
        assert [b.shape[0] for b in batch["boxes"]] == [len(e) for e in batch["extra"]] == (batch["index"] % 3 + 1).tolist()
        assert (batch["group"].tolist(), batch["weight"].tolist(), batch["flag"].tolist()) == ([3] * 8, [0.5] * 8, [True] * 8)
        assert batch["parts"].shape == (8, 2, 3)
        assert batch["name"] == ["n"] * 8


def test_a_batch_keeps_its_values_when_its_block_is_used_again():
    loader = train_loader(Pictures(), Plain(), Order(37, 0, 8), Rank(), workers=2)
    kept = take(loader, 20)
    assert all(equal(a, b) for a, b in zip(kept, batches(20, Order(37, 0, 8)), strict=True))


def test_worker_count():
    assert worker_count(3, 8) == 3
    assert worker_count("0", 8) == 0
    assert worker_count("auto", 10_000) == 0
    assert worker_count("auto", 1) <= max(available_cores() - 1, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_gets_the_same_batches_without_the_host_waiting(workers):
    order, device = Order(37, 0, 8), torch.device("cuda")
    loader = train_loader(Pictures(), everything(), order, Rank(device=device), workers=workers)
    stream = iter(loader)
    next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = [next(stream) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loader.close()
    for a, b in zip(on_gpu, batches(21, order, augmentation=everything())[1:], strict=True):
        assert a["image"].device.type == "cuda"
        assert torch.allclose(a["image"].cpu(), b["image"], atol=1e-5)
        assert all(a[name].cpu().equal(b[name]) for name in ("label", "key", "index"))
