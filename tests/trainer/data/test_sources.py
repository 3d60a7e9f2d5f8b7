"""Embedded sources and image folders: what they hold, what they refuse, and what bad files become."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import trainer.data.images as images
from trainer.data.config import DigitPartsConfig, DigitScenesConfig, DigitsConfig, ImageFolderConfig, MetaShiftConfig, SyntheticConfig
from trainer.data.images import decode, open_image, read_image
from trainer.data.source import BadSample, Source, Subset, encoded, split_rows

EMBEDDED = {
    "digits": DigitsConfig(image_size=32),
    "synthetic": SyntheticConfig(image_size=48, num_train=50, num_val=20, num_classes=7),
    "synthetic, five channels": SyntheticConfig(image_size=16, num_train=20, num_val=10, channels=5),
    "digit_scenes": DigitScenesConfig(image_size=64, source_size=80, num_train=40, num_val=20),
    "digit_parts": DigitPartsConfig(image_size=64, source_size=64, num_train=40, num_val=20),
}


def same(a: object, b: object) -> bool:
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def jpeg(size: tuple[int, int] = (12, 8), shade: int = 0, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(shade).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def folder(root: Path, counts: dict[str, int]) -> Path:
    """Class folders of small JPEGs."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03}.jpg").write_bytes(jpeg(shade=100 * label + i))
    return root


@pytest.mark.parametrize("config", EMBEDDED.values(), ids=EMBEDDED)
def test_an_embedded_source_is_the_same_each_time_and_in_every_process(config) -> None:
    assert not list(config.problems())
    facts = config.facts()
    for split, count in (("train", facts.num_train), ("val", facts.num_val)):
        source = config.build(split)
        assert isinstance(source, Source)
        again = pickle.loads(pickle.dumps(source))
        assert len(source) == count and len(source.classes) == facts.num_classes and source.channels == facts.channels
        assert source.fingerprint == again.fingerprint == config.build(split).fingerprint
        assert len({source.name(i) for i in range(len(source))}) == count
        labels = source.labels()
        for i in (0, 7, count - 1):
            sample, other = source[i], again[i]
            assert sample.keys() == other.keys() >= config.offers
            assert all(same(sample[key], other[key]) for key in sample)
            assert labels is None or labels[i] == sample["label"]
        for beyond in (count, count + 100):
            with pytest.raises(IndexError):
                source[beyond]
    train, val = config.build("train"), config.build("val")
    assert train.fingerprint != val.fingerprint
    assert not same(train[0]["image"], val[0]["image"])


@pytest.mark.parametrize("key", ["path", "val_path"])
def test_an_embedded_source_takes_no_path(key: str) -> None:
    (problem,) = DigitsConfig(image_size=8, **{key: "/data/mine"}).problems()  # type: ignore[arg-type]
    assert problem.key == f"dataset.{key}" and "reads no files" in problem.reason


def test_the_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = np.asarray(pixels).reshape(-1, 8, 8)
    seen: dict[int, tuple[np.ndarray, int]] = {}
    for split in ("train", "val"):
        source = DigitsConfig(image_size=32).build(split)
        for i in range(len(source)):
            row = int(source.name(i).rpartition("/")[2])
            assert row not in seen
            seen[row] = np.asarray(source[i]["image"]), source[i]["label"]
    assert len(seen) == 1797
    for row, (image, label) in seen.items():
        assert label == targets[row]
        np.testing.assert_allclose(image, np.repeat(images[row][..., None], 3, axis=2) * 255 / 16, atol=0.5)


