"""Bad samples, dead and hanging workers, signals, and what is left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from tests import thresholds
from tests.trainer.data.sources import Pictures, Plain, Rank, batches, equal, take
from trainer.data.loader import train_loader, validation_loader
from trainer.data.order import Order
from trainer.errors import DataError

BAD = frozenset({3, 11, 30})


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_by_others_of_their_key_and_said_once(workers, caplog):
    order = Order(37, 0, 8, drop_last=False)
    caplog.set_level(logging.WARNING)
    found = batches(10, order, source=Pictures(bad=BAD), workers=workers)  # two epochs
    assert [b["count"] for b in found] == [8, 8, 8, 8, 5] * 2
    intact = batches(10, order)
    for a, b in zip(found, intact, strict=True):
        assert a["key"].equal(b["key"])
        good = torch.tensor([int(i) not in BAD for i in b["index"]])
        assert a["index"][good].equal(b["index"][good])
        assert not BAD & set(a["index"].tolist())
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 3
    assert all(sum(f"picture-{i}:" in line for line in warned) == 1 for i in BAD)
    assert all(equal(a, b) for a, b in zip(found, batches(10, order, source=Pictures(bad=BAD)), strict=True))


def test_replacements_come_from_the_fraction_in_use():
    order = Order(37, 0, 4, fraction=0.3)
    assert order.rows is not None
    bad = frozenset(order.rows[::2].tolist())
    found = batches(20, order, source=Pictures(bad=bad))
    assert {int(i) for b in found for i in b["index"]} <= set(order.rows.tolist()) - bad


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_end_with_their_names(workers):
    with pytest.raises(DataError, match="max_bad_samples=2") as error:
        batches(10, Order(37, 0, 8, drop_last=False), source=Pictures(bad=BAD), workers=workers, max_bad_samples=2)
    assert all(f"picture-{i}: made so" in str(error.value) for i in BAD)
    assert error.value.exit_code == 3
    batches(10, Order(37, 0, 8, drop_last=False), source=Pictures(bad=BAD), workers=workers, max_bad_samples=3)


def test_nothing_but_bad_samples_ends_too():
    with pytest.raises(DataError, match="in a row could not be read"):
        batches(1, Order(5, 0, 2), source=Pictures(5, bad=frozenset(range(5))))


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_leaves_bad_samples_out(workers):
    def found(**options):
        return take(validation_loader(Pictures(bad=BAD), Plain(), Rank(), batch_size=10, workers=workers, **options))

    good = found()
    assert sorted(int(i) for b in good for i in b["index"]) == sorted(set(range(37)) - BAD)
    assert all(b["count"] == len(b["image"]) == len(b["key"]) for b in good)
    intact = {
        int(i): image
        for b in take(validation_loader(Pictures(), Plain(), Rank(), batch_size=10))
        for i, image in zip(b["index"], b["image"])
    }
    assert all(image.equal(intact[int(i)]) for b in good for i, image in zip(b["index"], b["image"], strict=True))
    with pytest.raises(DataError, match="bad validation samples"):
        found(max_bad_samples=2)


def test_a_validation_set_without_one_good_sample_gives_nothing():
    assert take(validation_loader(Pictures(5, bad=frozenset(range(5))), Plain(), Rank(), batch_size=2)) == []


def test_a_killed_worker_is_named_with_its_last_sample():
    with pytest.raises(DataError, match=r"worker \d \(pid \d+\) was killed by SIGKILL while reading sample 20 \(picture-20\)"):
        batches(10, Order(37, 0, 8), source=Pictures(dies=20), workers=2)


def test_a_hanging_worker_is_named_with_its_last_sample():
    started = time.monotonic()
    with pytest.raises(DataError, match=r"worker \d \(pid \d+\): sample 20 \(picture-20\)"):
        batches(10, Order(37, 0, 8), source=Pictures(hangs=20), workers=2, timeout=0.5)
    assert time.monotonic() - started < 10


def test_an_error_of_the_code_keeps_its_type_and_names_the_sample():
    class Broken(Plain):
        def sample(self, sample, random):
            if sample["label"] == 2:
                raise KeyError("a typo")
            return super().sample(sample, random)

    for workers in (0, 2):
        with pytest.raises(KeyError, match="a typo") as error:
            batches(10, Order(37, 0, 8), augmentation=Broken(), workers=workers)
        notes = "".join(error.value.__notes__)
        assert "while reading sample" in notes and "picture-" in notes
        assert workers == 0 or "in loader worker" in notes


def test_an_augmentation_of_changing_size_is_told_so():
    class Changing(Plain):
        def sample(self, sample, random):
            return {"image": torch.zeros(3, 4 + sample["label"], 4, dtype=torch.uint8)}

    with pytest.raises(ValueError, match="one shape"):
        batches(1, Order(37, 0, 8), augmentation=Changing())


def test_a_sample_that_lacks_a_field_is_named():
    class Lacking(Plain):
        def sample(self, sample, random):
            return {name: value for name, value in super().sample(sample, random).items() if name != "drawn" or sample["label"]}

    with pytest.raises(ValueError, match="has the fields"):
        batches(1, Order(37, 0, 8), augmentation=Lacking())


def test_workers_ignore_signals_and_use_one_thread():
    class Threads(Plain):
        def sample(self, sample, random):
            return {**super().sample(sample, random), "threads": torch.get_num_threads(), "pid": os.getpid()}

    loader = train_loader(Pictures(), Threads(), Order(37, 0, 8), Rank(), workers=2)
    stream = iter(loader)
    first = next(stream)
    assert loader.pool is not None
    pids = {p.pid for p in loader.pool.processes if p.pid}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        for pid in pids:
            os.kill(pid, number)
    for _ in range(30):
        batch = next(stream)
        assert set(batch["threads"].tolist()) == {1}
        assert set(batch["pid"].tolist()) <= pids | {os.getpid()}
    assert first["count"] == 8
    loader.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


SCRIPT = """
import os, sys, time
from tests.trainer.data.sources import *
loader = train_loader(Pictures(), Plain(), Order(37, 0, 8), Rank(), workers=2)
stream = iter(loader)
next(stream)
print(*(p.pid for p in loader.pool.processes), flush=True)
time.sleep(60 if "killed" in sys.argv else 0)
"""


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_no_worker_outlives_its_parent(how):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    if how == "killed":
        process.kill()
    assert process.wait(30) == (-signal.SIGKILL if how == "killed" else 0)
    process.stdout.close()
    deadline = time.monotonic() + 15
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# In a process of its own: what a test runner with threads writes to memory that it shares with the worker stops being shared, and looks as if
# the worker had grown.
GROWTH = """
import sys
import numpy as np, psutil
from PIL import Image
from tests.trainer.data.sources import *

