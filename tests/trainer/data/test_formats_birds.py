"""CUB, Waterbirds and SIIM-ACR: real photographs in their layouts, whole and spoilt."""

from __future__ import annotations

import csv
import io
import os
import pickle
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import layouts
from trainer.data.config import CubConfig, SiimAcrConfig, WaterbirdsConfig
from trainer.data.formats.dicom import EXPLICIT, IMPLICIT, read_dicom
from trainer.data.index import FOLDER
from trainer.data.source import BadSample, Source, encoded

PARTS = ["back", "beak", "left wing"]


@pytest.fixture(scope="module")
def cub(shared_data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real photographs, with boxes, parts and outlines written as CUB has them."""
    root = tmp_path_factory.mktemp("cub") / "CUB_200_2011"
    shutil.copytree(shared_data / "cub10", root)
    images = [line.split() for line in (root / "images.txt").read_text().splitlines()]
    (root / "parts").mkdir()
    (root / "parts" / "parts.txt").write_text("".join(f"{i + 1} {name}\n" for i, name in enumerate(PARTS)))
    boxes, parts = [], []
    for image_id, path in images:
        n = int(image_id)
        with Image.open(root / "images" / path) as image:
            width, height = image.size
        boxes.append(f"{image_id} {n % 7}.0 {n % 5}.0 {width - 20}.0 {height - 30}.0\n")
        parts += [f"{image_id} {p + 1} {10.5 + p} {20.0 + n % 9} {(n + p) % 2}\n" for p in range(3)]
        outline = np.zeros((height, width), np.uint8)
        outline[10:40, 20:60] = 204  # four of five annotators
        outline[40:50, 20:60] = 51
        target = root / "segmentations" / Path(path).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(outline).save(target)
    (root / "bounding_boxes.txt").write_text("".join(boxes))
    (root / "parts" / "part_locs.txt").write_text("".join(parts))
    return root


@pytest.fixture
def own_cub(cub: Path, tmp_path: Path) -> Path:
    """A copy whose lists may be spoilt; the photographs are linked."""
    root = tmp_path / "cub"
    shutil.copytree(cub, root, ignore=shutil.ignore_patterns("images", "segmentations", ".trainyard"))
    (root / "images").symlink_to(cub / "images")
    (root / "segmentations").symlink_to(cub / "segmentations")
    return root


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_cub_on_real_photographs(shared_data) -> None:
    root = shared_data / "cub10"
    config = CubConfig(path=str(root), image_size=224)
    assert not list(config.problems())
    rows = {line.split()[0]: line.split()[1] for line in (root / "images.txt").read_text().splitlines()}
    training = dict(line.split() for line in (root / "train_test_split.txt").read_text().splitlines())
    for split, flag in (("train", "1"), ("val", "0")):
        source = config.build(split)
        assert names(source) == [str(root / "images" / path) for image_id, path in rows.items() if training[image_id] == flag]
        labels = source.labels()
        assert labels is not None
        # The photographs' own folders say what they show: an account independent of image_class_labels.txt.
        assert [source.classes[label] for label in labels] == [Path(name).parent.name for name in names(source)]
        sample = source[3]
        assert set(sample) == {"image", "label"} and sample["label"] == labels[3]
    facts = config.facts()
    assert (facts.num_classes, facts.num_train, facts.num_val) == (10, 205, 89)


def test_cub_with_boxes_parts_and_outlines(cub: Path) -> None:
    source = CubConfig(path=str(cub), image_size=224).build("train")
    ids = {
        os.path.join(cub, "images", path): int(image_id)
        for image_id, path in (line.split() for line in (cub / "images.txt").read_text().splitlines())
    }
    for i in (0, 1, 50, 204):
        sample, n = source[i], ids[source.name(i)]
        width, height = sample["image"].size
        np.testing.assert_array_equal(sample["box"], [n % 7, n % 5, n % 7 + width - 20, n % 5 + height - 30])
        visible = [(n + p) % 2 for p in range(3)]
        np.testing.assert_array_equal(sample["parts"], [[10.5 + p, 20 + n % 9, 1] if visible[p] else [0, 0, 0] for p in range(3)])
        assert sample["mask"].shape == (height, width) and sample["mask"].sum() == 30 * 40 and sample["mask"][10:40, 20:60].all()
        assert sample["box"].dtype == sample["parts"].dtype == np.float32
    assert source.source.part_names == PARTS  # type: ignore[attr-defined]
    assert encoded(source, 0) == (Path(source.name(0)).read_bytes(), ".jpg")
    assert pickle.loads(pickle.dumps(source))[2]["label"] == source[2]["label"]


def test_part_of_cub_may_validate_instead_of_the_test_images(cub: Path) -> None:
    config = CubConfig(path=str(cub), image_size=224, val_fraction=0.2)
    train, val, test = config.build("train"), config.build("val"), CubConfig(path=str(cub), image_size=224).build("val")
    assert len(train) + len(val) == 205 and not set(names(train)) & set(names(val))
    assert not set(names(val)) & set(names(test))


def cut(name: str, lines: int):
    def spoil(root: Path) -> None:
        text = (root / name).read_text().splitlines(keepends=True)
        (root / name).write_text("".join(text[:-lines]))

    return spoil


def gone(name: str):
    return lambda root: (root / name).unlink()


def swap(name: str, old: str, new: str):
    return lambda root: (root / name).write_text((root / name).read_text().replace(old, new, 1))


CUB_BROKEN = {
    "no images.txt": (gone("images.txt"), "has no images.txt"),
    "labels for fewer images": (cut("image_class_labels.txt", 2), "list different images: 292 and 294"),
    "boxes for fewer images": (cut("bounding_boxes.txt", 1), "list different images"),
    "a class without a name": (cut("classes.txt", 1), "has no class 10"),
    "three columns": (swap("images.txt", "1 001.", "1 x 001."), "line 1: expected 2 columns"),
    "an unknown part": (swap("parts/part_locs.txt", "1 1 10.5", "1 9 10.5"), "part 9 of image 1, which is not listed"),
    "an image that is gone": (
        swap("images.txt", "001.Black_footed_Albatross/Black_footed_Albatross_0002", "x/y"),
        "no outline in segmentations",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), CUB_BROKEN.values(), ids=CUB_BROKEN)
def test_lists_that_do_not_fit_together_are_refused(own_cub: Path, spoil, reason: str) -> None:
    config = CubConfig(path=str(own_cub), image_size=224)
    assert not list(config.problems())
    spoil(own_cub)
    (problem,) = config.problems()
    assert problem.key == "dataset.path" and reason in problem.reason, problem


def test_an_image_that_is_listed_and_not_there(own_cub: Path) -> None:
    (own_cub / "segmentations").unlink()
    swap("images.txt", "001.Black_footed_Albatross/Black_footed_Albatross_0002", "x/y")(own_cub)  # the first to train on
    (problem,) = CubConfig(path=str(own_cub), image_size=224).problems()
    assert "which is not there" in problem.reason


def test_a_mask_of_another_size_is_a_bad_sample(own_cub: Path, cub: Path) -> None:
    (own_cub / "segmentations").unlink()
    shutil.copytree(cub / "segmentations", own_cub / "segmentations")
    source = CubConfig(path=str(own_cub), image_size=224).build("train")
    mask = own_cub / "segmentations" / Path(source.name(0)).relative_to(own_cub / "images").with_suffix(".png")
    Image.new("L", (5, 5)).save(mask)
    with pytest.raises(BadSample, match="its photograph"):
        source[0]
    mask.write_bytes(b"no image")
    with pytest.raises(BadSample, match="not an image"):
        source[0]


def aged(root: Path) -> None:
    """Everything below looks as if it had lain there for an hour: an index made now is trusted."""
    for folder in [p for p in [*root.rglob("*"), root] if p.is_dir()]:
        (folder / FOLDER).mkdir(exist_ok=True)  # it would be made with the index, and change the time of the folder it lies in
    before = time.time() - 3600
    for path in [*root.rglob("*"), root]:
        os.utime(path, (before, before))


def with_parts_and_outlines(root: Path) -> Path:
    """CUB's layout, of digits: parts and outlines beside the lists and images."""
    layouts.cub(root)
    images = [line.split() for line in (root / "images.txt").read_text().splitlines()]
    (root / "parts").mkdir()
    (root / "parts" / "parts.txt").write_text("1 back\n")
    (root / "parts" / "part_locs.txt").write_text("".join(f"{image_id} 1 10.0 20.0 1\n" for image_id, _ in images))
    for _, path in images:
        target = root / "segmentations" / Path(path).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((layouts.SIZE, layouts.SIZE), 255, np.uint8)).save(target)
    return root


