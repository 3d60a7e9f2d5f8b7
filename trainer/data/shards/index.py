"""Where each sample of each shard lies: scanned once, kept beside the shards, and trusted until a shard changes.

A shard that is cut short, damaged, or holds what no shard should is found here, before the first epoch.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.formats.boxes import Annotations, settle
from trainer.data.index import Watch, cache_directory, cached
from trainer.data.shards.store import Files, Window, describe, is_remote
from trainer.data.shards.tar import BLOCK, Member, ReadAt, ShardError, members
from trainer.data.table import Column, Ragged, Strings, Table

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2", "avif", "npy")
MASKS = ("mask.png", "seg.png")
SCANNERS = 8  # threads: headers far apart on a disk, or behind a network, are waited for
# webdataset's rule: a sample's key is the name up to the first dot behind the last slash, the rest is the field.
NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")


def index_shards(places: Sequence[str], policy: str, *, progress: Callable[[int, int], None] | None = None) -> Table:
    """All samples of these shards, in order.

    Columns: `key`, `shard` (place in `places`), and offset and size in bytes of `image`, `json` and `mask` (size 0: none),
    `kind` (place in IMAGES), `label` (-1: none); `shard_size`; for detection the columns of a box table too.

    Args:
        policy: what becomes of boxes that cannot be right, as in `formats.boxes.settle`.

    Raises:
        ShardError: a shard is cut short, damaged, or holds what it should not.
        OSError: a shard cannot be read.
    """

    def scan(watch: Watch):
        for place in places:
            if not is_remote(place):
                watch.add(place)
        done = 0
        tables = []
        with ThreadPoolExecutor(SCANNERS) as pool:
            for table in pool.map(index_shard, places):
                tables.append(table)
                done += 1
                if progress is not None:
                    progress(done, len(places))
        return _merged(places, tables, policy)

    base = cache_directory("shards") if any(map(is_remote, places)) else Path(os.path.dirname(places[0]))
    which = [[*describe(place), place] if is_remote(place) else os.path.relpath(place, base) for place in places]
    return cached(base, "shards", {"which": which, "policy": policy}, scan)


def index_shard(place: str) -> Table:
    """The samples of one shard."""
    if not is_remote(place):
        return cached(Path(place), "shard", {}, lambda watch: _scan_shard(place, watch))
    return cached(cache_directory("shards"), "shard", {"place": place, "is": describe(place)}, lambda watch: _scan_shard(place, None))


def _scan_shard(place: str, watch: Watch | None) -> tuple[dict[str, Column], dict[str, Any]]:
    if watch is not None:
        watch.add(place)
    size, _ = describe(place)
    read_at = Window(place, size).read_at if is_remote(place) else functools.partial(Files().read_at, place)
    sample_rows = [_Row(place, key, fields, read_at) for key, fields in samples(place, read_at, size)]
    if not sample_rows:
        raise ShardError(place, "holds no sample")
    columns: dict[str, Column] = {
        "key": Strings.pack(row.key for row in sample_rows),
        "kind": np.array([row.kind for row in sample_rows], np.uint8),
        "label": np.array([row.label for row in sample_rows], np.int32),
        "size": np.array([[row.width, row.height] for row in sample_rows], np.int32),
        "image_id": np.array([row.image_id for row in sample_rows], np.int64),
    }
    for part in ("image", "json", "mask"):
        columns[part] = np.array([row.place(part) for row in sample_rows], np.int64)  # [N, 2] (offset, bytes)
    boxes = [box for row in sample_rows for box in row.boxes]  # (x1, y1, x2, y2, label, crowd, area)
    columns["boxes"] = Ragged.pack([len(row.boxes) for row in sample_rows], np.array(boxes, np.float64).reshape(-1, 7))
    return columns, {"bytes": size, "fields": sorted({field for row in sample_rows for field in row.fields})}


def samples(shard: str, read_at: ReadAt, total: int) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {field: member}) of every sample: the neighbours in the archive that share a key."""
    seen: set[str] = set()
    key, fields = None, {}
    for member in members(shard, read_at, total):
        found = NAME.match(member.name.removeprefix("./"))
        if not found or member.name.startswith("__"):
            continue  # a README, a folder's .DS_Store, webdataset's own __notes__
        own, field = found.group(1), found.group(2).lower()
        if own != key:
            if key is not None:
                yield key, fields
            if own in seen:
                raise ShardError(
                    shard, f"the sample {own!r} is in it twice, or its files lie apart: readers would see two samples. Pack it again"
                )
            seen.add(own)
            key, fields = own, {}
        if field in fields:
            raise ShardError(shard, f"{member.name!r} is in it twice: refused. Pack it again")
        fields[field] = member
    if key is not None:
        yield key, fields


