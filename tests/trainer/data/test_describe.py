"""Folders divided, and data described."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.config import CocoConfig, DigitsConfig, ImageFolderConfig, SyntheticConfig
from trainer.data.describe import BAD_SHOWN, describe, describe_source, shared_between
from trainer.data.shards import split as splitting
from trainer.data.shards import verbs
from trainer.errors import ConfigError, StorageError


def png(shade: int, size: tuple[int, int] = (6, 5)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 2 * shade % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def classes(root: Path, counts: dict[str, int]) -> Path:
    shade = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03}.png").write_bytes(png(shade))
            shade += 1
    return root


def tree(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir() and ".trainyard" not in p.parts}


@pytest.mark.parametrize("how", ["link", "symlink", "copy"])
def test_a_folder_is_divided_class_by_class_as_val_fraction_divides_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    source = classes(tmp_path / "pets", {"cat": 20, "dog": 31})
    before = tree(source)
    assert verbs.split([str(source), "--val", "0.2", "--seed", "5", "--how", how]) == 0
    out = tmp_path / "pets-split"
    assert f"41 images to train on and 10 to validate on: dataset=image_folder dataset.path={out}" in capsys.readouterr().out
    assert tree(source) == before  # the folder itself is left alone
    assert {name.split("/", 1)[1] for name in tree(out)} == before and len(tree(out)) == 51
    assert len(list((out / "val" / "cat").iterdir())) == 4 and len(list((out / "val" / "dog").iterdir())) == 6
    for name in tree(out):
        assert (out / name).read_bytes() == (source / name.split("/", 1)[1]).read_bytes()
        assert (out / name).is_symlink() == (how == "symlink")
    virtual = ImageFolderConfig(path=str(source), image_size=8, val_fraction=0.2, split_seed=5).build("val")
    real = ImageFolderConfig(path=str(out), image_size=8)
    assert not list(real.problems())
    assert {os.path.relpath(virtual.name(i), source) for i in range(10)} == {
        os.path.relpath(real.build("val").name(i), out / "val") for i in range(10)
    }


def test_dividing_that_broke_off_goes_on_and_does_not_mix_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = classes(tmp_path / "pets", {"cat": 9, "dog": 9}), tmp_path / "out"
    copies = 0

    def failing(a: str, b: str) -> None:
        nonlocal copies
        copies += 1
        Path(b).write_bytes(b"half")
        if copies == 7:
            raise OSError(28, "No space left on device", b)
        Path(b).write_bytes(Path(a).read_bytes())

    monkeypatch.setitem(splitting.HOW, "copy", failing)
    with pytest.raises(StorageError, match="No space left"):
        verbs.split([str(source), "--out", str(out), "--how", "copy"])
    monkeypatch.setitem(splitting.HOW, "copy", lambda a, b: Path(b).write_bytes(Path(a).read_bytes()))
    assert verbs.split([str(source), "--out", str(out), "--how", "copy"]) == 0
    assert len(tree(out)) == 18 and all((out / name).read_bytes().startswith(b"\x89PNG") for name in tree(out))
    with pytest.raises(ConfigError, match="which this division does not put there"):
        verbs.split([str(source), "--out", str(out), "--seed", "1"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["nowhere"], "no such directory"), (["empty"], "holds no image"), (["empty", "--val", "1"], "between 0 and 1")],
)
def test_what_cannot_be_divided_is_refused(tmp_path: Path, arguments: list[str], reason: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=reason):
        verbs.split([str(tmp_path / arguments[0]), *arguments[1:]])


def test_the_moments_are_those_of_all_pixels() -> None:
    source = DigitsConfig(image_size=8).build("val")
    pixels = np.stack([np.asarray(source[i]["image"]) for i in range(len(source))]) / 255.0
    found = describe_source(source, "val")
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(found.std, pixels.std(axis=(0, 1, 2)), atol=1e-6)
    assert found.counts == np.bincount(source.labels()).tolist() and found.looked_at == found.samples == 359  # type: ignore[arg-type]
    assert (found.sizes == 8).all() and not found.bad


def test_duplicates_bad_files_and_images_in_both_splits_are_told(tmp_path: Path) -> None:
    classes(tmp_path / "train", {"cat": 4, "dog": 3})
    classes(tmp_path / "val", {"cat": 1, "dog": 1})
    (tmp_path / "val" / "dog" / "000.png").write_bytes(png(200, (9, 30)))
    (tmp_path / "train" / "dog" / "copy.png").write_bytes(png(0))
    (tmp_path / "train" / "dog" / "bad.png").write_bytes(b"not at all")
    lines: list[str] = []
    train, val = describe(ImageFolderConfig(path=str(tmp_path), image_size=8), tmp_path / "out", say=lines.append)
    text = "\n".join(lines)
    assert train.counts == [4, 5] and len(train.bad) == 1 and [len(names) for names in train.duplicates] == [2]
    assert "1 duplicates" in text and "1 that cannot be read" in text and "bad.png: not an image" in text
    assert [Path(a).name for a, _ in shared_between(train, val)] == ["000.png"] and "1 images are in both splits" in text
    assert "width 6 to 9" in text and "height 5 to 30" in text
    with Image.open(tmp_path / "out" / "data.png") as drawing:
        assert drawing.size[0] > 500


def test_every_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    classes(tmp_path / "train", {"cat": 4})
    classes(tmp_path / "val", {"cat": 2})
    for split, count in (("train", BAD_SHOWN + 13), ("val", 2)):
        for i in range(count):
            (tmp_path / split / "cat" / f"bad{i:02}.png").write_bytes(b"not at all")
    config = ImageFolderConfig(path=str(tmp_path), image_size=8)
    lines: list[str] = []
    describe(config, tmp_path / "out", say=lines.append)
    listed = (tmp_path / "out" / "bad.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in listed] == [
        str(tmp_path / split / "cat" / f"bad{i:02}.png") for split, count in (("train", BAD_SHOWN + 13), ("val", 2)) for i in range(count)
    ]
    assert all("not an image" in line for line in listed)
    assert f"all {len(listed)} that cannot be read: {tmp_path / 'out' / 'bad.txt'}" in lines and "    … and 13 more" in lines


def test_a_limit_spreads_over_the_whole_split_and_channels_may_be_any(tmp_path: Path) -> None:
    lines: list[str] = []
    config = SyntheticConfig(image_size=8, num_train=100, num_val=3, channels=5)
    train, val = describe(config, limit=10, say=lines.append)
    assert train.looked_at == 10 and val.looked_at == 3 and train.mean.shape == (5,)
    assert "100 samples (10 of them looked at)" in lines[0]


def test_objects_are_counted_where_there_are_boxes(shared_data) -> None:
    lines: list[str] = []
    train, _ = describe(CocoConfig(path=str(shared_data / "bccd"), image_size=64), limit=5, say=lines.append)
    assert train.objects == [209, 2381, 214] and train.counts is None
    assert any("objects a class: 209 to 2381, RBC 2381, WBC 214, Platelets 209" in line for line in lines)