def test_digits_are_read_without_importing_scikit_learns_datasets() -> None:
    code = "import sys; from trainer.data.formats.embedded import Digits; Digits('train')[0]; sys.exit('sklearn' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_schemas_import_nothing_heavy() -> None:
    code = "import sys, trainer.data.config; sys.exit(', '.join({'torch', 'numpy', 'PIL', 'webdataset', 'fsspec', 'yaml'} & set(sys.modules) - {'yaml'}) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_synthetic_classes_can_be_told_apart_by_a_linear_model() -> None:
    config = SyntheticConfig(image_size=16, num_train=300, num_val=100, num_classes=5)

    def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
        source = config.build(split)
        pixels = np.stack([np.asarray(source[i]["image"]).reshape(-1) for i in range(len(source))]) / 255.0
        labels = source.labels()
        assert labels is not None
        return pixels, labels

    (x, y), (x_val, y_val) = arrays("train"), arrays("val")
    means = np.stack([x[y == c].mean(axis=0) for c in range(5)])
    guess = ((x_val[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == y_val).mean() > 0.95


def test_the_boxes_of_digit_scenes_are_exact() -> None:
    """On black, every bright pixel lies in exactly one box, and every box touches bright pixels on all four sides."""
    source = DigitScenesConfig(image_size=64, source_size=72, noise=0.0, num_train=60).build("train")
    counts = []
    for i in range(len(source)):
        sample = source[i]
        bright = np.asarray(sample["image"]).max(axis=2) > 0
        cover = np.zeros(bright.shape, dtype=int)
        for x1, y1, x2, y2 in sample["boxes"].astype(int):
            cover[y1:y2, x1:x2] += 1
            inside = bright[y1:y2, x1:x2]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        assert (cover[bright] == 1).all() and cover.max() == 1
        np.testing.assert_array_equal(sample["area"], [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in sample["boxes"]])
        counts.append(len(sample["boxes"]))
    assert set(counts) == {1, 2, 3, 4}


@pytest.mark.parametrize(("share", "fewest", "most"), [(0.0, 0, 0), (0.2, 8, 24), (1.0, 80, 80)])
def test_the_parts_of_digit_parts_lie_where_their_masks_are(share: float, fewest: int, most: int) -> None:
    source = DigitPartsConfig(image_size=64, source_size=64, noise=0.0, num_train=80, hidden=share).build("train")
    hidden = 0
    for i in range(len(source)):
        sample = source[i]
        mask = sample["mask"]
        np.testing.assert_array_equal(mask > 0, np.asarray(sample["image"]).max(axis=2) > 0)
        for part, (x, y, visible) in enumerate(sample["parts"]):
            rows, columns = np.nonzero(mask == part + 1)
            assert bool(visible) == bool(len(rows))
            hidden += not visible
            if visible:  # the digit's square is at most 8 / 5 times its ink, and its centre is the square's
                assert abs(columns.mean() - x) < 5 and abs(rows.mean() - y) < 5
        rows, columns = np.nonzero(mask)
        np.testing.assert_array_equal(sample["box"], [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert fewest <= hidden <= most
    assert len(source.classes) == 8 == len(set(source.classes))


def test_a_split_by_class_is_disjoint_whole_and_stable() -> None:
    labels = np.random.default_rng(0).integers(0, 6, 200)
    labels[0] = 6  # a class of one sample
    names = [b"name %d" % i for i in range(200)]
    train, val = split_rows(labels, 0.25, seed=1, names=names)
    assert sorted([*train, *val]) == list(range(200))
    for c in range(6):
        total = (labels == c).sum()
        assert (labels[val] == c).sum() == round(total * 0.25)
    assert 0 in train
    assert not np.array_equal(val, split_rows(labels, 0.25, seed=2, names=names)[1])
    more = np.r_[labels, 3]
    moved = set(val) ^ set(split_rows(more, 0.25, seed=1, names=[*names, b"new"])[1])
    assert len(moved - {200}) <= 2  # the new sample takes at most one place and sends at most one back
    tiny, tiny_val = split_rows(np.array([0, 0, 1, 1]), 0.01, seed=0)
    assert len(tiny) == len(tiny_val) == 2  # a class of two has one on each side, however small the fraction


def test_an_image_folder_is_what_its_files_are(shared_data) -> None:
    root = shared_data / "cifar10"
    config = ImageFolderConfig(path=str(root), image_size=32)
    assert not list(config.problems())
    facts = config.facts()
    assert (facts.num_classes, facts.num_train, facts.num_val) == (10, 10_000, 2_000)
    source = config.build("val")
    files = sorted((root / "val").glob("*/*.jpg"))
    assert [source.name(i) for i in range(len(source))] == [str(p) for p in files]
    labels = source.labels()
    assert labels is not None and [source.classes[c] for c in labels] == [p.parent.name for p in files]
    for i in (0, 999, 1999):
        sample = source[i]
        with Image.open(files[i]) as truth:
            assert same(sample["image"], truth.convert("RGB"))
        assert sample["label"] == labels[i]
        assert encoded(source, i) == (files[i].read_bytes(), ".jpg")
    assert len(pickle.dumps(source)) < 2000
    assert same(pickle.loads(pickle.dumps(source))[5]["image"], source[5]["image"])


def test_one_folder_and_a_fraction_of_it(shared_data) -> None:
    root = shared_data / "cifar10"
    config = ImageFolderConfig(path=str(root / "val"), image_size=32, val_fraction=0.15)
    assert not list(config.problems())
    train, val = config.build("train"), config.build("val")
    names = [{source.name(i) for i in range(len(source))} for source in (train, val)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 2000
    labels = val.labels()
    assert labels is not None and (np.bincount(labels) == 30).all()
    assert val.fingerprint == config.build("val").fingerprint != train.fingerprint
    again = pickle.loads(pickle.dumps(val))
    assert again.name(17) == val.name(17) and encoded(again, 17) == encoded(val, 17)


def test_names_endings_links_and_hidden_files(tmp_path: Path) -> None:
    root = folder(tmp_path / "train", {"b": 2, "a": 1})
    (root / "a" / "UPPER.JPG").write_bytes(jpeg())
    (root / "a" / "deeper").mkdir()
    (root / "a" / "deeper" / "x.png").write_bytes(jpeg(kind="PNG"))
    (root / "a" / "deeper" / "up").symlink_to(root / "a")  # a loop
    (root / "a" / ".hidden.jpg").write_bytes(jpeg())
    (root / "a" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    (root / ".cache" / "x.jpg").write_bytes(jpeg())
    strange = os.fsencode(root / "b") + b"/\xff\xfe.jpg"  # not UTF-8
    with open(strange, "wb") as file:
        file.write(jpeg())
    config = ImageFolderConfig(path=str(tmp_path), image_size=8, val_fraction=0.5)
    source = config.build("train").source  # type: ignore[attr-defined]
    names = [os.path.relpath(source.name(i), root) for i in range(len(source))]
    assert names == ["a/000.jpg", "a/UPPER.JPG", "a/deeper/x.png", "b/000.jpg", "b/001.jpg", os.fsdecode(b"b/\xff\xfe.jpg")]
    assert source.classes == ("a", "b")
    assert source[5]["image"].size == (12, 8)


def test_a_class_file_gives_the_order_and_may_name_more(tmp_path: Path) -> None:
    folder(tmp_path / "train", {"cat": 2, "dog": 3})
    folder(tmp_path / "val", {"dog": 1})
    names = tmp_path / "names.txt"
    names.write_text("fox\ndog\ncat\n\n")
    config = ImageFolderConfig(path=str(tmp_path), image_size=8, class_file=str(names))
    assert not list(config.problems())
    assert config.facts().num_classes == 3
    train, val = config.build("train"), config.build("val")
    assert train.labels().tolist() == [2, 2, 1, 1, 1] and val.labels().tolist() == [1]  # type: ignore[union-attr]
    assert train[0]["label"] == 2 and train.classes == ("fox", "dog", "cat")


def test_files_that_come_and_go_are_noticed(tmp_path: Path) -> None:
    folder(tmp_path / "train", {"a": 2, "b": 2})
    folder(tmp_path / "val", {"a": 1, "b": 1})
    config = ImageFolderConfig(path=str(tmp_path), image_size=8)
    before = config.build("train")
    assert len(before) == 4
    (tmp_path / "train" / "a" / "new.jpg").write_bytes(jpeg())
    after = config.build("train")
    assert len(after) == 5 and after.fingerprint != before.fingerprint
    (tmp_path / "train" / "b" / "000.jpg").write_bytes(jpeg(size=(50, 50)))  # another file under the same name
    os.utime(tmp_path / "train" / "b")
    assert config.build("train").fingerprint != after.fingerprint


def layout(root: Path) -> ImageFolderConfig:
    folder(root / "data" / "train", {"cat": 2, "dog": 2})
    folder(root / "data" / "val", {"cat": 1, "dog": 1})
    return ImageFolderConfig(path=str(root / "data"), image_size=8)


def missing_path(root: Path, config: ImageFolderConfig) -> None:
    config.path = str(root / "dat")


def file_as_path(root: Path, config: ImageFolderConfig) -> None:
    (root / "x").touch()
    config.path = str(root / "x")


def no_train_folder(root: Path, config: ImageFolderConfig) -> None:
    config.path = str(root / "data" / "train")


def no_val_folder(root: Path, config: ImageFolderConfig) -> None:
    (root / "data" / "val").rename(root / "data" / "validation")


def missing_val_path(root: Path, config: ImageFolderConfig) -> None:
    config.val_path = str(root / "nowhere")


def empty_folders(root: Path, config: ImageFolderConfig) -> None:
    for image in (root / "data" / "train").rglob("*.jpg"):
        image.unlink()


def no_folders(root: Path, config: ImageFolderConfig) -> None:
    (root / "flat" / "train").mkdir(parents=True)
    (root / "flat" / "val").mkdir()
    (root / "flat" / "train" / "x.jpg").write_bytes(jpeg())
    config.path = str(root / "flat")


def one_empty_class(root: Path, config: ImageFolderConfig) -> None:
    (root / "data" / "train" / "eel").mkdir()
    (root / "data" / "val" / "eel").mkdir()


def other_val_classes(root: Path, config: ImageFolderConfig) -> None:
    (root / "data" / "val" / "dog").rename(root / "data" / "val" / "dogs")


def missing_val_class(root: Path, config: ImageFolderConfig) -> None:
    (root / "data" / "val" / "dog" / "000.jpg").unlink()
    (root / "data" / "val" / "dog").rmdir()


def empty_val(root: Path, config: ImageFolderConfig) -> None:
    for image in (root / "data" / "val").rglob("*.jpg"):
        image.unlink()


def class_file(text: str | bytes):
    def spoil(root: Path, config: ImageFolderConfig) -> None:
        path = root / "classes.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        config.class_file = str(path)

    return spoil


def no_class_file(root: Path, config: ImageFolderConfig) -> None:
    config.class_file = str(root / "nowhere.txt")


def two_validation_sets(root: Path, config: ImageFolderConfig) -> None:
    config.val_path, config.val_fraction = str(root / "data" / "val"), 0.1


BROKEN = {
    "missing directory": (missing_path, "dataset.path", "no such directory", "data"),
    "a file": (file_as_path, "dataset.path", "is a file", "dataset.path="),
    "no train folder": (no_train_folder, "dataset.path", "there is no train/", "dataset.val_fraction=0.1"),
    "no val folder": (no_val_folder, "dataset.val_folder", "no such directory", "dataset.val_folder=validation"),
    "missing val_path": (missing_val_path, "dataset.val_path", "no such directory", "dataset.val_path="),
    "empty class folders": (empty_folders, "dataset.path", "none of the 2 folders in it holds an image", "dataset.extensions"),
    "no class folders": (no_folders, "dataset.path", "no class folders", "<class>/<image>.jpg"),
    "one empty class": (one_empty_class, "dataset.path", "hold no image: eel", "remove them"),
    "other classes in val": (other_val_classes, "dataset.val_folder", "only in", "dataset.class_file"),
    "a class missing in val": (missing_val_class, "dataset.val_folder", "missing in", "dataset.class_file"),
    "empty val": (empty_val, "dataset.val_folder", "holds no image", "dataset.val_fraction=0.1"),
    "class file too short": (class_file("cat\n"), "dataset.class_file", "names 1 classes, but", "add them"),
    "class file with other names": (class_file("cat\ndogg\n"), "dataset.class_file", "did you mean 'dogg'", "correct the names"),
    "empty class file": (class_file(""), "dataset.class_file", "is empty", ""),
    "class file with a hole": (class_file("cat\n\ndog\n"), "dataset.class_file", "empty line 2", ""),
    "class file with doubles": (class_file("cat\ndog\ncat\n"), "dataset.class_file", "twice, in lines 1 and 3", ""),
    "class file that is no text": (class_file(b"\xff\xfe\x00\x81"), "dataset.class_file", "not a text file", ""),
    "no class file": (no_class_file, "dataset.class_file", "No such file", "dataset.class_file=null"),
    "two validation sets": (two_validation_sets, "dataset.val_fraction", "is set too", "dataset.val_fraction=null"),
}


@pytest.mark.parametrize(("spoil", "key", "reason", "fix"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_with_a_folder_is_said_with_the_way_out(tmp_path: Path, spoil, key: str, reason: str, fix: str) -> None:
    config = layout(tmp_path)
    assert not list(config.problems())
    spoil(tmp_path, config)
    (problem,) = config.problems()
    assert problem.key == key and reason in problem.reason and fix in problem.fix, problem


def test_meta_shift_is_folders_with_the_class_as_group(tmp_path: Path) -> None:
    for context in ("cat(sofa)", "cat(bed)"):
        (tmp_path / "train" / "cat" / context).mkdir(parents=True)
        (tmp_path / "train" / "cat" / context / "1.jpg").write_bytes(jpeg())
    folder(tmp_path / "train" / "dog", {"dog(bench)": 2})
    folder(tmp_path / "test", {"cat": 1, "dog": 2})
    config = MetaShiftConfig(path=str(tmp_path), image_size=8, val_folder="test")
    assert not list(config.problems())
    val = config.build("val")
    assert [(val[i]["label"], val[i]["group"]) for i in range(3)] == [(0, 0), (1, 1), (1, 1)]
    assert len(config.build("train")) == 4 and config.build("train").classes == ("cat", "dog")


def bomb_png() -> bytes:
    """A valid header that promises 40,000 x 40,000 pixels."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


BAD = {
    "empty": (b"", "0 bytes"),
    "text": (b"this is not an image, whatever its name says", "not an image"),
    "half a JPEG": (jpeg((200, 200))[:3000], "cannot be decoded|truncated"),
    "a JPEG's first bytes": (jpeg()[:20], "header|not an image|cannot"),
    "half a PNG": (jpeg((100, 100), kind="PNG")[:2000], "cannot be decoded"),
    "bomb": (bomb_png(), "refused before decoding"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n", "not an image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("data", "why"), BAD.values(), ids=BAD)
def test_a_bad_file_is_a_bad_sample_with_its_name(tmp_path: Path, data: bytes, why: str) -> None:
    folder(tmp_path / "train", {"a": 2, "b": 2})
    folder(tmp_path / "val", {"a": 1, "b": 1})
    bad = tmp_path / "train" / "a" / "001.jpg"
    bad.write_bytes(data)
    source = ImageFolderConfig(path=str(tmp_path), image_size=8).build("train")
    with pytest.raises(BadSample, match=why) as error:
        source[1]
    assert error.value.name == str(bad)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert source[0]["image"].size == (12, 8)
    bad.unlink()
    with pytest.raises(BadSample, match="No such file"):
        source[1]


def test_a_bomb_is_refused_before_its_pixels_are_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(BadSample):
        read_image(bomb_png(), "bomb")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000  # of 4.8 GB
    tracemalloc.stop()
    monkeypatch.setattr(images, "MAX_PIXELS", 50)  # below Pillow's own limit too
    with pytest.raises(BadSample, match="more than 50"):
        read_image(jpeg((10, 10)), "small bomb")


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("1", "PNG"),
        ("P", "GIF"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("RGB", "TIFF"),
    ],
)
def test_every_mode_and_kind_becomes_rgb(mode: str, kind: str) -> None:
    data = jpeg((9, 7), kind=kind, mode=mode)
    image = read_image(data, "x")
    assert image.mode == "RGB" and image.size == (9, 7)
    if mode not in ("LA", "RGBA"):
        with Image.open(io.BytesIO(data)) as truth:
            assert same(image, truth.convert("RGB"))


def test_a_palette_with_transparency_and_16_bit_greys() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P").save(buffer, "PNG", transparency=bytes(range(64)))
    assert read_image(buffer.getvalue(), "x").mode == "RGB"
    buffer = io.BytesIO()
    values = (np.arange(64, dtype=np.uint16).reshape(8, 8)) * 1000
    Image.fromarray(values).save(buffer, "PNG")
    np.testing.assert_array_equal(np.asarray(read_image(buffer.getvalue(), "x"))[..., 0], values >> 8)


def test_a_hint_lets_large_jpegs_come_smaller_and_lazy_leaves_them_packed(tmp_path: Path) -> None:
    folder(tmp_path / "train", {"a": 1, "b": 1})
    folder(tmp_path / "val", {"a": 1, "b": 1})
    (tmp_path / "train" / "a" / "000.jpg").write_bytes(jpeg((1000, 750)))
    source = ImageFolderConfig(path=str(tmp_path), image_size=8).build("train")
    for least, size in ((None, (1000, 750)), (400, (1000, 750)), (300, (500, 375)), (150, (250, 188)), (1, (125, 94))):
        source.decode_hint(least)  # type: ignore[attr-defined]
        assert source[0]["image"].size == size
    part = Subset(source, np.array([0]))
    part.lazy = True
    image = part[0]["image"]
    assert image.size == (1000, 750) and image.tile  # the header has been read, the pixels have not
    assert decode(image, "x", least=93).size == (125, 94)


def test_opening_reads_the_header_only() -> None:
    half = jpeg((300, 300))[:5000]
    assert open_image(half, "x").size == (300, 300)
    with pytest.raises(BadSample):
        decode(open_image(half, "x"), "x")


def test_the_index_does_not_become_a_class_of_other_programs(tmp_path: Path) -> None:
    """torchvision takes every folder for a class, hidden ones too."""
    folder(tmp_path / "train", {"a": 2, "b": 2})
    folder(tmp_path / "val", {"a": 1, "b": 1})
    assert not list(ImageFolderConfig(path=str(tmp_path), image_size=8).problems())
    assert not list(ImageFolderConfig(path=str(tmp_path / "train"), image_size=8, val_fraction=0.5).problems())
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["a", "b"]
    assert list((tmp_path / ".trainyard").glob("image_folder-*.index"))
