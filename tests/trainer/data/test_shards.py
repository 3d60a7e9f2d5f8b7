"""Shards: the same samples as the files they were packed from, however they are named, and nothing read silently short."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tasks  # noqa: F401  (registers the schemas that the config composes)
from tests import layouts
from tests.trainer.data.sources import Rank, batches, equal, take
from trainer.config.augmentation import Basic
from trainer.config.dataset import DatasetConfig
from trainer.data.config import (
    CocoConfig,
    CubConfig,
    DigitPartsConfig,
    DigitScenesConfig,
    ImageFolderConfig,
    MetaShiftConfig,
    MultispectralConfig,
    SyntheticConfig,
    WebDatasetConfig,
)
from trainer.data.index import SETTLED
from trainer.data.loader import validation_loader
from trainer.data.order import Order
from trainer.data.shards import verbs
from trainer.data.shards.index import index_shard, index_shards, samples
from trainer.data.shards.names import expand
from trainer.data.shards.pack import pack, parse_size
from trainer.data.shards.tar import ShardError, members
from trainer.data.source import BadSample, LayoutError, Source, encoded
from trainer.errors import ConfigError, DataError
from trainer.launch.compose import checked, compose


def png(shade: int = 0, size: tuple[int, int] = (6, 5)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 2 * shade % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, files: Sequence[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file written by Python's own library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def plain(first: int, count: int, classes: int = 2) -> list[tuple[str, bytes]]:
    """Samples of one colour each."""
    return [entry for i in range(first, first + count) for entry in ((f"s{i:03}.png", png(i)), (f"s{i:03}.cls", str(i % classes).encode()))]


def read_members(path: Path) -> list[tuple[str, int, int]]:
    data = path.read_bytes()
    return [(m.name, m.offset, m.size) for m in members(str(path), lambda at, n: data[at : at + n], len(data))]


def folder(root: Path, shards: int = 3, each: int = 4, split: str = "train") -> Path:
    """A folder of shards with gaps in their numbering."""
    for i in range(shards):
        tar(root / f"pets-{split}-{2 * i:04}.tar", plain(each * i, each))
    (root / "classes.txt").write_text("cat\ndog\n")
    return root


def both(root: Path, **config: Any) -> WebDatasetConfig:
    folder(root)
    folder(root, shards=1, split="val")
    return WebDatasetConfig(path=str(root), image_size=8, **config)


def colours(source: Source) -> list[int]:
    return [source[i]["image"].getpixel((0, 0))[0] for i in range(len(source))]


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        x, y = np.asarray(a[key]), np.asarray(b[key])
        np.testing.assert_array_equal(x, y, err_msg=key)
        assert x.dtype == y.dtype, key


# ---- tar files ----

NAME = st.text("abcdé.-_ 0", min_size=1, max_size=40).filter(lambda n: n.strip(".") and ".." not in n)


@given(
    st.lists(st.tuples(st.lists(NAME, min_size=1, max_size=5).map("/".join), st.binary(max_size=1500)), max_size=8),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_pythons_library_finds(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, bytes]], form: int
) -> None:
    path = tar(tmp_path_factory.mktemp("tar") / "x.tar", files, form)
    with tarfile.open(path) as archive:
        truth = [(m.name, m.offset_data, m.size) for m in archive]
    assert read_members(path) == truth
    data = path.read_bytes()
    for member, (_, content) in zip(members("x", lambda at, n: data[at : at + n], len(data)), files, strict=True):
        assert member.start == content[: len(member.start)] and len(member.start) >= min(len(content), 512)


def test_folders_and_long_names_in_every_format(tmp_path: Path) -> None:
    directory = tarfile.TarInfo("./a")
    directory.type = tarfile.DIRTYPE
    long = "/".join(["folder" * 8] * 5) + "/x.png"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tar(tmp_path / f"{form}.tar", [(directory, b""), ("./a/x.png", b"1"), (long, b"22")], form)
        assert [(name, size) for name, _, size in read_members(path)] == [("./a/x.png", 1), (long, 2)]


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


HOSTILE = {
    "parent": ([("../x.png", b"1")], "leaves the archive"),
    "parent inside": ([("a/../../x.png", b"1")], "leaves the archive"),
    "absolute": ([("/etc/x.png", b"1")], "absolute name"),
    "symbolic link": ([(special("x.png", tarfile.SYMTYPE, "/etc/passwd"), b"")], "a symbolic link"),
    "hard link": ([(special("x.png", tarfile.LNKTYPE, "y.png"), b"")], "a hard link"),
    "device": ([(special("x.png", tarfile.CHRTYPE), b"")], "a device"),
    "pipe": ([(special("x.png", tarfile.FIFOTYPE), b"")], "a pipe"),
    "the same file twice": ([("x.png", b"1"), ("x.png", b"2")], "in it twice"),
    "the same sample twice": ([("x.png", b"1"), ("y.png", b"2"), ("x.cls", b"3")], "files lie apart"),
    "no image": ([("x.txt", b"1"), ("x.cls", b"3")], "has no image; its files end in txt, cls"),
    "nothing": ([], "holds no sample"),
    "no number of a class": ([("x.png", b"1"), ("x.cls", b"cat")], "not the number of a class"),
    "broken JSON": ([("x.png", b"1"), ("x.json", b"{")], "x.json is not JSON"),
    "boxes without labels": ([("x.png", b"1"), ("x.json", b'{"boxes": [[0,0,1,1]]}')], "must be lists of one length"),
    "boxes as xywh": ([("x.png", b"1"), ("x.json", b'{"boxes": [], "labels": [], "boxes_format": "xywh"}')], "only xyxy"),
    "boxes without a size": ([("x.png", b"1"), ("x.json", b'{"boxes": [], "labels": []}')], "width and height"),
}


@pytest.mark.parametrize(("files", "why"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_members_are_refused_by_name(tmp_path: Path, files: list[tuple[Any, bytes]], why: str, form: int) -> None:
    path = tar(tmp_path / "x.tar", files, form)
    with pytest.raises(ShardError, match=why) as error:
        index_shard(str(path))
    assert str(path) in str(error.value) and error.value.exit_code == 3
    assert sorted(p.name for p in tmp_path.rglob("*")) in ([".trainyard", "x.tar"], ["x.tar"])  # nothing came out of it


def test_notes_and_folders_beside_the_samples_are_passed_over(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "x.tar",
        [("README", b""), ("__note__.json", b"{"), (".DS_Store", b""), ("a/._x.png", b""), ("./a/x.png", png()), ("./a/x.cls", b"1\n")],
    )
    table = index_shard(str(path))
    assert table["key"].all() == [b"a/x"] and table["label"][0] == 1


def test_a_shard_cut_anywhere_is_found(tmp_path: Path) -> None:
    """webdataset itself reads such a file silently short."""
    data = tar(tmp_path / "whole.tar", plain(0, 5)).read_bytes()
    end = data.rstrip(b"\0").__len__() // 512 * 512 + 512  # behind it: the mark of the end, and padding
    path = tmp_path / "cut.tar"
    for length in [*range(0, end + 1024, 173), *range(0, end + 1024, 512)]:
        path.write_bytes(data[:length])
        with pytest.raises(ShardError, match=r"cut short|no header"):
            list(samples(str(path), lambda at, n, length=length: data[:length][at : at + n], length))
    for length in range(end + 1024, len(data) + 1, 512):
        assert len(list(samples("x", lambda at, n, length=length: data[:length][at : at + n], length))) == 5


@given(st.integers(0, 5 * 1024 - 1), st.integers(1, 255))
def test_a_flipped_byte_in_a_header_is_found_or_harmless(position: int, flip: int) -> None:
    """Never fewer samples than there are without an error: a header's checksum covers all of it."""
    files = [(f"s{i}.png", b"x" * 512) for i in range(5)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data = bytearray(buffer.getvalue())
    data[position] ^= flip
    try:
        found = list(samples("x", lambda at, n: bytes(data[at : at + n]), len(data)))
    except ShardError:
        return
    assert [key for key, _ in found] == [f"s{i}" for i in range(5)]


def test_two_archives_in_one_file_are_refused(tmp_path: Path) -> None:
    a, b = (tar(tmp_path / f"{i}.tar", plain(i, 2)) for i in range(2))
    path = tmp_path / "both.tar"
    path.write_bytes(a.read_bytes() + b.read_bytes())
    with pytest.raises(ShardError, match="data behind its end"):
        index_shard(str(path))


# ---- names ----


@pytest.mark.parametrize(
    "pattern", ["a-{000..012}.tar", "a-{8..11}.tar", "{x,y,z}/{1..3}.tar", "plain.tar", "{a,b}{0..1}.tar", "{99..101}"]
)
def test_braces_mean_what_they_mean_to_webdataset(pattern: str) -> None:
    from braceexpand import braceexpand

    assert expand(pattern) == list(braceexpand(pattern))


@pytest.mark.parametrize("pattern", ["a-{000..", "a-}.tar", "{5..1}.tar", "{abc}.tar"])
def test_braces_that_mean_nothing_are_refused(pattern: str) -> None:
    with pytest.raises(LayoutError):
        expand(pattern)


def test_a_directory_tells_splits_apart_and_allows_gaps(tmp_path: Path) -> None:
    config = both(tmp_path)
    assert not list(config.problems())
    assert [os.path.basename(p) for p in config.shards("train").places] == [
        "pets-train-0000.tar",
        "pets-train-0002.tar",
        "pets-train-0004.tar",
    ]
    train, val = config.build("train"), config.build("val")
    assert colours(train) == list(range(12)) and colours(val) == [0, 1, 2, 3]
    assert train.classes == ("cat", "dog") and train.labels().tolist() == [0, 1] * 6  # type: ignore[union-attr]
    assert train.name(5).endswith("pets-train-0002.tar:s005")
    assert config.offers == {"image", "label"} and config.facts().num_train == 12


def test_numbers_in_names_are_ordered_as_numbers(tmp_path: Path) -> None:
    for i in (2, 10, 9, 1):
        tar(tmp_path / f"train-{i}.tar", plain(i, 1))
        tar(tmp_path / f"validation_{i}.tar", plain(i, 1))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    config = WebDatasetConfig(path=str(tmp_path), image_size=8)
    assert colours(config.build("train")) == [1, 2, 9, 10] == colours(config.build("val"))


def test_folders_of_their_own_and_a_class_file_above(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 2)):
        tar(tmp_path / split / "shard-0.tar", plain(0, count))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for config in (
        WebDatasetConfig(path=str(tmp_path), image_size=8),
        WebDatasetConfig(path=str(tmp_path / "train"), val_path=str(tmp_path / "val"), image_size=8),
    ):
        assert not list(config.problems())
        assert (config.facts().num_train, config.facts().num_val) == (5, 2)


