"""What several ranks, or several micro-batches, may and may not change.

The data seen never changes. The numbers do not either (to rounding), but where the batch itself is part of the network:
batch normalisation, in-model noise and mixup partners. Those are the only exceptions, and they are shown to be some.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.any_task import SEEN, STOP, samples_by_step
from tests.processes import finish, logs, start, start_ranks
from tests.test_exact import MODELS, SHORT, last

VIT, BATCHNORM = MODELS["vit"], MODELS["batchnorm"]
SGD = ["optimizer=sgd", "optimizer.lr=0.05"]
PLAIN = ["dataset.num_workers=0", "task.label_smoothing=0"]


def losses(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def train(directory: Path, *overrides: str, size: int = 1) -> Path:
    arguments = [*SHORT, *PLAIN, *overrides]
    processes = start_ranks(directory, arguments, size) if size > 1 else [start(directory, arguments)]
    assert finish(processes) == [0] * size, logs(directory)
    return directory


def weights_apart(a: Path, b: Path) -> float:
    left, right = last(a)["task"], last(b)["task"]
    return max((left[k].double() - right[k].double()).abs().max().item() for k in left)


WAYS = {"two ranks": ([], 2), "two micro-batches": (["loop.accumulate=2"], 1), "both": (["loop.accumulate=2"], 2)}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same runs in one process and in one piece."""
    base = tmp_path_factory.mktemp("one")
    return {
        "sgd": train(base / "sgd", *VIT, *SGD),
        "adamw": train(base / "adamw", *VIT),
        "batchnorm": train(base / "batchnorm", *BATCHNORM, *SGD),
    }


@pytest.mark.parametrize("way", WAYS)
def test_cutting_the_batch_up_changes_nothing_for_sgd(way, one, tmp_path):
    overrides, size = WAYS[way]
    cut = train(tmp_path / "cut", *VIT, *SGD, *overrides, size=size)
    assert weights_apart(one["sgd"], cut) < 1e-6


def test_averaged_weights_workers_and_erasing_are_no_exceptions(tmp_path):
    overrides = [*VIT, *SGD, "loop.ema_decay=0.9", "dataset.num_workers=2", "augmentation.erasing=0.5", "dataset.repeats=2"]
    one, two = train(tmp_path / "one", *overrides), train(tmp_path / "two", *overrides, size=2)
    assert weights_apart(one, two) < 1e-6
    left, right = last(one)["ema"], last(two)["ema"]
    assert max((left[k].double() - right[k].double()).abs().max().item() for k in left) < 1e-6


def test_two_ranks_have_the_losses_of_one_for_adamw(one, tmp_path):
    cut = train(tmp_path / "cut", *VIT, size=2)
    torch.testing.assert_close(torch.tensor(losses(cut)), torch.tensor(losses(one["adamw"])), atol=1e-5, rtol=0)


def test_a_short_last_batch_is_weighed_by_its_images(tmp_path):
    """46 images in batches of 16: the last has 14, 7 a rank, 3 or 4 a micro-batch."""
    tail = [*VIT, *SGD, "loop.samples_per_epoch=46", "loop.drop_last=false"]
    whole = train(tmp_path / "whole", *tail)
    assert last(whole)["samples"] == 3 * 46
    for way, (overrides, size) in WAYS.items():
        cut = train(tmp_path / way.replace(" ", "-"), *tail, *overrides, size=size)
        assert weights_apart(whole, cut) < 1e-6, way


@pytest.mark.parametrize("size", [2, 3])
def test_validation_gives_the_same_figures_on_any_number_of_ranks(size, tmp_path):
    """Every sample once: 359 is divisible by neither the batch nor the ranks."""
    whole = ["loop.max_validation_batches=null", "loop.epochs=1", "loop.samples_per_epoch=18", "loop.batch_size=18"]
    a, b = train(tmp_path / "one", *VIT, *SGD, *whole), train(tmp_path / "many", *VIT, *SGD, *whole, size=size)
    one, many = (json.loads((d / "result.json").read_text())["last"] for d in (a, b))
    assert one["val/top1"] == many["val/top1"] and one["val/top5"] == many["val/top5"]
    assert one["val/loss"] == pytest.approx(many["val/loss"], abs=1e-6)


@pytest.mark.parametrize(
    "exception", [[*BATCHNORM], [*VIT, "model.drop_rate=0.5"], [*VIT, "augmentation.mixup=0.8"]], ids=["batchnorm", "noise", "mixup"]
)
def test_the_listed_exceptions_are_exceptions(exception, tmp_path):
    one, two = train(tmp_path / "one", *SGD, *exception), train(tmp_path / "two", *SGD, *exception, size=2)
    assert weights_apart(one, two) > 1e-5
    assert ("batch normalisation" in logs(two)) == (exception == BATCHNORM)


def test_stopped_on_two_ranks_continued_on_one(one, tmp_path):
    """The other way round from where the batch is cut up: a run that loses a rank goes on with the same images."""
    directory = tmp_path / "run"
    slow = [*SHORT, *PLAIN, *VIT, *SGD, "loop.samples_per_epoch=1600", "loop.epochs=1"]
    ranks = start_ranks(directory, slow, 2)
    wait_for_step(directory, 5, ranks)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGTERM)  # only one of them is told
    assert finish(ranks) == [75, 75], logs(directory)
    stopped = last(directory)
    assert 0 < stopped["step"] < 100 and stopped["samples"] == 16 * stopped["step"]
    assert finish([start(directory, slow)]) == [0], logs(directory)
    unbroken = train(tmp_path / "unbroken", *slow[len(SHORT) :])
    assert weights_apart(directory, unbroken) < 1e-4  # 100 steps of rounding
    assert last(directory)["samples"] == last(unbroken)["samples"]


def test_a_run_on_two_ranks_then_one_then_four_sees_the_samples_of_an_unbroken_one_in_their_order(tmp_path):
    directory, epochs = tmp_path / "run", 12
    run = [*SHORT, "loop.samples_per_epoch=100", "loop.drop_last=false", f"loop.epochs={epochs}", "dataset.num_workers=1"]
    steps = 7 * epochs  # the last of an epoch has four images

    def part(name: str, ranks: int, code: int, stop_at: int | None = None) -> dict[int, list[int]]:
        environment = {SEEN: str(tmp_path / name)} | ({} if stop_at is None else {STOP: str(stop_at)})
        where = tmp_path / "unbroken" if name == "unbroken" else directory
        processes = (
            start_ranks(where, run, ranks, environment, any_task=True)
            if ranks > 1
            else [start(where, run, environment=environment, any_task=True)]
        )
        assert finish(processes) == [code] * ranks, logs(where)
        return samples_by_step(tmp_path / name, ranks)

    unbroken = part("unbroken", 1, 0)
    assert [*unbroken] == [*range(steps)]
    two = part("two", 2, 75, stop_at=3)
    one = part("one", 1, 75, stop_at=len(two) + 4)
    four = part("four", 4, 0)
    assert len(two) > 3 and len(two) + 4 < len(two) + len(one) < steps, "stopped twice on the way"
    assert not {*two} & {*one} and not {*one} & {*four}, "no step is taken twice"
    assert two | one | four == unbroken


def wait_for_step(directory: Path, step: int, processes, timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        rows = directory / "metrics.jsonl"
        if rows.exists() and any(json.loads(line)["step"] >= step for line in rows.read_text().splitlines() if line.endswith("}")):
            return
        assert all(p.is_alive() for p in processes), logs(directory)
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {timeout} s\n{logs(directory)}")
