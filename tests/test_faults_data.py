"""Data that are missing, too few, spoilt or hostile, and readers that die or hang, as a user meets them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from tests.command import KILLED, SHORT, SLOWLY, Command, all_end, family
from tests.layouts import LAYOUTS, image_folder
from tests.processes import finish, logs, start_ranks
from tests.test_exact import last
from tests.test_launch import Call
from tests.test_ranks import losses
from tests.thresholds import CONFIG_ERROR_SECONDS, FINISHED_SECONDS
from trainer.build import build_data
from trainer.launch.compose import compose_run


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images to train on and 10 to validate on, of two classes."""
    root = tmp_path_factory.mktemp("sound") / "data"
    image_folder(root)
    return root


@pytest.fixture
def data(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data"))


def of(data: Path) -> list[str]:
    return ["dataset=image_folder", f"dataset.path={data}"]


# What the command line can see before anything is imported


def nothing_there(data: Path) -> None:
    shutil.rmtree(data)


def a_file(data: Path) -> None:
    shutil.rmtree(data)
    data.write_text("no folder")


def no_classes(data: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(data / split)
        (data / split).mkdir()


def no_images(data: Path) -> None:
    for path in data.rglob("*.jpg"):
        path.unlink()


def one_class(data: Path) -> None:
    for path in data.glob("*/odd"):
        shutil.rmtree(path)


UNFIT: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "nothing there": (nothing_there, ["no such directory", "try: dataset.path="]),
    "a file": (a_file, ["is a file, not a directory", "try: dataset.path="]),
    "no classes": (no_classes, ["it has no class folders and no image", "try: put images into <class>/<image>.jpg"]),
    "no images": (no_images, ["none of the 2 folders in it holds an image", "try: put images into <class>/<image>.jpg"]),
    "one class": (one_class, ["has 1 class: a classifier needs at least two", "try: dataset.path=<a folder that holds one folder for each class>"]),
    "too few": (lambda data: None, ["loop.batch_size=64: is more than the 36 training images there are", "try: loop.batch_size=32"]),
}  # fmt: skip


@pytest.mark.parametrize("how", UNFIT)
def test_data_that_no_run_can_begin_with(how, data, tmp_path):
    spoil, told = UNFIT[how]
    spoil(data)
    call = Call("launch", *of(data), f"runs_dir={tmp_path}/runs", cwd=tmp_path)
    assert call.code == 2
    assert call.err.startswith("1 problem" if how != "one class" else "2 problems")  # with one class, the images are fewer too
    assert all(words in call.err for words in told), call.err
    assert "torch" not in call.loaded and "Traceback" not in call.err
    assert call.seconds < CONFIG_ERROR_SECONDS
    assert not (tmp_path / "runs").exists()


def cut_short(root: Path) -> None:
    shard = root / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])


def lost(root: Path) -> None:
    (root / "train-000001.tar").unlink()


def leaving(root: Path) -> None:
    with tarfile.open(root / "train-000000.tar", "a") as tar:
        member = tarfile.TarInfo("../../escaped.jpg")
        member.size = 3
        tar.addfile(member, BytesIO(b"abc"))


def few_classes(root: Path) -> None:
    (root / "classes.txt").write_text("even\n")


def wrong_boxes(root: Path) -> None:
    path = root / "annotations" / "instances_train.json"
    document = json.loads(path.read_text())
    for annotation, change in zip(document["annotations"], WRONG_BOXES, strict=False):
        annotation.update(change)
    path.write_text(json.dumps(document))


WRONG_BOXES = [{"bbox": [1, 1, 0, 0]}, {"bbox": [float("nan"), 1, 2, 3]}, {"bbox": [900, 900, 5, 5]}, {"category_id": 99}]