def test_cifar_from_folders_and_from_shards_named_in_every_way_is_the_same(shared_data, tmp_path: Path) -> None:
    """Packed by the command line, read by directory, braces and info file, and by the webdataset library."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    small = tmp_path / "small"
    for split in ("train", "val"):
        for name in ("bird", "ship", "frog"):
            (small / split / name).mkdir(parents=True)
            for path in sorted((shared_data / "cifar10" / split / name).iterdir())[:60]:
                os.link(path, small / split / name / path.name) if os.stat(path).st_dev == os.stat(tmp_path).st_dev else shutil.copy(
                    path, small / split / name
                )
    out = tmp_path / "shards"
    assert verbs.shards(["pack", str(small), str(out), "--size", "100KB"]) == 0
    assert {p.name for p in out.iterdir()} == {
        ".trainyard",
        "_info.json",
        "classes.txt",
        *[f"{split}-{i:06}.tar" for split in ("train", "val") for i in range(6)],
    }
    assert all(p.stat().st_size <= 100_000 for p in out.glob("*.tar"))
    braces = {"path": f"{out}/train-{{000000..000005}}.tar", "val_path": f"{out}/val-{{000000..000005}}.tar"}
    no_info = tmp_path / "no_info"
    shutil.copytree(out, no_info, ignore=shutil.ignore_patterns("_info.json", ".trainyard"))
    ways = {
        "directory": {"path": str(no_info)},
        "directory with info": {"path": str(out)},
        "braces": braces,
        "info": {"info": [str(out / "_info.json")]},
        "info of each": {"path": None, "info": [str(out / "_info.json")], "train_split": "train", "val_split": "val"},
    }
    expected = batches_of(ImageFolderConfig(path=str(small), image_size=32))
    for split in ("train", "val"):
        truth = ImageFolderConfig(path=str(small), image_size=32).build(split)
        for way in ways.values():
            config = WebDatasetConfig(image_size=32, **way)  # type: ignore[arg-type]
            assert not list(config.problems())
            source = config.build(split)
            assert len(source) == len(truth) == 180 and source.classes == truth.classes
            np.testing.assert_array_equal(source.labels(), truth.labels())  # type: ignore[arg-type]
            for i in range(180):
                assert encoded(source, i) == encoded(truth, i)  # the very bytes
            if split == "val":
                found = batches_of(config)
                assert len(found) == len(expected) == 15 and all(equal(a, b) for a, b in zip(found, expected, strict=True))
        read = 0
        for path in sorted(out.glob(f"{split}-*.tar")):
            with open(path, "rb") as stream:
                for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                    assert (sample["jpg"], int(sample["cls"])) == (encoded(truth, read)[0], truth.labels()[read])  # type: ignore[index]
                    read += 1
        assert read == 180


def batches_of(config: DatasetConfig) -> list[dict[str, Any]]:
    """Two epochs of training, and validation, as a run reads them."""
    order, basic = Order(180, 3, 32, drop_last=False), Basic(hflip=0.5, crop_scale=[0.2, 1.0], val_crop=1.0, erasing=0.5)
    training = batches(12, order, source=config.build("train"), augmentation=basic.build(config, train=True), workers=1)
    return training + take(validation_loader(config.build("val"), basic.build(config, train=False), Rank(), batch_size=64))


def test_info_files_of_birder_and_timm_joined(tmp_path: Path) -> None:
    """birder names its splits training and validation, timm's on the hub are train and validation."""
    for part, name in (("a", "training"), ("b", "train")):
        tar(tmp_path / part / "x-0.tar", plain(0, 3))
        tar(tmp_path / part / "x-1.tar", plain(3, 2))
        tar(tmp_path / part / "v.tar", plain(7, 1))
        splits = {
            name: {"name": name, "filenames": ["x-0.tar", "x-1.tar"], "shard_lengths": [3, 2], "num_samples": 5},
            "validation": {"name": "validation", "filenames": [str(tmp_path / part / "v.tar")], "shard_lengths": [1], "num_samples": 1},
        }
        (tmp_path / part / "_info.json").write_text(json.dumps({"name": part, "splits": splits}))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    config = WebDatasetConfig(info=[str(tmp_path / p / "_info.json") for p in "ab"], image_size=8)
    assert not list(config.problems())
    assert colours(config.build("train")) == [0, 1, 2, 3, 4] * 2 and colours(config.build("val")) == [7, 7]
    config.train_split = "train"
    assert colours(config.build("train")) == [0, 1, 2, 3, 4]
    lines = [f"dataset.info=[{','.join(config.info)}]", "dataset.image_size=32", "augmentation=basic", "loop.batch_size=64"]
    _, problems = checked(compose(["dataset=webdataset", *lines]))
    assert any(p.key == "loop.batch_size" for p in problems), "what the info says of the data is held against the run, without a path too"
    config.train_split = "nope"
    (problem,) = config.problems()
    assert problem.key == "dataset.info" and "no split nope; there are training, validation, train" in problem.reason


