"""Samples out of shards, by number: each is a seek away, so order, resuming and shares are those of any other source."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.formats.boxes import HARMLESS, report
from trainer.data.formats.yolo import array_header, read_array
from trainer.data.images import decode, open_image
from trainer.data.shards.index import IMAGES
from trainer.data.shards.store import Files
from trainer.data.source import BadSample, Sample
from trainer.data.table import Table

logger = logging.getLogger(__name__)

EXTRAS = frozenset({"box", "parts", "group"})  # what a sample's JSON may hold besides label and boxes


class ShardSource:
    """The samples that an index of shards lists."""

    def __init__(self, places: Sequence[str], table: Table, classes: Sequence[str], split: str) -> None:
        self.places, self.table, self.classes, self.train = tuple(places), table, tuple(classes), split == "train"
        self.fingerprint = table.fingerprint
        self.fields = frozenset(table.meta["fields"])
        self.files = Files()
        self.lazy = False
        self.least: int | None = None
        self.channels = self._channels()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name, kind = self.name(index), IMAGES[self.table["kind"][index]]
        data = self._read(index, "image")
        sample: Sample = {}
        if kind == "npy":
            image = read_array(data, name, self.channels)
            size = image.shape[1], image.shape[0]
        else:
            image = open_image(data, name)
            size = image.size
        if "label" in self.fields:
            sample["label"] = int(self.table["label"][index])
        if "boxes" in self.fields:
            sample |= self._objects(index, name, size)
        if self.fields & EXTRAS:
            sample |= extras(json.loads(self._read(index, "json") or b"{}"))
        if "mask" in self.fields:
            mask = self._read(index, "mask")
            sample |= {"mask": read_mask(mask, name, size)} if mask else {}
        missing = (self.fields & {*EXTRAS, "mask"}) - sample.keys()
        if missing:
            raise BadSample(name, f"has no {', '.join(sorted(missing))}, others do")
        if kind != "npy" and not self.lazy:
            image = decode(image, name, least=self.least)  # type: ignore[arg-type]
        return {"image": image, **sample}

    def _objects(self, index: int, name: str, size: tuple[int, int]) -> Sample:
        width, height = (int(n) for n in self.table["dimensions"][index])
        if width and size != (width, height):
            raise BadSample(name, f"is {size[0]} x {size[1]} pixels, but its annotations are for {width} x {height}")
        crowd = self.table["crowd"][index]
        found = {
            "boxes": self.table["boxes"][index],
            "labels": self.table["labels"][index].astype(np.int64),
            "crowd": crowd,
            "area": self.table["area"][index],
        }
        if self.train:  # as in DetectionSource: crowds are for validation only
            found = {key: value[~crowd] for key, value in found.items()}
        else:
            found["truth"] = self.table["truth"][index]
        return {**found, "image_id": int(self.table["image_id"][index])}

    def _read(self, index: int, part: str) -> bytes:
        offset, size = (int(n) for n in self.table[part][index])
        shard = int(self.table["shard"][index])
        place = self.places[shard]
        try:
            data = self.files.read_at(place, offset, size, int(self.table["shard_size"][shard]))
        except OSError as error:
            raise BadSample(self.name(index), error.strerror or str(error)) from None
        if len(data) < size:
            raise BadSample(self.name(index), f"{place} was cut short while it was in use")
        return data

    def _channels(self) -> int:
        if IMAGES[self.table["kind"][0]] != "npy":
            return 3
        import io

        header = array_header(io.BytesIO(self._read(0, "image")))
        return header[0][2] if header else 3

    def name(self, index: int) -> str:
        return f"{self.places[int(self.table['shard'][index])]}:{self.table['key'][index]}"

    def labels(self) -> np.ndarray | None:
        return np.asarray(self.table["label"]).astype(np.int64) if "label" in self.fields else None

    def aspect_ratios(self) -> np.ndarray | None:
        """Known where there are boxes, as these are said to be of an image of some size."""
        width, height = np.asarray(self.table["dimensions"]).T if "boxes" in self.fields else (np.zeros(1), np.zeros(1))
        return width / height if height.all() else None

    def object_counts(self) -> np.ndarray | None:
        """Objects of each class, int64 [classes], where there are boxes."""
        return np.bincount(np.asarray(self.table["labels"].values), minlength=len(self.classes)) if "boxes" in self.fields else None

    def encoded(self, index: int) -> tuple[bytes, str]:
        return self._read(index, "image"), "." + IMAGES[self.table["kind"][index]]

    def decode_hint(self, least: int | None) -> None:
        if not self.fields & {"boxes", "box", "parts", "mask"}:  # those are in the pixels of the whole image
            self.least = least

    def announce(self) -> None:
        """Say once what was wrong with the boxes and what became of it."""
        defects = {k: v for k, v in self.table.meta.get("defects", {}).items() if k not in HARMLESS}
        if defects:
            logger.warning(
                "%s: annotations that cannot be right were mended or dropped (dataset.bad_boxes) in training, and are scored as they are:\n%s",
                os.path.dirname(self.places[0]),
                "\n".join(report(defects)),
            )


def extras(found: dict[str, Any]) -> Sample:
    """Those of EXTRAS that a sample's JSON holds."""
    sample: Sample = {}
    for key in ("box", "parts"):
        if found.get(key) is not None:
            sample[key] = np.array(found[key], dtype=np.float32)
    if found.get("group") is not None:
        sample["group"] = int(found["group"])
    return sample


def read_mask(data: bytes, name: str, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W] as it was packed."""
    mask = open_image(data, f"{name}.mask.png")
    if mask.size != size:
        raise BadSample(name, f"is {size[0]} x {size[1]} pixels, its mask {mask.size[0]} x {mask.size[1]}")
    try:
        return np.array(mask if mask.mode in ("L", "P") else mask.convert("L"), dtype=np.uint8)
    except Exception as error:  # decoders raise anything on malformed data
        raise BadSample(name, f"its mask cannot be decoded: {error}") from None