class Indexed(Pictures):
    'Samples as light as can be, behind an index that is one array (as a packed table is) or a list of objects.'

    def __init__(self, size, packed):
        super().__init__(size)
        self.pixel = Image.new("RGB", (1, 1))
        self.table = np.arange(size * 4) if packed else [str(i) for i in range(size)]

    def __getitem__(self, index):
        self.table[index]
        return {"image": self.pixel, "label": 0}

source = Indexed(int(sys.argv[2]), sys.argv[1] == "packed")
loader = train_loader(source, Plain(), Order(len(source), 0, 512), Rank(), workers=1)
stream = iter(loader)
for _ in range(5):  # what the first batches allocate has nothing to do with the number of samples
    next(stream)
worker = psutil.Process(loader.pool.processes[0].pid)
own = lambda: sum(m.private_dirty for m in worker.memory_maps(grouped=False))  # bytes that its parent does not share
before = own()
for _ in range(60):  # reads from nearly every page of the index
    next(stream)
print(own() - before)
loader.close()
"""


@pytest.mark.parametrize("kept", ["packed", "as objects"])
def test_a_worker_s_memory_does_not_grow_with_the_samples(kept):
    size = 1_000_000
    told = subprocess.run([sys.executable, "-c", GROWTH, kept, str(size)], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert (int(told.split()[-1]) < thresholds.WORKER_BYTES_PER_SAMPLE * size) == (kept == "packed"), told