def info_files(root: Path, **entries: dict[str, Any]) -> list[str]:
    """One file for each training entry; all validate on the same shard, which only the first lists."""
    tar(root / "v.tar", plain(7, 1))
    (root / "classes.txt").write_text("a\nb\n")
    for i, (name, entry) in enumerate(entries.items()):
        val = {} if i else {"val": {"filenames": ["v.tar"], "num_samples": 1}}
        (root / f"{name}.json").write_text(json.dumps({"splits": {"train": entry} | val}))
    return [str(root / f"{name}.json") for name in entries]


def test_an_info_file_that_tells_no_number_says_nothing_of_all(tmp_path: Path) -> None:
    for i in range(3):
        tar(tmp_path / f"x-{i}.tar", plain(3 * i, 3))
    told = {"filenames": ["x-0.tar"], "shard_lengths": [3], "num_samples": 3}
    config = WebDatasetConfig(info=info_files(tmp_path, told=told, bare={"filenames": ["x-1.tar", "x-2.tar"]}), image_size=8)
    assert not list(config.problems())
    assert config.shards("train").size is None and config.shards("train").lengths is None and config.shards("val").size == 1
    assert colours(config.build("train")) == [*range(9)]
    config.streaming = True
    (problem,) = config.problems()
    assert problem.key == "dataset.train_size" and "that no info file tells" in problem.reason
    config.train_size = 9
    assert not list(config.problems()) and len(config.build("train")) == 9


