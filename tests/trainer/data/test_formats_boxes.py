"""Formats with boxes, on real photographs and on files that are wrong in every way we know."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer.data.config import CocoConfig, MultispectralConfig, VocConfig, YoloConfig
from trainer.data.formats.boxes import Annotations, settle
from trainer.data.formats.yolo import read_array
from trainer.data.relabel import Relabelled
from trainer.data.source import BadSample, Source
from trainer.data.table import Table
from trainer.errors import DataError

WIDTH, HEIGHT = 100, 80


def whole(source: Source) -> list[dict]:
    return [source[i] for i in range(len(source))]


def coco_file(root: Path, split: str, annotations: list[dict], **changes: object) -> dict:
    """A COCO folder with grey images; `changes` replace parts of the document."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for i in range(2):
        Image.new("RGB", (WIDTH, HEIGHT), (i, i, i)).save(root / "images" / f"{split}{i}.png")
    document = {
        "images": [{"id": 10 + i, "file_name": f"{split}{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(2)],
        "categories": [{"id": 7, "name": "cell"}, {"id": 3, "name": "bird"}],
        "annotations": annotations,
        **changes,
    }
    (root / f"instances_{split}.json").write_text(json.dumps(document))
    return document


def box(bbox: list[float], image: int = 10, category: int = 3, **more: object) -> dict:
    return {"image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, **more}


GOOD = [box([10, 10, 20, 30], area=450.0), box([0, 0, 100, 80], image=11, category=7)]


def coco(root: Path, annotations: list[dict] | None = None, **config: object) -> CocoConfig:
    coco_file(root, "train", GOOD if annotations is None else annotations)
    coco_file(root, "val", GOOD)
    return CocoConfig(path=str(root), image_size=64, **config)  # type: ignore[arg-type]


def test_coco_on_real_photographs(shared_data, caplog: pytest.LogCaptureFixture) -> None:
    """Every box of the JSON file that has an area is in the source, on its image, and nothing else is."""
    root = shared_data / "bccd"
    config = CocoConfig(path=str(root), image_size=224)
    assert not list(config.problems())
    facts = config.facts()
    assert (facts.num_classes, facts.num_train, facts.num_val) == (3, 205, 87)
    for split, total, flat in (("train", 2805, "BloodImage_00343.jpg (id 171)"), ("val", 1138, "BloodImage_00338.jpg (id 69)")):
        document = json.loads((root / f"instances_{split}.json").read_text())
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            source = config.build(split)
        assert f"1 boxes have no area: {flat}" in caplog.text  # the count, and the image with its id
        names = {c["id"]: c["name"] for c in document["categories"]}
        classes = list(source.classes)
        by_image = {i["id"]: [a for a in document["annotations"] if a["image_id"] == i["id"] and a["area"]] for i in document["images"]}
        assert sum(map(len, by_image.values())) == total - 1
        assert len(source) == len(document["images"])
        for i, image in enumerate(document["images"]):
            truth = by_image[image["id"]]
            name, sample = source.name(i), source.objects(i)  # type: ignore[attr-defined]
            assert os.path.basename(name) == image["file_name"]
            np.testing.assert_array_equal(
                sample["boxes"], np.array([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in truth)], np.float32)
            )
            assert [source.classes[c] for c in sample["labels"]] == [names[a["category_id"]] for a in truth]
            assert sample["area"].tolist() == [a["area"] for a in truth] and sample["image_id"] == image["id"]
            assert not sample["crowd"].any()
            if split == "val":  # is scored against every object, the one without area too
                listed = [
                    [*a["bbox"], classes.index(names[a["category_id"]]), 0, a["area"]]
                    for a in document["annotations"]
                    if a["image_id"] == image["id"]
                ]
                assert sample["truth"].tolist() == listed
    sample = pickle.loads(pickle.dumps(source))[3]
    assert sample["image"].size == (640, 480) and sample["boxes"].dtype == np.float32 and sample["labels"].dtype == np.int64
    assert len(pickle.dumps(source)) < 2000


def test_coco_and_voc_of_the_same_photographs_agree(shared_data) -> None:
    root = shared_data / "bccd"
    voc = VocConfig(path=str(root), image_size=224)
    assert not list(voc.problems())
    for split in ("train", "val"):
        a, b = CocoConfig(path=str(root), image_size=224).source(split), voc.source(split)
        assert tuple(a.classes) == tuple(b.classes) == ("Platelets", "RBC", "WBC")
        place = {a.name(i): i for i in range(len(a))}
        assert len(a) == len(b) == len(place)
        for i in range(len(b)):
            x, y = a.objects(place[b.name(i)]), b.objects(i)  # type: ignore[attr-defined]
            for key in ("boxes", "labels", "crowd"):
                np.testing.assert_array_equal(x[key], y[key])


@pytest.fixture(scope="module")
def yolo_root(shared_data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real photographs written in YOLO's layout, by way of the XML files."""
    root, out = shared_data / "bccd", tmp_path_factory.mktemp("yolo")
    classes = ["WBC", "RBC", "Platelets"]
    for split in ("train", "val"):
        (out / "images" / split).mkdir(parents=True)
        (out / "labels" / split).mkdir(parents=True)
        for name in (root / f"voc_{split}.txt").read_text().split():
            shutil.copy(root / "images" / f"{name}.jpg", out / "images" / split)
            lines = []
            for found in ElementTree.parse(root / "voc" / f"{name}.xml").getroot().iter("object"):
                x1, y1, x2, y2 = (float(found.findtext(f"bndbox/{c}") or "nan") for c in ("xmin", "ymin", "xmax", "ymax"))
                where = ((x1 + x2) / 2 / 640, (y1 + y2) / 2 / 480, (x2 - x1) / 640, (y2 - y1) / 480)
                lines.append(f"{classes.index(str(found.findtext('name')))} {' '.join(f'{n:.9f}' for n in where)}\n")
            (out / "labels" / split / f"{name}.txt").write_text("".join(lines))
    (out / "data.yaml").write_text("train: images/train\nval: images/val\nnames:\n  0: WBC\n  1: RBC\n  2: Platelets\n")
    return out


def test_yolo_on_real_photographs(shared_data, yolo_root: Path) -> None:
    config = YoloConfig(path=str(yolo_root), image_size=224)
    assert not list(config.problems())
    facts = config.facts()
    assert (facts.num_classes, facts.num_train, facts.num_val) == (3, 205, 87)
    voc = VocConfig(path=str(shared_data / "bccd"), image_size=224).source("train")
    source = config.source("train")
    place = {os.path.basename(voc.name(i)): i for i in range(len(voc))}
    for i in range(len(source)):
        x, y = voc.objects(place[os.path.basename(source.name(i))]), source.objects(i)  # type: ignore[attr-defined]
        np.testing.assert_allclose(x["boxes"], y["boxes"], atol=1e-3)
        assert [voc.classes[c] for c in x["labels"]] == [source.classes[c] for c in y["labels"]]
    assert source[0]["image"].size == (640, 480)


def test_yolos_other_layouts_and_class_files(yolo_root: Path, tmp_path: Path) -> None:
    truth = YoloConfig(path=str(yolo_root), image_size=8).source("train")
    by_split = tmp_path / "by_split"
    for split, name in (("train", "train"), ("val", "valid")):
        (by_split / name).mkdir(parents=True)
        for kind in ("images", "labels"):
            (by_split / name / kind).symlink_to(yolo_root / kind / split)
    (by_split / "classes.txt").write_text("WBC\nRBC\nPlatelets\n")
    other = YoloConfig(path=str(by_split), image_size=8)
    assert not list(other.problems()) and len(other.source("val")) == 87
    source = other.source("train")
    assert [os.path.basename(source.name(i)) for i in range(205)] == [os.path.basename(truth.name(i)) for i in range(205)]
    flat = YoloConfig(path=str(by_split / "train"), image_size=8, class_file=str(yolo_root / "data.yaml"), val_fraction=0.2)
    assert not list(flat.problems())
    train, val = flat.source("train"), flat.source("val")
    assert len(val) == 41 and len(train) == 164
    assert not {train.name(i) for i in range(164)} & {val.name(i) for i in range(41)}
    elsewhere = YoloConfig(
        path=str(by_split / "train"), val_path=str(by_split / "valid"), image_size=8, class_file=str(by_split / "classes.txt")
    )
    assert not list(elsewhere.problems()) and elsewhere.facts().num_val == 87


def test_labels_corrected_in_place_are_noticed(yolo_root: Path, tmp_path: Path) -> None:
    shutil.copytree(yolo_root, tmp_path / "y")
    config = YoloConfig(path=str(tmp_path / "y"), image_size=8)
    for path in (tmp_path / "y").rglob("*"):
        os.utime(path, (1e9, 1e9))  # long ago: nothing but the correction below is new
    before = config.source("train")
    label = next((tmp_path / "y" / "labels" / "train").iterdir())
    label.write_text("0 0.5 0.5 0.25 0.25\n")
    after = config.source("train")
    assert after.fingerprint != before.fingerprint
    i = next(i for i in range(len(after)) if os.path.basename(after.name(i)).startswith(label.stem))
    assert after.objects(i)["boxes"].tolist() == [[240, 180, 400, 300]]  # type: ignore[attr-defined]


def test_a_yolo_file_may_hold_polygons_and_images_without_labels(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / split / f"{i}.png")
        (tmp_path / "labels" / split / "0.txt").write_text("1 0.1 0.1 0.3 0.1 0.2 0.5\n\n0 0.5 0.5 1 1\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    config = YoloConfig(path=str(tmp_path), image_size=8)
    assert not list(config.problems())
    first, second = whole(config.source("train"))
    np.testing.assert_allclose(first["boxes"], [[10, 8, 30, 40], [0, 0, 100, 80]])
    assert first["labels"].tolist() == [1, 0] and second["boxes"].shape == (0, 4)


@pytest.fixture
def multispectral(tmp_path: Path) -> MultispectralConfig:
    """The real photographs' blue kind: five channels, in types that cameras deliver."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(count):
            image = random.integers(0, 4000, (HEIGHT, WIDTH, 5)).astype(np.uint16)
            np.save(tmp_path / "images" / split / f"{i}.npy", np.asfortranarray(image) if i % 2 else image)
            (tmp_path / "labels" / split / f"{i}.txt").write_text("0 0.5 0.5 0.2 0.5\n" if i else "")
    (tmp_path / "classes.txt").write_text("person\ncar\n")
    return MultispectralConfig(path=str(tmp_path), image_size=64, channels=5, mean=[0.5] * 5, std=[0.2] * 5)


def test_multispectral_arrays_keep_their_channels_and_type(multispectral: MultispectralConfig) -> None:
    assert not list(multispectral.problems())
    facts = multispectral.facts()
    assert (facts.num_classes, facts.num_train, facts.num_val, facts.channels) == (2, 6, 3, 5)
    source = multispectral.build("train")
    for i in range(6):
        sample = source[i]
        np.testing.assert_array_equal(sample["image"], np.load(source.name(i)))
        assert sample["image"].dtype == np.uint16 and sample["image"].flags.c_contiguous and sample["image"].flags.writeable
        np.testing.assert_allclose(sample["boxes"], [[40, 20, 60, 60]] if i else np.zeros((0, 4)))
    assert len(multispectral.source("train")) == 6
    multispectral.keep_empty = False
    assert len(multispectral.source("train")) == 5


def npy(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


ARRAYS = {
    "empty": (b"", "0 bytes"),
    "text": (b"hello", "not an .H, W, C. array"),
    "cut short": (npy(np.zeros((8, 8, 3)))[:-10], "cut short"),
    "two axes": (npy(np.zeros((8, 8))), "not an .H, W, C. array"),
    "pickled objects": (npy(np.array([[[None]]], dtype=object), allow_pickle=True), "not an .H, W, C. array"),
    "other channels": (npy(np.zeros((8, 8, 4))), "has 4 channels, the others 3"),
    "NaN": (npy(np.full((8, 8, 3), math.nan)), "NaN"),
    "bomb": (npy(np.zeros((1, 1, 3), np.uint8)).replace(b"(1, 1, 3)", b"(99999, 99999, 3)"), "refused|not an"),
}


@pytest.mark.parametrize(("data", "why"), ARRAYS.values(), ids=ARRAYS)
def test_bad_arrays_are_bad_samples(data: bytes, why: str) -> None:
    with pytest.raises(BadSample, match=why):
        read_array(data, "x.npy", 3)


def test_multispectral_checks_channels_before_anything_is_trained(multispectral: MultispectralConfig) -> None:
    multispectral.mean = [0.5] * 3
    assert {p.key for p in multispectral.problems()} == {"dataset.mean", "dataset.std"}
    multispectral.channels, multispectral.std = 3, [0.2] * 3
    (problem,) = multispectral.problems()
    assert problem.key == "dataset.channels" and problem.fix == "dataset.channels=5"


# What becomes of a box that cannot be right: (box, what "clip" makes of it, its kind)
CASES = {
    "inside": ([10, 10, 20, 20], [10, 10, 30, 30], None),
    "over by a rounding": ([90, 70, 10.6, 10.4], [90, 70, 100, 80], None),
    "over the edge": ([90, 70, 30, 30], [90, 70, 100, 80], "over_the_edge"),
    "over the other edge": ([-20, -5, 30, 30], [0, 0, 10, 25], "over_the_edge"),
    "no width": ([10, 10, 0, 20], None, "no_area"),
    "negative": ([10, 10, -5, 20], None, "no_area"),
    "outside": ([200, 10, 20, 20], None, "outside"),
    "at the edge": ([100, 10, 20, 20], None, "outside"),
    "NaN": ([math.nan, 10, 20, 20], None, "not_finite"),
    "no width in 32 bits, at the edge": ([99.9999999, 10, 50.0000001, 10], None, "outside"),
    "no height in 32 bits": ([10, 10, 5, 1e-8], None, "no_area"),
    "infinite": ([10, 10, math.inf, 20], None, "not_finite"),
    "three numbers": ([10, 10, 20], None, "not_finite"),
    "text": (["a", 10, 20, 20], None, "not_finite"),
}


@pytest.mark.parametrize("policy", ["clip", "drop", "raise"])
@pytest.mark.parametrize(("bbox", "clipped", "kind"), CASES.values(), ids=CASES)
def test_the_policy_for_bad_boxes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: str, bbox: list[float], clipped: list[float] | None, kind: str | None
) -> None:
    config = coco(tmp_path, [*GOOD, box(bbox, image=11)], bad_boxes=policy)
    if policy == "raise" and kind:
        with pytest.raises(DataError, match=r"train1.png \(id 11\)"):
            config.build("train")
        return
    with caplog.at_level(logging.WARNING):
        source = config.build("train")
    boxes = source[1]["boxes"].tolist()
    assert boxes[0] == [0, 0, 100, 80] and source[0]["boxes"].tolist() == [[10, 10, 30, 40]]
    expected = clipped if policy == "clip" or not kind else None
    assert boxes[1:] == ([expected] if expected else [])
    if kind:
        assert "1 boxes" in caplog.text and "train1.png (id 11)" in caplog.text
    else:
        assert not caplog.text


@given(
    st.lists(
        st.tuples(
            *[st.floats(-300, 300) | st.sampled_from([math.nan, math.inf, 1e300, 0.0, 1e-50, 79.9999999, 80.0, 99.9999999, 100.0])] * 4
        ),
        max_size=12,
    ),
    st.sampled_from(["clip", "drop"]),
)
def test_whatever_the_boxes_those_left_are_inside_and_have_an_area(boxes: list[tuple[float, float, float, float]], policy: str) -> None:
    read = Annotations(classes=["a", "b"])
    read.image("x.png", (WIDTH, HEIGHT), 0)
    for i, corners in enumerate(boxes):
        read.box(corners, i % 3 - 1)
    columns, meta = settle(read, policy, True, "here")
    table = Table.of(columns, meta)
    left = table["boxes"][0]
    assert np.isfinite(left).all() and (left[:, :2] >= 0).all() and (left[:, 2:] <= (WIDTH, HEIGHT)).all()
    assert (left[:, 2:] > left[:, :2]).all()  # the corners as they are stored
    assert (table["labels"][0] >= 0).all() and len(table["labels"][0]) == len(left) == len(table["area"][0])
    dropped = sum(d["count"] for kind, d in meta["defects"].items() if kind not in ("over_the_edge", "empty"))
    if policy == "clip":
        assert len(left) == len(boxes) - dropped


def test_unknown_categories_and_images_crowds_and_missing_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    crowd = {**box([0, 0, 50, 50]), "iscrowd": 1}
    config = coco(tmp_path, [*GOOD, box([1, 1, 5, 5], category=99), box([1, 1, 5, 5], image=555), crowd])
    document = json.loads((tmp_path / "instances_train.json").read_text())
    document["images"].append({"id": 12, "file_name": "gone.png", "width": 5, "height": 5})
    document["images"].append({"id": 13, "file_name": "train1.png"})  # no size: read from the file
    (tmp_path / "instances_train.json").write_text(json.dumps(document))
    with caplog.at_level(logging.WARNING):
        train = config.build("train")
    for line in (
        "1 boxes are of a category that is not listed: train0.png (id 10)",
        "1 boxes belong to an image that is not listed: id 555",
        "1 images are listed but not there: gone.png (id 12)",
    ):
        assert line in caplog.text
    assert [len(s["boxes"]) for s in whole(train)] == [1, 1, 0]  # the crowd is not learned from
    (tmp_path / "instances_val.json").write_text(json.dumps(document))
    config.val_images = "images"
    assert [s["crowd"].tolist() for s in whole(config.build("val"))] == [[False, True], [False], []]  # but validation knows it
    config.bad_boxes = "raise"
    with pytest.raises(DataError) as error:
        config.build("train")
    assert all(text in str(error.value) for text in ("category", "gone.png", "id 555")) and "crowd" not in str(error.value)


def test_what_is_scored_is_what_the_file_says(tmp_path: Path) -> None:
    """To the last bit, in validation alone; with a network's own classes, its own labels."""
    config = coco(tmp_path)
    listed = [
        box([90.1, 70.7, 30.3, 30], area=1.1),
        box([5, 5, 0, 0], area=0, category=7),
        box([-7.5, 3, 9, 4]),
        box([1, math.nan, 3, 3]),
        box([1, 1, 2, 2], category=5),
    ]
    coco_file(tmp_path, "val", listed)
    val = config.build("val")
    expected = [[90.1, 70.7, 30.3, 30, 0, 0, 1.1], [5, 5, 0, 0, 1, 0, 0], [-7.5, 3, 9, 4, 0, 0, 36]]
    assert val[0]["truth"].dtype == np.float64 and val[0]["truth"].tolist() == expected
    assert val[1]["truth"].shape == (0, 7)
    assert "truth" not in config.build("train")[0]
    other = Relabelled(val, ["x", "cell", "bird"], np.array([2, 1]))
    assert other[0]["truth"][:, 4].tolist() == [2, 1, 2] and val[0]["truth"].tolist() == expected


def test_images_without_boxes_are_kept_or_left_out(tmp_path: Path) -> None:
    config = coco(tmp_path, [GOOD[0]])
    assert [len(s["boxes"]) for s in whole(config.build("train"))] == [1, 0]
    assert config.build("train")[1]["boxes"].shape == (0, 4)
    config.keep_empty = False
    assert [len(s["boxes"]) for s in whole(config.build("train"))] == [1]


def test_an_image_of_another_size_than_its_annotations_is_a_bad_sample(tmp_path: Path) -> None:
    config = coco(tmp_path)
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images" / "train0.png")  # turned by its camera's orientation flag
    with pytest.raises(BadSample, match="80 x 100 pixels, but its annotations are for 100 x 80"):
        config.build("train")[0]


def write(name: str, text: str):
    return lambda root, config: (root / name).write_text(text)


def without(key: str):
    def spoil(root: Path, config: CocoConfig) -> None:
        path = root / "instances_train.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return spoil


def change(name: str, value: object):
    return lambda root, config: setattr(config, name, value)


def other_categories(root: Path, config: CocoConfig) -> None:
    coco_file(root, "val", [], categories=[{"id": 1, "name": "fish"}])


def no_images(root: Path, config: CocoConfig) -> None:
    shutil.rmtree(root / "images")


def two_files(root: Path, config: CocoConfig) -> None:
    shutil.copy(root / "instances_train.json", root / "instances_train2.json")


BROKEN = {
    "no such path": (change("path", "/nowhere/at/all"), "dataset.path", "no such directory"),
    "not JSON": (write("instances_train.json", "{"), "dataset.path", "is not JSON"),
    "a list": (write("instances_train.json", "[]"), "dataset.path", "not a COCO detection file"),
    "no annotations": (without("annotations"), "dataset.path", "no list of annotations"),
    "no categories": (without("categories"), "dataset.path", "no list of categories"),
    "no train file": (
        lambda root, config: (root / "instances_train.json").unlink(),
        "dataset.train_annotations",
        "no annotation file of the train split",
    ),
    "a file named wrong": (change("val_annotations", "vall.json"), "dataset.val_annotations", "no such file"),
    "two train files": (two_files, "dataset.train_annotations", "holds several"),
    "no images": (no_images, "dataset.path", "cannot be found"),
    "an image folder named wrong": (change("train_images", "imags"), "dataset.train_images", "no such directory"),
    "other categories in val": (other_categories, "dataset.path", "differ"),
}


@pytest.mark.parametrize(("spoil", "key", "reason"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_with_a_coco_folder_is_said(tmp_path: Path, spoil, key: str, reason: str) -> None:
    config = coco(tmp_path)
    assert not list(config.problems())
    spoil(tmp_path, config)
    problems = list(config.problems())
    assert len(problems) == 1 and problems[0].key == key and reason in problems[0].reason, problems


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": [{"id": 1, "file_name": "train0.png"}] * 2}, "two images under one id"),
        ({"annotations": [{"bbox": [0, 0, 1, 1]}]}, "annotations[0] has no image_id, category_id"),
        ({"categories": []}, "lists no categories"),
    ],
)
def test_what_is_wrong_inside_a_coco_file_is_said(tmp_path: Path, changes: dict, reason: str) -> None:
    config = coco(tmp_path)
    coco_file(tmp_path, "train", **{"annotations": [], **changes})
    (problem,) = config.problems()
    assert reason in problem.reason


YOLO_BROKEN = {
    "words": ("cat 0.5 0.5 1 1\n", "is not a row of numbers"),
    "four numbers": ("0 0.5 0.5 1\n", "is not `class x y width height`"),
    "half a class": ("0.5 0.5 0.5 1 1\n", "is not `class x y width height`"),
}


@pytest.mark.parametrize(("text", "reason"), YOLO_BROKEN.values(), ids=YOLO_BROKEN)
def test_a_label_file_that_is_not_yolos_is_named_with_its_line(multispectral: MultispectralConfig, text: str, reason: str) -> None:
    (Path(str(multispectral.path)) / "labels" / "train" / "1.txt").write_text("0 0.5 0.5 1 1\n" + text)
    (problem,) = multispectral.problems()
    assert reason in problem.reason and "1.txt, line 2" in problem.reason


def test_yolo_layout_problems(tmp_path: Path, multispectral: MultispectralConfig) -> None:
    root = Path(str(multispectral.path))
    (root / "labels" / "val").rename(root / "labels" / "vall")
    (problem,) = multispectral.problems()
    assert problem.key == "dataset.path" and "no val split" in problem.reason
    multispectral.val_fraction = 0.3
    assert not list(multispectral.problems())
    (root / "classes.txt").unlink()
    (problem,) = multispectral.problems()
    assert problem.key == "dataset.class_file" and "no class names" in problem.reason
    (root / "data.yaml").write_text("names: {0: a, 2: b}")
    (problem,) = multispectral.problems()
    assert "from 0 to 1" in problem.reason
    (root / "data.yaml").write_text("nothing: here")
    (problem,) = multispectral.problems()
    assert "no `names`" in problem.reason


def test_a_class_beyond_the_class_file_is_an_unknown_category(multispectral: MultispectralConfig, caplog: pytest.LogCaptureFixture) -> None:
    (Path(str(multispectral.path)) / "labels" / "train" / "1.txt").write_text("0 0.5 0.5 0.2 0.5\n2 0.5 0.5 0.2 0.5\n")
    source = multispectral.build("train")
    assert len(source[1]["boxes"]) == 1
    assert "category that is not listed: 1.npy" in caplog.text


def test_voc_counts_pixels_from_zero_or_one_and_takes_a_class_file(tmp_path: Path) -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "JPEGImages" / "a.jpg")
    found = "<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>100</xmax><ymax>80</ymax></bndbox></object>"
    (tmp_path / "Annotations" / "a.xml").write_text(
        f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>{found}</annotation>"
    )
    for split in ("train", "val"):
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text("a 1\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    config = VocConfig(path=str(tmp_path), image_size=8, first_pixel=1, class_file=str(tmp_path / "classes.txt"))
    assert not list(config.problems())
    sample = config.build("train")[0]
    assert sample["boxes"].tolist() == [[0, 0, 100, 80]] and sample["labels"].tolist() == [1]
    config.first_pixel, config.class_file = 0, None
    sample = config.build("train")[0]
    assert sample["boxes"].tolist() == [[1, 1, 100, 80]] and sample["labels"].tolist() == [0]
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation>")
    (problem,) = config.problems()
    assert "is not XML" in problem.reason
    (tmp_path / "Annotations" / "a.xml").unlink()
    (problem,) = config.problems()
    assert "the list of images names it" in problem.reason
    shutil.rmtree(tmp_path / "Annotations")
    (problem,) = config.problems()
    assert problem.key == "dataset.annotations" and "has no Annotations or" in problem.reason


def test_arrays_of_another_depth_and_labels_without_an_image_are_named_at_load(
    multispectral: MultispectralConfig, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(str(multispectral.path))
    first = next(p for p in sorted((root / "images").rglob("*.npy")) if "val" not in p.parts)
    np.save(first, np.load(first)[..., :3])
    labels = next(p for p in sorted((root / "labels").rglob("*.txt")) if "val" not in p.parts).parent
    (labels / "nobody.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    with caplog.at_level(logging.WARNING):
        multispectral.build("train")
    assert f"{first.name} (3 instead of" in caplog.text
    assert "nobody.txt" in caplog.text


def test_every_array_of_both_splits_is_held_against_the_config(
    multispectral: MultispectralConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever is the odd one: not the first array decides, and not the most in a split."""
    images = Path(str(multispectral.path)) / "images"
    np.save(images / "train" / "0.npy", np.load(images / "train" / "0.npy")[..., :3])  # the first
    np.save(images / "val" / "2.npy", np.load(images / "val" / "2.npy")[..., :4])
    assert not list(multispectral.problems()), "most have five"
    with caplog.at_level(logging.WARNING):
        for split in ("train", "val"):
            multispectral.build(split)
    assert "1 arrays have another number of channels than dataset.channels" in caplog.text and "0.npy (3 instead of 5)" in caplog.text
    assert "2.npy (4 instead of 5)" in caplog.text
    multispectral.channels, multispectral.mean, multispectral.std = 3, [0.5] * 3, [0.2] * 3  # what the first array has
    (problem,) = multispectral.problems()
    assert (problem.key, problem.fix) == ("dataset.channels", "dataset.channels=5")
    assert "5 of 6 arrays of the train split have 5" in problem.reason and "1.npy" in problem.reason
    assert "2 of 3 arrays of the val split have 5" in problem.reason
    multispectral.channels, multispectral.mean, multispectral.std = 5, [0.5] * 5, [0.2] * 5
    np.save(images / "val" / "1.npy", np.load(images / "val" / "1.npy")[..., :4])
    (problem,) = multispectral.problems()
    assert "2 of 3 arrays of the val split have 4" in problem.reason and problem.fix == "write both splits with as many channels"
    multispectral.channels, multispectral.mean, multispectral.std = 3, [0.5] * 3, [0.2] * 3
    multispectral.bad_boxes = "raise"
    with pytest.raises(DataError, match=r"1\.npy \(5 instead of 3\)"):
        multispectral.build("train")


def test_images_without_a_label_file_are_named(multispectral: MultispectralConfig, caplog: pytest.LogCaptureFixture) -> None:
    """And learned from as examples of nothing: YOLO allows it."""
    for name in ("2", "4"):
        (Path(str(multispectral.path)) / "labels" / "train" / f"{name}.txt").unlink()
    with caplog.at_level(logging.WARNING):
        source = multispectral.build("train")
    assert "2 images have no label file, and are taken as examples of nothing: 2.npy, 4.npy" in caplog.text
    assert [len(source[i]["boxes"]) for i in range(6)] == [0, 1, 0, 1, 0, 1]
    caplog.clear()
    multispectral.build("val")
    assert not caplog.text, "a label file that is there and empty is no mistake"
    multispectral.bad_boxes = "raise"
    with pytest.raises(DataError, match="2 images have no label file"):
        multispectral.build("train")


def test_all_images_without_an_xml_file_are_counted_and_some_named(tmp_path: Path) -> None:
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"i{n}\n" for n in range(25)))
    (problem, *_) = VocConfig(path=str(tmp_path), image_size=64).problems()
    assert "i0.xml, i1.xml" in problem.reason and "(25 in all)" in problem.reason and "names them" in problem.reason


def test_a_split_that_shows_nothing_is_refused(tmp_path: Path) -> None:
    assert [p.reason for p in coco(tmp_path, []).problems()] == ["the train split shows no object in any of its 2 images"]