EDITED = {
    "parts/parts.txt": ("back", "beak", lambda source: source.source.part_names, ["beak"]),
    "parts/part_locs.txt": ("1 1 10.0", "1 1 30.0", lambda source: source[0]["parts"].tolist(), [[30.0, 20.0, 1.0]]),
    "bounding_boxes.txt": ("1 2.0", "1 1.0", lambda source: source[0]["box"].tolist()[0], 1.0),
    "classes.txt": ("001.Bird_0", "001.Dove_0", lambda source: source.classes[0], "001.Dove_0"),
    "image_class_labels.txt": ("1 1\n", "1 2\n", lambda source: source.labels()[0], 1),
    "train_test_split.txt": ("2 1\n", "2 0\n", len, layouts.TRAIN - 1),
}


@pytest.mark.parametrize("name", EDITED)
def test_a_list_of_cub_that_is_edited_in_place_is_read_again(tmp_path: Path, name: str) -> None:
    old, new, found, expected = EDITED[name]
    root = with_parts_and_outlines(tmp_path / "cub")
    aged(root)
    config = CubConfig(path=str(root), image_size=32)
    assert found(config.build("train")) != expected
    index = next((root / FOLDER).iterdir())
    written = index.stat().st_mtime_ns
    config.build("train")
    assert index.stat().st_mtime_ns == written, "the index is trusted"
    swap(name, old, new)(root)
    assert found(config.build("train")) == expected