def test_a_shard_that_two_info_files_list_is_noticed(tmp_path: Path) -> None:
    for i in range(2):
        tar(tmp_path / f"x-{i}.tar", plain(3 * i, 3))
    entries = {"a": {"filenames": ["x-0.tar", "x-1.tar"]}, "b": {"filenames": [f"../{tmp_path.name}/x-1.tar"]}}
    config = WebDatasetConfig(info=info_files(tmp_path, **entries), image_size=8)
    (problem,) = config.problems()
    assert problem.key == "dataset.info" and f"{tmp_path / 'x-1.tar'} is listed more than once" in problem.reason


# ---- what is wrong ----


def info(config: WebDatasetConfig, root: Path, **changes: Any) -> None:
    names = [os.path.basename(p) for p in config.shards("train").places]
    entry = {"filenames": names, "shard_lengths": [4, 4, 4], "num_samples": 12} | changes
    val = {"filenames": ["pets-val-0000.tar"], "shard_lengths": [4], "num_samples": 4}
    (root / "_info.json").write_text(json.dumps({"splits": {"train": entry, "val": val}}))


def spoil_path(**changes: Any):
    def spoil(config: WebDatasetConfig, root: Path) -> None:
        for key, value in changes.items():
            setattr(config, key, value.replace("ROOT", str(root)) if isinstance(value, str) else value)

    return spoil


def remove(name: str):
    return lambda config, root: [p.unlink() for p in root.glob(name)]


def rename(old: str, new: str):
    return lambda config, root: (root / old).rename(root / new)


def classes(text: str):
    return lambda config, root: (root / "classes.txt").write_text(text)