class _Row:
    """What the index keeps of a sample."""

    def __init__(self, shard: str, key: str, fields: Mapping[str, Member], read_at: ReadAt) -> None:
        self.key = key
        image = next((field for field in fields if field in IMAGES), None)
        if image is None:
            raise ShardError(shard, f"the sample {key!r} has no image; its files end in {', '.join(fields)}")
        self.kind = IMAGES.index(image)
        self.members = {"image": fields[image], "json": fields.get("json"), "mask": next((fields[m] for m in MASKS if m in fields), None)}
        self.label, self.width, self.height, self.image_id = -1, 0, 0, -1
        self.boxes: list[list[float]] = []
        self.fields = {"mask"} if self.members["mask"] else set()
        if "json" in fields:
            self._read_json(shard, _content(fields["json"], read_at))
        if "cls" in fields:
            self.label = _class_index(shard, fields["cls"], read_at)
        if self.label >= 0:
            self.fields.add("label")

    def place(self, part: str) -> tuple[int, int]:
        member = self.members[part]
        return (member.offset, member.size) if member else (0, 0)

    def _read_json(self, shard: str, data: bytes) -> None:
        try:
            found = json.loads(data)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ShardError(shard, f"{self.key}.json is not JSON: {error}") from None
        if not isinstance(found, dict):
            return
        if isinstance(found.get("label"), int):
            self.label = found["label"]
        self.fields |= {field for field in ("box", "parts", "group") if found.get(field) is not None}
        if "boxes" in found:
            self.fields.add("boxes")
            self._read_boxes(shard, found)

    def _read_boxes(self, shard: str, found: dict[str, Any]) -> None:
        """birder's `json` field: xyxy in pixels, labels from 1 because 0 is the background (`first_label` says otherwise)."""
        boxes, labels = found["boxes"], found.get("labels")
        if found.get("boxes_format", "xyxy") != "xyxy":
            raise ShardError(shard, f"{self.key}.json: boxes_format {found['boxes_format']!r} is not supported, only xyxy")
        if not isinstance(boxes, list) or not isinstance(labels, list) or len(boxes) != len(labels):
            raise ShardError(shard, f"{self.key}.json: `boxes` and `labels` must be lists of one length")
        self.width, self.height = (int(found.get(side) or 0) for side in ("width", "height"))
        if self.width <= 0 or self.height <= 0:
            raise ShardError(shard, f"{self.key}.json: boxes need the image's width and height")
        self.image_id = found["image_id"] if isinstance(found.get("image_id"), int) else -1
        first = found.get("first_label", 1)
        crowd, area = found.get("iscrowd") or [0] * len(boxes), found.get("area") or [math.nan] * len(boxes)
        for box, label, is_crowd, pixels in zip(boxes, labels, crowd, area, strict=True):
            corners = [float(n) for n in box] if isinstance(box, list) and len(box) == 4 else [math.nan] * 4
            self.boxes.append([*corners, label - first if isinstance(label, int) else -1, bool(is_crowd), pixels])


def _content(member: Member, read_at: ReadAt) -> bytes:
    return member.start if member.size <= len(member.start) else read_at(member.offset, member.size)


def _class_index(shard: str, member: Member, read_at: ReadAt) -> int:
    text = _content(member, read_at)[:BLOCK].strip()
    if not text.isdigit():
        raise ShardError(shard, f"{member.name!r} holds {text[:40]!r}, not the number of a class (from 0, as the lines of the class file)")
    return int(text)


def _merged(places: Sequence[str], tables: Sequence[Table], policy: str) -> tuple[dict[str, Column], dict[str, Any]]:
    """The tables of all shards as one."""
    fields = sorted({field for table in tables for field in table.meta["fields"]})
    if "label" in fields:
        _check_labels(places, tables)
    columns: dict[str, Column] = {
        name: np.concatenate([np.asarray(t[name]) for t in tables]) for name in ("kind", "label", "image", "json", "mask")
    }
    counts = [len(table) for table in tables]
    columns["key"] = Strings.pack(key for table in tables for key in table["key"].all())
    columns["shard"] = np.repeat(np.arange(len(tables), dtype=np.int32), counts)
    columns["shard_size"] = np.array([table.meta["bytes"] for table in tables], np.int64)
    meta: dict[str, Any] = {"fields": fields, "counts": counts}
    if "boxes" in fields:
        columns, more = _with_boxes(columns, places, tables, policy)
        meta |= {"defects": more["defects"], "policy": policy}
    return columns, meta


def _check_labels(places: Sequence[str], tables: Sequence[Table]) -> None:
    for place, table in zip(places, tables, strict=True):
        without = np.flatnonzero(np.asarray(table["label"]) < 0)
        if len(without):
            raise ShardError(place, f"{len(without)} samples have no label while others do, the first: {table['key'][int(without[0])]!r}")


def _with_boxes(
    columns: dict[str, Column], places: Sequence[str], tables: Sequence[Table], policy: str
) -> tuple[dict[str, Column], dict[str, Any]]:
    """The columns of a box table beside those of the shards; every box judged by the policy."""
    boxes = np.concatenate([np.asarray(t["boxes"].values) for t in tables])  # [M, 7]
    counts = np.concatenate([np.diff(np.asarray(t["boxes"].offsets)) for t in tables])
    sizes = np.concatenate([np.asarray(t["size"]) for t in tables])
    ids = np.concatenate([np.asarray(t["image_id"]) for t in tables])
    keys = [key.decode("utf-8", "surrogateescape") for table in tables for key in table["key"].all()]
    highest = int(boxes[:, 4].max(initial=-1)) + 1  # the class file is checked against it; names do not matter here
    read = Annotations(classes=[str(i) for i in range(highest)])
    read.paths, read.sizes = keys, [(int(w), int(h)) for w, h in sizes]
    read.image_ids = [int(i) if i >= 0 else n for n, i in enumerate(ids)]
    read.counts = counts.tolist()
    read.boxes, read.labels = boxes[:, :4].tolist(), boxes[:, 4].astype(int).tolist()
    read.sides = (boxes[:, 2:4] - boxes[:, :2]).tolist()
    read.crowd, read.areas = boxes[:, 5].astype(bool).tolist(), boxes[:, 6].tolist()
    judged, meta = settle(read, policy, True, f"{places[0]} and {len(places) - 1} more")
    return {**columns, **{name: column for name, column in judged.items() if name != "path"}}, meta