# layout: what is done to it, overrides, the exit code, and what has to be told
HOSTILE: dict[str, tuple[str, Callable[[Path], None], list[str], int, list[str]]] = {
    "a shard cut short": ("webdataset", cut_short, [], 3, ["train-000001.tar: is cut short: it ends at byte 3,000", "Fetch or pack it again"]),
    "a shard lost": ("webdataset", lost, [], 2, ["1 of the 12 shards listed are missing", "train-000001.tar"]),
    "a name that leaves": ("webdataset", leaving, [], 3, ["'../../escaped.jpg' is a name that leaves the archive: refused"]),
    "too few class names": ("webdataset", few_classes, [], 2, ["names 1 classes, but the train shards hold the class 1", "try: a class file of at least 2 lines"]),
    "too few shards": ("webdataset", lambda root: None, ["dataset.streaming=true", "dataset.num_workers=20"], 2,
                       ["20 readers are more than the 12 training shards", "try: dataset.num_workers=12"]),
    "wrong boxes": ("coco", wrong_boxes, ["dataset.bad_boxes=raise"], 3,
                    ["have no area: 001.jpg", "NaN or infinite corners: 002.jpg", "outside their image: 003.jpg", "category that is not listed: 004.jpg",
                     "dataset.bad_boxes=clip mends or drops them"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    for name in {case[0] for case in HOSTILE.values()}:
        LAYOUTS[name](root / name)
    return root


@pytest.mark.parametrize("how", HOSTILE)
def test_files_that_their_index_finds_bad_before_the_first_step(how, layouts, tmp_path):
    layout, spoil, overrides, code, told = HOSTILE[how]
    root = Path(shutil.copytree(layouts / layout, tmp_path / "data"))
    spoil(root)
    small = ["loop.batch_size=8", "dataset.image_size=32"]
    call = Call("launch", f"dataset={layout}", f"dataset.path={root}", f"runs_dir={tmp_path}/runs", *small, *overrides, cwd=tmp_path)
    assert call.code == code, call.err
    assert all(words in call.err for words in told), call.err
    assert "torch" not in call.loaded and "Traceback" not in call.err
    assert not (tmp_path / "runs").exists() and not list(tmp_path.rglob("escaped.jpg"))


# Files that turn out bad when they are read


def spoil_images(data: Path) -> dict[str, str]:
    """Make six files bad. What has to be said of each."""
    even, odd = data / "train" / "even", data / "train" / "odd"
    (even / "000.jpg").write_text("I am a text")
    (even / "002.jpg").write_bytes(b"")
    (odd / "001.jpg").write_bytes((odd / "001.jpg").read_bytes()[:-100])
    (odd / "bomb.png").write_bytes(bomb())
    os.mkfifo(odd / "pipe.jpg")
    (data / "val" / "even" / "036.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    return {
        "train/even/000.jpg": "not an image (starts with b'I am a text')",
        "train/even/002.jpg": "the file is empty (0 bytes)",
        "train/odd/001.jpg": "cannot be decoded: image file is truncated",
        "train/odd/bomb.png": "refused before decoding: ",
        "train/odd/pipe.jpg": "not a regular file",
        "val/even/036.jpg": "broken header: Truncated File Read",
    }


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 1.6 billion pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_bad_images_are_named_once_and_replaced_by_the_same_ones_on_two_ranks(data, tmp_path):
    told = spoil_images(data)
    command = Command(tmp_path / "runs", *SHORT, *of(data), "dataset.num_workers=2")
    assert command.code() == 0, command.said
    for name, why in told.items():
        split = "validation" if name.startswith("val") else "training"
        lines = [line for line in command.said.splitlines() if f"{data / name}: " in line]
        assert len(lines) == 1 and why in lines[0] and f"warning: bad {split} sample" in lines[0], command.said
    assert "Traceback" not in command.said
    result = command.directory.read_result()
    assert result and result["steps"] == 9 and result["samples"] == 9 * 16

    ranks = start_ranks(tmp_path / "ranks", [*SHORT, *of(data)], 2)
    assert finish(ranks) == [0, 0], logs(tmp_path / "ranks")
    assert last(tmp_path / "ranks")["step"] == 9
    assert losses(tmp_path / "ranks") == pytest.approx(losses(command.directory.path), abs=1e-5)


def test_too_many_bad_images_end_the_run_with_their_names(data, tmp_path):
    spoil_images(data)
    command = Command(tmp_path / "runs", *SHORT, *of(data), "dataset.max_bad_samples=2")
    assert command.code() == 3
    end = command.said[command.said.index("3 bad training samples, more than dataset.max_bad_samples=2 allows:") :]
    assert len(re.findall(rf"^  {re.escape(str(data))}/train/\S+: ", end, re.MULTILINE)) == 3
    assert "mend or remove them" in end and "describe-data" in end and "Traceback" not in command.said
    assert command.directory.read_status()["state"] == "failed"
    again = Command(tmp_path / "runs", *SHORT, *of(data), "dataset.max_bad_samples=5")
    assert again.code() == 0, again.said
    assert again.directory.path == command.directory.path


def test_a_rank_that_meets_bad_data_gives_the_run_its_exit_code(data, tmp_path):
    prepared = build_data(compose_run(*SHORT, *of(data)))
    mine = prepared.order.share(0, 1, 2, 1)[0].index  # of rank 1, in the first step
    bad = Path(prepared.train.name(int(mine[0])))
    bad.write_text("no image")
    command = Command(tmp_path / "runs", *SHORT, *of(data), "dataset.max_bad_samples=0", "distributed=local", "distributed.processes=2")
    assert command.code() == 3, command.said
    assert "rank 1 of 2 failed: DataError: 1 bad training sample, more than dataset.max_bad_samples=0 allows" in command.said
    assert f"{bad}: not an image" in command.said and "Traceback" not in command.said
    status = command.directory.read_status()
    assert status["state"] == "failed" and "rank 1 of 2 failed" in status["reason"]


@pytest.mark.parametrize("split", ["training", "validation"])
def test_the_limit_on_bad_images_is_that_of_all_ranks_together(split, data, tmp_path):
    run = [*SHORT, "loop.max_validation_batches=null", *of(data)]
    prepared = build_data(compose_run(*run))
    if split == "training":
        shares = [prepared.order.share(0, rank, 2, 1)[0].index[:2] for rank in range(2)]  # of each rank, in the first step
        bad = [Path(prepared.train.name(int(i))) for share in shares for i in share]
    else:
        assert prepared.val is not None
        bad = [Path(prepared.val.name(i)) for i in range(4)]  # in turn one rank's and the other's
    for path in bad:
        path.write_text("no image")
    ranks = start_ranks(tmp_path / "three", [*run, "dataset.max_bad_samples=3"], 2)
    assert finish(ranks) == [3, 3], logs(tmp_path / "three")
    said = logs(tmp_path / "three")
    assert f"4 bad {split} samples, more than dataset.max_bad_samples=3 allows" in said
    assert all(f"{path}: not an image" in said[said.index(f"4 bad {split}") :] for path in bad), "whichever rank has met it"
    ranks = start_ranks(tmp_path / "four", [*run, "dataset.max_bad_samples=4"], 2)
    assert finish(ranks) == [0, 0], logs(tmp_path / "four")


# Readers


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
def test_a_reader_that_dies_or_hangs_is_named_with_its_sample(what, tmp_path):
    reading = [*SHORT, "dataset.num_workers=2", "dataset.worker_timeout=1"]
    command = Command(tmp_path / "runs", *reading, environment=SLOWLY)
    command.wait_for_step(1)
    workers = family(command.pid)
    os.kill(workers[0], what)
    assert command.code() == 3, command.said
    says = "loader worker 0 {} was killed by SIGKILL while reading" if what == signal.SIGKILL else "worker 0 {}:"
    said = command.said.rpartition(says.format(f"(pid {workers[0]})"))
    assert said[1] and re.match(r" sample \d+ \(digits/\d+\)", said[2]), command.said
    assert "memory has run out" in said[2] or "dataset.worker_timeout" in said[0]
    assert all_end(workers) and "Traceback" not in command.said
    again = Command(tmp_path / "runs", *SHORT)
    assert again.code() == 0 and "going on at step" in again.said, again.said


# Data that change under a run


def test_data_that_have_changed_since_are_said(data, tmp_path):
    """Where the run goes on, and where it is finished."""
    runs, run = tmp_path / "runs", [*SHORT, *of(data), f"runs_dir={tmp_path}/runs"]
    assert Command(runs, *run, environment=KILLED).code() == -9
    (data / "train" / "even" / "000.jpg").unlink()
    command = Command(runs, *run)
    assert command.code() == 0, command.said
    assert "warning: the training data have changed since" in command.said and "resume=never begins anew" in command.said

    record = command.directory.metrics_path.read_bytes()
    call = Call("launch", *run, cwd=tmp_path)
    assert call.code == 0 and "This run is finished" in call.out
    assert call.seconds < FINISHED_SECONDS and "torch" not in call.loaded
    assert "data have changed" not in call.err  # it went on with these
    shutil.copy(data / "val" / "odd" / "037.jpg", data / "val" / "odd" / "another.jpg")
    call = Call("launch", *run, cwd=tmp_path)
    assert call.code == 0 and "This run is finished" in call.out
    assert "warning: the validation data have changed since" in call.err and "resume=never runs it again" in call.err
    assert command.directory.metrics_path.read_bytes() == record