BROKEN = {
    "no directory": (spoil_path(path="ROOT/x"), "dataset.path", "no such directory"),
    "no shards": (remove("*.tar"), "dataset.path", "holds no .tar file"),
    "no val shards": (remove("*val*.tar"), "dataset.path", "none with val or valid or validation in its name"),
    "a name of two splits": (rename("pets-val-0000.tar", "pets-val-train.tar"), "dataset.path", "speaks of several splits"),
    "braces for what is not there": (
        spoil_path(path="ROOT/pets-train-{0000..0002}.tar", val_path="ROOT/pets-val-0000.tar"),
        "dataset.path",
        "1 of the 3 shards named are missing",
    ),
    "braces without val_path": (spoil_path(path="ROOT/pets-train-0000.tar"), "dataset.path", "dataset.val_path must name"),
    "the same shard twice": (
        spoil_path(path="ROOT/pets-train-0000.tar::ROOT/pets-train-0000.tar", val_path="ROOT/pets-val-0000.tar"),
        "dataset.path",
        "more than once",
    ),
    "no class file": (remove("classes.txt"), "dataset.class_file", "no class file"),
    "a class file elsewhere": (spoil_path(class_file="ROOT/names.txt"), "dataset.class_file", "No such file"),
    "a class file too short": (classes("cat\n"), "dataset.class_file", "names 1 classes, but the train shards hold the class 1"),
    "an empty class file": (classes(""), "dataset.class_file", "is empty"),
    "more samples than there are": (spoil_path(train_size=13), "dataset.train_size", "hold 12 samples only"),
    "info that promises more": (
        lambda config, root: info(config, root, num_samples=13, shard_lengths=[4, 5, 4]),
        "dataset.train_size",
        "promises 13 samples, but the shards hold 12; they differ in",
    ),
    "info that lists a missing shard": (
        lambda config, root: info(config, root, filenames=["gone.tar"] * 3),
        "dataset.info",
        "3 of the 3 shards listed are missing",
    ),
    "info that does not add up": (
        lambda config, root: info(config, root, shard_lengths=[12]),
        "dataset.info",
        "lists 3 filenames, but 1 shard_lengths",
    ),
    "info without filenames": (lambda config, root: info(config, root, filenames=[]), "dataset.info", "lists no `filenames`"),
    "info that is no JSON": (lambda config, root: (root / "_info.json").write_text("{"), "dataset.info", "is not JSON"),
    "a missing info": (spoil_path(info=["ROOT/nope.json"]), "dataset.info", "No such file"),
    "balance of a stream": (
        spoil_path(streaming=True, class_balanced=True, train_size=12, val_size=4),
        "dataset.class_balanced",
        "not known before they are read",
    ),
}