@pytest.mark.parametrize("dataset", ["cub", "waterbirds"])
def test_an_outline_that_goes_or_comes_is_noticed(tmp_path: Path, dataset: str) -> None:
    root = with_parts_and_outlines(tmp_path / "cub")
    config: CubConfig | WaterbirdsConfig = CubConfig(path=str(root), image_size=32)
    if dataset == "waterbirds":
        layouts.waterbirds(root / "birds")
        config = WaterbirdsConfig(path=str(root), folder="birds", image_size=32)
        for path in (root / "birds").rglob("*.jpg"):
            target = root / "segmentations" / path.relative_to(root / "birds").with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "segmentations" / "001.Bird_0" / "000.png", target)
    aged(tmp_path)
    source = config.build("train")
    assert source[0]["mask"].all()
    outline = (
        root / "segmentations" / Path(source.name(0)).relative_to(root / ("images" if dataset == "cub" else "birds")).with_suffix(".png")
    )
    content = outline.read_bytes()
    outline.unlink()
    (problem,) = config.problems()
    assert f"1 of {len(list(Path(source.name(0)).parents[1].rglob('*.jpg')))} images have no outline" in problem.reason
    outline.write_bytes(content)
    assert not list(config.problems()) and config.build("train")[0]["mask"].all()


@pytest.fixture
def waterbirds(own_cub: Path) -> Path:
    """The real photographs listed as Waterbirds: which bird stands where is made up."""
    folder = own_cub / "waterbird_complete95_forest2water2"
    folder.mkdir()
    (folder / "001.Black_footed_Albatross").symlink_to(own_cub / "images" / "001.Black_footed_Albatross")
    paths = sorted(p.name for p in (own_cub / "images" / "001.Black_footed_Albatross").iterdir())[:12]
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["img_id", "img_filename", "y", "split", "place", "place_filename"])
        for i, path in enumerate(paths):
            writer.writerow([i, f"001.Black_footed_Albatross/{path}", i // 2 % 2, i % 3, i // 4 % 2, "/o/ocean/00001.jpg"])
    return own_cub


def test_waterbirds_have_groups_parts_of_their_own_and_cubs_outlines(waterbirds: Path) -> None:
    folder = waterbirds / "waterbird_complete95_forest2water2"
    for path in (waterbirds, folder):  # either may be named
        config = WaterbirdsConfig(path=str(path), image_size=224)
        assert not list(config.problems())
        for split, number in (("train", 0), ("val", 1)):
            source = config.build(split)
            samples = [source[i] for i in range(len(source))]
            truth = [i for i in range(12) if i % 3 == number]
            assert [s["label"] for s in samples] == [i // 2 % 2 for i in truth]
            assert [s["group"] for s in samples] == [i // 2 % 2 * 2 + i // 4 % 2 for i in truth]
            assert all(s["mask"].sum() == 1200 for s in samples)
    config.validate_on = "test"
    assert [config.build("val")[i]["label"] for i in range(4)] == [i // 2 % 2 for i in (2, 5, 8, 11)]
    assert config.facts().num_classes == 2 and config.build("val").classes == ("landbird", "waterbird")


def test_waterbirds_without_outlines_and_with_bad_lists(waterbirds: Path) -> None:
    folder = waterbirds / "waterbird_complete95_forest2water2"
    (waterbirds / "segmentations").unlink()
    config = WaterbirdsConfig(path=str(waterbirds), image_size=224)
    assert set(config.build("train")[0]) == {"image", "label", "group"}
    text = (folder / "metadata.csv").read_text()
    for old, new, reason in (
        (",place,", ",ground,", "no column place"),
        ("0,001", "0,001", ""),
        (",0,/o", ",2,/o", "place=2 is not in 0 .. 1"),
        (",0,0,0,", ",x,0,0,", "must hold whole numbers"),
    ):
        (folder / "metadata.csv").write_text(text.replace(old, new, 1))
        problems = list(config.problems())
        assert [reason in p.reason for p in problems] == ([True] if reason else []), problems
    (folder / "metadata.csv").unlink()
    (problem,) = config.problems()
    assert "metadata.csv" in problem.reason


def dicom(
    pixels: np.ndarray, *, syntax: str = EXPLICIT, photometric: str = "MONOCHROME2", jpeg: bool = False, sequence: bool = False
) -> bytes:
    """A file as PS3.10 has it, written from the standard: preamble, meta group, elements, one frame."""
    explicit = syntax != IMPLICIT

    def element(group: int, number: int, kind: str, value: bytes, *, as_explicit: bool = explicit) -> bytes:
        value += b"\0" * (len(value) % 2)
        if not as_explicit:
            return struct.pack("<HHI", group, number, len(value)) + value
        if kind in ("OB", "OW", "SQ", "UN"):
            return struct.pack("<HH2sHI", group, number, kind.encode(), 0, len(value)) + value
        return struct.pack("<HH2sH", group, number, kind.encode(), len(value)) + value

    meta = element(2, 0x10, "UI", syntax.encode(), as_explicit=True)
    head = b"\0" * 128 + b"DICM" + element(2, 0, "UL", struct.pack("<I", len(meta)), as_explicit=True) + meta
    body = element(0x10, 0x10, "PN", b"Somebody")
    if sequence:  # of undefined length, with an item of undefined length: (FFFE,E000) ... (FFFE,E00D), (FFFE,E0DD)
        start = struct.pack("<HH2sHI", 0x32, 0x1064, b"SQ", 0, 0xFFFFFFFF) if explicit else struct.pack("<HHI", 0x32, 0x1064, 0xFFFFFFFF)
        item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + element(8, 0x104, "LO", b"inside") + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
        body += start + item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    bits, signed = pixels.dtype.itemsize * 8, pixels.dtype.kind == "i"
    for number, kind, value in (
        (2, "US", 1),
        (0x10, "US", pixels.shape[0]),
        (0x11, "US", pixels.shape[1]),
        (0x100, "US", bits),
        (0x103, "US", signed),
    ):
        body += element(0x28, number, kind, struct.pack("<H", value))
    body += element(0x28, 4, "CS", photometric.encode())
    if jpeg:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        frame = buffer.getvalue() + b"\0" * (len(buffer.getvalue()) % 2)
        half = len(frame) // 4 * 2
        items = struct.pack("<HHI", 0xFFFE, 0xE000, 0)  # an empty table of offsets
        for piece in (frame[:half], frame[half:]):
            items += struct.pack("<HHI", 0xFFFE, 0xE000, len(piece)) + piece
        body += struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF) + items + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    else:
        body += element(0x7FE0, 0x10, "OW", pixels.tobytes())
    return head + body


GREY = np.arange(60 * 50, dtype=np.uint16).reshape(60, 50)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_plain_dicom(syntax: str, sequence: bool) -> None:
    byte = (GREY % 256).astype(np.uint8)
    image = read_dicom(dicom(byte, syntax=syntax, sequence=sequence), "x")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image)[..., 1], byte)
    inverted = read_dicom(dicom(byte, syntax=syntax, photometric="MONOCHROME1", sequence=sequence), "x")
    np.testing.assert_array_equal(np.asarray(inverted)[..., 1], 255 - byte)
    for wide in (GREY, GREY.astype(np.int16) - 1000):
        np.testing.assert_allclose(np.asarray(read_dicom(dicom(wide, syntax=syntax), "x"))[..., 0], GREY / 2999 * 255, atol=1)


def test_dicom_with_jpeg_in_pieces() -> None:
    byte = (GREY // 12).astype(np.uint8)
    image = read_dicom(dicom(byte, syntax="1.2.840.10008.1.2.4.50", jpeg=True), "x")
    np.testing.assert_allclose(np.asarray(image)[..., 0], byte, atol=6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_cut_anywhere_is_a_bad_sample(photometric: str) -> None:
    data = dicom(GREY.astype(np.uint8), photometric=photometric, sequence=True)
    for length in [*range(0, 400, 7), len(data) - 1]:
        with pytest.raises(BadSample):
            read_dicom(data[:length], "x")
    with pytest.raises(BadSample, match="not a grey image but RGB"):
        read_dicom(dicom(GREY, photometric="RGB"), "x")
    with pytest.raises(BadSample, match="transfer syntax"):
        read_dicom(dicom(GREY, syntax="1.2.840.10008.1.2.5"), "x")


@pytest.fixture
def xrays(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    (tmp_path / "all_masks").mkdir()
    for folder, count in (("train_set", 3), ("full_test_set", 2), ("robust_test_set", 1)):
        for label in (0, 1):
            (tmp_path / folder / str(label)).mkdir(parents=True)
            for i in range(count):
                name = f"{folder}.{label}.{i}"
                pixels = random.integers(0, 256, (64, 64), dtype=np.uint8)
                if i % 2:
                    Image.fromarray(pixels).save(tmp_path / folder / str(label) / f"{name}.png")
                else:
                    (tmp_path / folder / str(label) / f"{name}.dcm").write_bytes(dicom(pixels))
                mask = np.zeros((128, 128), np.uint8)
                mask[32:64] = 255 * label
                if label or i:  # a healthy X-ray may come without a mask
                    Image.fromarray(mask).save(tmp_path / "all_masks" / f"{name}.png")
    return tmp_path


def test_xrays_with_masks(xrays: Path) -> None:
    config = SiimAcrConfig(path=str(xrays), image_size=64)
    assert not list(config.problems())
    facts = config.facts()
    assert (facts.num_classes, facts.num_train, facts.num_val) == (2, 6, 4)
    source = config.build("train")
    for i in range(6):
        sample = source[i]
        assert sample["label"] == int(Path(source.name(i)).parent.name) and sample["image"].mode == "RGB"
        truth = np.zeros((64, 64), np.uint8)
        truth[16:32] = sample["label"]
        np.testing.assert_array_equal(sample["mask"], truth)
        data, extension = encoded(source, i)  # type: ignore[misc]
        assert extension == ".png"
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(sample["image"]))
    config.val_folder = "robust_test_set"
    assert config.facts().num_val == 2
    config.mask_folder = None
    assert set(config.build("val")[0]) == {"image", "label"}


def test_xrays_spoilt(xrays: Path) -> None:
    config = SiimAcrConfig(path=str(xrays), image_size=64)
    next((xrays / "all_masks").glob("train_set.1.0*")).unlink()
    with pytest.raises(BadSample, match="shows a pneumothorax, but its mask"):
        config.build("train")[3]
    (xrays / "train_set" / "1").rename(xrays / "train_set" / "2")
    (problem,) = config.problems()
    assert "must hold the folders 0 (healthy) and 1" in problem.reason
    shutil.rmtree(xrays / "train_set")
    (problem,) = config.problems()
    assert "train_set" in problem.reason
