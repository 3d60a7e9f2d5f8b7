"""Small datasets on disk in every layout that is read, made of real handwritten digits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 40  # pixels
TRAIN, VAL = 36, 10  # images


def digit(i: int) -> Image.Image:
    images = load_digits(return_X_y=True)[0]  # [1797, 64]
    pixels = np.asarray(images[i]).reshape(8, 8)
    return Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((SIZE, SIZE)).convert("RGB")


def splits() -> list[tuple[str, int, int]]:
    """(split, number of the image, its class)"""
    return [("train" if i < TRAIN else "val", i, i % 2) for i in range(TRAIN + VAL)]


def box(i: int) -> tuple[int, int, int, int]:
    """x, y, width, height"""
    return 2 + i % 9, 3 + i % 7, 12 + i % 5, 10 + i % 11


def put(path: Path, i: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    digit(i).save(path)
    return path.name


def image_folder(root: Path, names: tuple[str, str] = ("train", "val"), classes: tuple[str, str] = ("even", "odd")) -> None:
    for split, i, label in splits():
        put(root / names[split == "val"] / classes[label] / f"{i:03}.jpg", i)


def meta_shift(root: Path) -> None:
    image_folder(root, ("train", "test"), ("cat", "dog"))


def siim_acr(root: Path) -> None:
    image_folder(root, ("train_set", "full_test_set"), ("0", "1"))
    for _, i, label in splits():
        (root / "all_masks").mkdir(exist_ok=True)
        Image.fromarray(np.full((SIZE, SIZE), 255 * label, np.uint8)).save(root / "all_masks" / f"{i:03}.png")


def webdataset(root: Path) -> None:
    from trainer.data.shards.verbs import shards

    image_folder(root.with_name("folders"))
    assert shards(["pack", str(root.with_name("folders")), str(root), "--size", "20KB"]) == 0


def cub(root: Path) -> None:
    tables: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": []}
    for split, i, label in splits():
        folder = f"{label + 1:03}.Bird_{label}"
        put(root / "images" / folder / f"{i:03}.jpg", i)
        tables["images"].append(f"{i + 1} {folder}/{i:03}.jpg")
        tables["image_class_labels"].append(f"{i + 1} {label + 1}")
        tables["train_test_split"].append(f"{i + 1} {int(split == 'train')}")
        tables["bounding_boxes"].append(f"{i + 1} " + " ".join(f"{v:.1f}" for v in box(i)))
    tables["classes"] = ["1 001.Bird_0", "2 002.Bird_1"]
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")


def waterbirds(root: Path) -> None:
    lines = ["img_id,img_filename,y,split,place,place_filename"]
    for split, i, label in splits():
        put(root / f"{i:03}.Bird" / f"{i:03}.jpg", i)
        lines.append(f"{i + 1},{i:03}.Bird/{i:03}.jpg,{label},{ {'train': 0, 'val': 1}[split] },{i // 2 % 2},x.jpg")
        if split == "val":  # the published test split too
            put(root / f"{i + 100:03}.Bird" / f"{i + 100:03}.jpg", i)
            lines.append(f"{i + 101},{i + 100:03}.Bird/{i + 100:03}.jpg,{label},2,{i // 2 % 2},x.jpg")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")


def coco(root: Path) -> None:
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        mine = [i for s, i, _ in splits() if s == split]
        images = [{"id": i + 1, "file_name": put(root / "images" / f"{i:03}.jpg", i), "width": SIZE, "height": SIZE} for i in mine]
        boxes = [
            {"id": i + 1, "image_id": i + 1, "category_id": 7 + i % 2, "bbox": box(i), "area": box(i)[2] * box(i)[3], "iscrowd": 0}
            for i in mine
            if i % 5
        ]
        document = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "even"}, {"id": 8, "name": "odd"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


def yolo_lines(i: int) -> str:
    x, y, w, h = box(i)
    return f"{i % 2} {(x + w / 2) / SIZE} {(y + h / 2) / SIZE} {w / SIZE} {h / SIZE}\n" if i % 5 else ""


def yolo(root: Path, write: Callable[[Path, int], object] = lambda path, i: put(path.with_suffix(".jpg"), i)) -> None:
    for split, i, _ in splits():
        write(root / "images" / split / f"{i:03}", i)
        (root / "labels" / split).mkdir(parents=True, exist_ok=True)
        (root / "labels" / split / f"{i:03}.txt").write_text(yolo_lines(i))
    (root / "classes.txt").write_text("even\nodd\n")


def multispectral(root: Path) -> None:
    def write(path: Path, i: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rgb = np.asarray(digit(i))
        np.save(path.with_suffix(".npy"), np.concatenate([rgb, rgb[..., :2] // 2], axis=2))  # [H, W, 5] uint8

    yolo(root, write)


def voc(root: Path) -> None:
    for name in ("Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for split in ("train", "val"):
        mine = [i for s, i, _ in splits() if s == split]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i:03}\n" for i in mine))
        for i in mine:
            put(root / "JPEGImages" / f"{i:03}.jpg", i)
            x, y, w, h = box(i)
            corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
            item = f"<object><name>{('even', 'odd')[i % 2]}</name><difficult>0</difficult><bndbox>{corners}</bndbox></object>"
            size = f"<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>"
            (root / "Annotations" / f"{i:03}.xml").write_text(f"<annotation><filename>{i:03}.jpg</filename>{size}{item}</annotation>")


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "image_folder": image_folder, "meta_shift": meta_shift, "siim_acr": siim_acr, "webdataset": webdataset, "cub": cub, "waterbirds": waterbirds,
    "coco": coco, "yolo": yolo, "voc": voc, "multispectral": multispectral,
}  # fmt: skip