@pytest.mark.parametrize(("spoil", "key", "reason"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_said_before_anything_is_read(tmp_path: Path, spoil, key: str, reason: str) -> None:
    config = both(tmp_path)
    assert not list(config.problems())
    spoil(config, tmp_path)
    problems = [p for p in config.problems() if p.key == key]
    assert problems and reason in problems[0].reason, list(config.problems())


def test_sizes_given_win_over_what_the_info_says(tmp_path: Path) -> None:
    config = both(tmp_path)
    info(config, tmp_path, num_samples=1000, shard_lengths=[4, 4, 992])
    assert [p.key for p in config.problems()] == ["dataset.train_size"]
    config.train_size = 10
    assert not list(config.problems())
    assert config.facts().num_train == 10 and colours(config.build("train")) == list(range(10))


def test_a_cut_shard_ends_a_run_before_it_begins(tmp_path: Path) -> None:
    config = both(tmp_path)
    assert not list(config.problems())
    path = tmp_path / "pets-train-0002.tar"
    path.write_bytes(path.read_bytes()[:2500])
    with pytest.raises(DataError, match=r"pets-train-0002.tar: is cut short") as error:
        list(config.problems())
    assert error.value.exit_code == 3
    assert config.offers == {"image", "label"}  # asking what it offers does not fail


def test_only_a_shard_that_changed_is_scanned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainer.data.shards.index as index

    config = both(tmp_path)
    for path in tmp_path.iterdir():
        os.utime(path, ns=(0, 10 * SETTLED))
    scanned: list[str] = []
    real = index._scan_shard
    monkeypatch.setattr(index, "_scan_shard", lambda place, watch: (scanned.append(os.path.basename(place)), real(place, watch))[1])
    before = config.build("train").fingerprint
    assert len(scanned) == 3
    assert config.build("train").fingerprint == before and len(scanned) == 3
    tar(tmp_path / "pets-train-0002.tar", plain(50, 4))
    os.utime(tmp_path / "pets-train-0002.tar", ns=(0, 20 * SETTLED))
    assert config.build("train").fingerprint != before and scanned[3:] == ["pets-train-0002.tar"]


def test_a_shard_that_is_replaced_during_a_run_is_not_read_as_if_it_were_the_old_one(tmp_path: Path) -> None:
    config = both(tmp_path)
    source = pickle.loads(pickle.dumps(config.build("train")))
    tar(tmp_path / "pets-train-0000.tar", plain(30, 40))
    with pytest.raises(DataError, match="changed since the run began"):
        source[0]
    (tmp_path / "pets-train-0002.tar").unlink()
    with pytest.raises(BadSample, match="No such file"):
        source[4]


def test_bad_images_and_missing_labels(tmp_path: Path) -> None:
    config = both(tmp_path)
    tar(tmp_path / "pets-train-0000.tar", [("a.jpg", b"no image"), ("a.cls", b"0"), ("b.png", b""), ("b.cls", b"1")])
    source = config.build("train")
    for i, why in ((0, "not an image"), (1, "0 bytes")):
        with pytest.raises(BadSample, match=why) as error:
            source[i]
        assert f"pets-train-0000.tar:{'ab'[i]}" in error.value.name
    tar(tmp_path / "pets-train-0000.tar", [("a.png", png()), ("b.png", png())])
    with pytest.raises(ShardError, match="2 samples have no label while others do, the first: 'a'"):
        config.build("train")
    for path in tmp_path.glob("*.tar"):
        tar(path, [("a.png", png()), ("b.png", png())])
    assert not list(config.problems()) and config.offers == {"image"}
    assert set(config.build("train")[0]) == {"image"} and config.build("train").labels() is None


def test_many_shards_do_not_exhaust_descriptors_and_a_fork_reads_on(tmp_path: Path) -> None:
    for i in range(60):
        tar(tmp_path / f"train-{i}.tar", plain(i, 1))
        tar(tmp_path / f"val-{i}.tar", plain(i, 1))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    source = WebDatasetConfig(path=str(tmp_path), image_size=8).build("train")
    before = len(os.listdir("/proc/self/fd"))
    assert colours(source) == list(range(60))
    assert len(os.listdir("/proc/self/fd")) <= before + 35
    child = os.fork()
    if child == 0:
        os._exit(0 if colours(source) == list(range(60)) else 1)
    assert colours(source) == list(range(60))
    assert os.waitpid(child, 0)[1] == 0


# ---- packing ----


def every_kind(root: Path, shared_data) -> dict[str, tuple[DatasetConfig, str]]:
    (root / "ms").mkdir()
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / "ms" / kind / split).mkdir(parents=True)
        for i in range(3):
            np.save(root / "ms" / "images" / split / f"{i}.npy", random.integers(0, 999, (20, 30, 5)).astype(np.uint16))
            (root / "ms" / "labels" / split / f"{i}.txt").write_text("1 0.5 0.5 0.3 0.4\n" * i)
    (root / "ms" / "classes.txt").write_text("a\nb\n")
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / "shift" / split / name).mkdir(parents=True)
            (root / "shift" / split / name / "x.png").write_bytes(png(3))
    return {
        "coco": (CocoConfig(path=str(shared_data / "bccd"), image_size=64), "val"),
        "cub": (CubConfig(path=str(shared_data / "cub10"), image_size=64), "val"),
        "multispectral": (MultispectralConfig(path=str(root / "ms"), image_size=64, channels=5, mean=[0.5] * 5, std=[0.5] * 5), "train"),
        "digit_parts": (DigitPartsConfig(image_size=64, source_size=64, num_train=12), "train"),
        "digit_scenes": (DigitScenesConfig(image_size=64, source_size=96, num_train=12), "train"),
        "meta_shift": (MetaShiftConfig(path=str(root / "shift"), image_size=64, val_folder="test"), "train"),
    }


@pytest.mark.parametrize("kind", ["coco", "cub", "multispectral", "digit_parts", "digit_scenes", "meta_shift"])
def test_whatever_is_packed_is_read_back_the_same(tmp_path: Path, shared_data, kind: str) -> None:
    config, split = every_kind(tmp_path, shared_data)[kind]
    truth = config.build(split)
    packed = pack(truth, tmp_path / "out", "train", size=300_000)
    shutil.copy(tmp_path / "out" / packed.shards[-1], tmp_path / "out" / "val-0.tar")
    (tmp_path / "out" / "_info.json").unlink()
    web = WebDatasetConfig(path=str(tmp_path / "out"), image_size=64)
    assert not list(web.problems())
    source = web.build("train")
    truth = config.build(split)
    assert len(source) == len(truth) == packed.samples and source.classes == tuple(truth.classes) and source.channels == truth.channels
    for i in range(0, len(truth), max(len(truth) // 8, 1)):
        assert_same(source[i], {name: value for name, value in truth[i].items() if name != "truth"})  # which is for validation
        if encoded(truth, i):
            assert encoded(source, i) == encoded(truth, i)
    assert web.offers == set(truth[0]) - {"image_id", "crowd", "area", "labels", "truth"}
    if split == "val":  # a copy of the last shard
        val = web.build("val")
        for i in range(len(val)):
            assert_same(val[i], truth[len(truth) - len(val) + i])


SETTINGS = {"meta_shift": ["val_folder=test"], "multispectral": ["channels=5", "mean=[0.5,0.5,0.5,0.5,0.5]", "std=[0.2,0.2,0.2,0.2,0.2]"]}


@pytest.mark.parametrize("name", sorted(layouts.LAYOUTS))
def test_every_layout_packed_by_the_command_line_is_read_back_the_same(name: str, tmp_path: Path) -> None:
    layouts.LAYOUTS[name](tmp_path / "data")
    settings, out = SETTINGS.get(name, []), tmp_path / "out"
    assert verbs.shards(["pack", str(tmp_path / "data"), str(out), *settings, "--dataset", name, "--size", "20KB"]) == 0
    config = verbs.dataset_config(name, {"path": str(tmp_path / "data")}, settings)
    web = WebDatasetConfig(path=str(out), image_size=224)
    assert not list(web.problems())
    for split, count in (("train", layouts.TRAIN), ("val", layouts.VAL)):
        truth, source = config.build(split), web.build(split)
        assert len(source) == len(truth) == count and source.classes == tuple(truth.classes)
        assert len(web.shards(split).places) > 1
        for i in range(count):
            assert_same(source[i], truth[i])
            assert encoded(source, i) == encoded(truth, i)
    assert web.offers == set(truth[0]) - {"image_id", "crowd", "area", "labels", "truth"}


def test_birders_detection_shards(tmp_path: Path) -> None:
    """As birder's pack_detection writes them: labels from 1, and one box that cannot be right."""
    described = {
        "image_id": 42,
        "file_name": "x.jpg",
        "width": 6,
        "height": 5,
        "boxes": [[0, 0, 3, 4], [1, 1, 1, 3], [2, 2, 9, 5]],
        "labels": [2, 1, 1],
        "area": [12, 0, 9],
        "iscrowd": [0, 0, 1],
        "annotation_ids": [7, 8, 9],
        "boxes_format": "xyxy",
    }
    for split in ("train", "val"):
        tar(
            tmp_path / f"d-{split}-0.tar",
            [
                ("sample000000000.png", png()),
                ("sample000000000.json", json.dumps(described).encode()),
                ("sample000000001.png", png()),
                ("sample000000001.json", b'{"width": 6, "height": 5, "boxes": [], "labels": []}'),
            ],
        )
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    config = WebDatasetConfig(path=str(tmp_path), image_size=8)
    assert not list(config.problems()) and config.offers == {"image", "boxes"}
    train, val = config.build("train"), config.build("val")
    assert train[0]["boxes"].tolist() == [[0, 0, 3, 4]] and train[0]["labels"].tolist() == [1] and train[0]["image_id"] == 42
    assert val[0]["boxes"].tolist() == [[0, 0, 3, 4], [2, 2, 6, 5]] and val[0]["crowd"].tolist() == [False, True]
    assert train[1]["boxes"].shape == (0, 4)
    config.bad_boxes = "raise"
    with pytest.raises(DataError, match=r"sample000000000 \(id 42\)"):
        config.build("train")
    config.bad_boxes = "clip"
    (tmp_path / "classes.txt").write_text("cat\n")
    assert [p.key for p in config.problems()] == ["dataset.class_file"] * 2


class Interrupted(Exception):
    pass


def pets(root: Path, count: int = 40) -> ImageFolderConfig:
    for split in ("train", "val"):
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count // 2):
                (root / split / name / f"{i:03}.png").write_bytes(png(i + 100 * c))
    return ImageFolderConfig(path=str(root), image_size=8)


@pytest.mark.parametrize("shuffle", [None, 3])
@pytest.mark.parametrize("stop", [0, 1, 13, 39])
def test_packing_that_broke_off_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, shuffle: int | None
) -> None:
    import trainer.data.shards.pack as packing

    config = pets(tmp_path / "pets")
    options: dict[str, Any] = {"size": 20_480, "shuffle": shuffle}
    whole = pack(config.build("train"), tmp_path / "whole", "train", **options)
    assert len(whole.shards) > 2
    real, calls = packing.sample_members, 0

    def counted(*arguments: Any) -> dict[str, bytes]:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise Interrupted
        return real(*arguments)

    monkeypatch.setattr(packing, "sample_members", counted)
    with pytest.raises(Interrupted):
        pack(config.build("train"), tmp_path / "broken", "train", **options)
    assert not (tmp_path / "broken" / "_info.json").exists()  # nobody takes it for whole
    monkeypatch.setattr(packing, "sample_members", real)
    assert pack(config.build("train"), tmp_path / "broken", "train", **options) == whole
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "broken") for p in (tmp_path / "broken").rglob("*") if p.is_file())
    for path in files:
        if path.name != "_info.json":  # it names the folder
            assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "broken" / path).read_bytes()


def test_shuffled_packing_keeps_every_sample(tmp_path: Path) -> None:
    config = pets(tmp_path / "pets")
    packed = pack(config.build("train"), tmp_path / "out", "train", shuffle=1)
    table = index_shards([str(tmp_path / "out" / s) for s in packed.shards], "clip")
    labels = np.asarray(table["label"])
    assert sorted(labels.tolist()) == [0] * 20 + [1] * 20 and labels[:20].any()


def test_a_second_split_joins_the_first_and_others_are_refused(tmp_path: Path) -> None:
    config, out = pets(tmp_path / "pets"), tmp_path / "out"
    pack(config.build("train"), out, "train", size=20_480)
    pack(config.build("val"), out, "val")
    told = json.loads((out / "_info.json").read_text())["splits"]
    assert set(told) == {"train", "val"} and told["train"]["num_samples"] == sum(told["train"]["shard_lengths"]) == 40
    assert (out / "classes.txt").read_text() == "cat\ndog\n"
    other = SyntheticConfig(image_size=8, num_classes=3, num_train=5).build("train")
    with pytest.raises(ConfigError, match="lists 2 classes, the source has 3"):
        pack(other, out, "train")
    with pytest.raises(ConfigError, match="holds a split of that name"):
        pack(config.build("train"), out, "train", size=50_000)
    before = sorted(out.glob("train*"))
    pack(config.build("train"), out, "train", size=50_000, overwrite=True)
    assert sorted(out.glob("train*")) != before
    assert not list(WebDatasetConfig(path=str(out), image_size=8).problems())


def test_samples_that_cannot_be_read_are_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pets(tmp_path / "pets", 6)
    (tmp_path / "pets" / "train" / "cat" / "001.png").write_bytes(b"")
    (tmp_path / "pets" / "train" / "dog" / "002.png").write_bytes(png(5, (80, 80))[:-60])
    assert verbs.shards(["pack", str(tmp_path / "pets"), str(tmp_path / "a"), "--split", "train"]) == 0
    told = capsys.readouterr()
    assert "train: 5 samples" in told.out and "001.png: the file is empty" in told.err and "002.png" not in told.err
    assert verbs.shards(["pack", str(tmp_path / "pets"), str(tmp_path / "b"), "--split", "train", "--verify"]) == 0
    told = capsys.readouterr()
    assert "train: 4 samples" in told.out and "002.png" in told.err


@pytest.mark.parametrize(("text", "size"), [("400MB", 400_000_000), ("1.5 GiB", 1610612736), ("1000", 1000), ("64kb", 64_000)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "five", "10 parsecs", "0"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--size"):
        parse_size(text)


# ---- the command line ----


def test_index_tells_what_is_there_and_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = both(tmp_path)
    assert verbs.shards(["index", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "train: 12 samples in 3 shards (4 to 4 each); they hold image, label" in told and "val: 4 samples in 1 shards" in told
    info(config, tmp_path, shard_lengths=[4, 5, 4])
    with pytest.raises(ConfigError, match=r"promises 5 samples in .*pets-train-0002.tar, which holds 4"):
        verbs.shards(["index", str(tmp_path)])
    with pytest.raises(ConfigError, match="No such file"):
        verbs.shards(["index", str(tmp_path / "nowhere")])


def test_any_dataset_is_packed_by_name_with_its_settings(tmp_path: Path, shared_data, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "pack",
        str(shared_data / "cifar10" / "val"),
        str(tmp_path / "out"),
        "val_fraction=0.2",
        "--split",
        "val",
        "dataset.split_seed=3",
    ]
    assert verbs.shards(arguments) == 0
    assert "val: 400 samples" in capsys.readouterr().out
    for wrong, message in (
        (["--dataset", "coca"], "--dataset coco"),
        (["val_fractoin=1"], "val_fractoin"),
        (["val_fraction=x"], "val_fraction"),
    ):
        with pytest.raises(ConfigError, match=message):
            verbs.shards(["pack", "x", "y", *wrong])
    with pytest.raises(ConfigError, match="no such directory"):
        verbs.shards(["pack", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        verbs.shards(["pack", "x", "y", "--sizes", "3"])


def test_looking_at_shards_imports_no_torch(tmp_path: Path) -> None:
    """Checking a run, streams too, stays fast."""
    both(tmp_path)
    code = f"""
import sys
from trainer.data.config import WebDatasetConfig
for streaming in (False, True):
    config = WebDatasetConfig(path={str(tmp_path)!r}, image_size=8, streaming=streaming, train_size=12, val_size=4)
    assert not list(config.problems()) and config.facts().num_train == 12
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
