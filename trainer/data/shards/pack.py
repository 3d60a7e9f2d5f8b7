"""Any source into shards that webdataset, birder, timm and this project read: <split>-000000.tar …, classes.txt, _info.json."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.data.formats.boxes import as_listed
from trainer.data.images import decode
from trainer.data.index import FOLDER
from trainer.data.shards.names import CLASSES, INFO, read_info
from trainer.data.shards.tar import BLOCK
from trainer.data.source import BadSample, Sample, Source, encoded
from trainer.errors import ConfigError, Problem, StorageError

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str) -> int:
    """Bytes from "400MB", "1.5GiB" or "1000000"."""
    number = text.strip().rstrip("aAbBgGiIkKmM ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise ConfigError(
            Problem("--size", text, "must be a number of bytes with a unit: KB, MB, GB, KiB, MiB or GiB", "--size 400MB")
        ) from None
    if size <= 0:
        raise ConfigError(Problem("--size", text, "must be more than nothing", "--size 400MB"))
    return size


@dataclass
class Packed:
    """What was packed."""

    shards: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    read: int = 0  # samples of the source gone through: those packed and those left out
    left_out: list[str] = field(default_factory=list)  # samples that cannot be read, with the reason

    @property
    def samples(self) -> int:
        return sum(self.lengths)


def pack(
    source: Source,
    folder: Path,
    split: str,
    *,
    size: int = 400_000_000,
    shuffle: int | None = None,
    verify: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write a source into a folder as one split. Broken off and called again, it goes on behind the last whole shard.

    Args:
        split: the split's name in file names and in _info.json.
        size: bytes of a shard at most; a single larger sample gets one of its own.
        shuffle: seed of a random order; None = the source's own order.
        verify: decode every image and leave out those that fail, instead of looking at their headers only.
        overwrite: replace a split of that name.

    Raises:
        ConfigError: the folder holds something else.
        StorageError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_classes(source, folder)
        state = _State.open(source, folder, split, {"size": size, "shuffle": shuffle, "verify": verify}, overwrite)
        order = np.arange(len(source)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(source))
        if hasattr(source, "lazy"):
            source.lazy = not verify  # pyright: ignore[reportAttributeAccessIssue]
        _fill(source, order, state, size, verify, progress)
        state.finish(source)
    except OSError as error:
        raise StorageError(f"{error.filename or folder}: {error.strerror or error}") from None
    return state.packed


def _fill(source: Source, order: np.ndarray, state: _State, size: int, verify: bool, progress: Callable[[int, int], None] | None) -> None:
    """Write the shards that are still missing."""
    with _Shard(state) as shard:
        for position in range(state.packed.read, len(order)):
            if progress is not None:
                progress(position, len(order))
            index = int(order[position])
            try:
                parts = sample_members(source, index, verify)
            except BadSample as bad:
                shard.left_out.append(str(bad))
            else:
                needed = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in parts.values())
                if shard.samples and -(-(shard.filled + needed + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE > size:
                    shard.close(read=position)
                shard.add(f"sample{position:09d}", parts, needed)
        shard.close(read=len(order))
    if progress is not None:
        progress(len(order), len(order))


class _Shard:
    """The shard being written: under another name until it is whole."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self._begin()

    def _begin(self) -> None:
        self.samples, self.filled, self.left_out = 0, 0, []
        self.path = self.state.folder / f"{self.state.split}-{len(self.state.packed.shards):06d}.tar"
        self.part = self.path.with_name(f".{self.path.name}.part")
        self.tar: tarfile.TarFile | None = None

    def add(self, key: str, parts: dict[str, bytes], filled: int) -> None:
        if self.tar is None:
            self.tar = tarfile.open(self.part, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        for ending, content in parts.items():
            member = tarfile.TarInfo(f"{key}.{ending}")  # no time, no owner: the same bytes whoever packs them and when
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))
        self.samples, self.filled = self.samples + 1, self.filled + filled

    def close(self, read: int) -> None:
        """Give the shard its name and note it down; the next `add` begins another."""
        if self.tar is not None:
            self.tar.close()
            with open(self.part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self.part, self.path)
        self.state.add(self.path.name if self.tar else None, self.samples, read, self.left_out)
        self._begin()

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *_: object) -> None:
        if self.tar is not None:  # broken off: this shard will be written anew
            self.tar.fileobj.close()  # type: ignore[union-attr]
            self.part.unlink(missing_ok=True)


def sample_members(source: Source, index: int, verify: bool = False) -> dict[str, bytes]:
    """A sample's files by their endings: the image as it lies on disk where there is such a file, `cls`, `json`, `mask.png`."""
    sample = source[index]
    image, known = sample["image"], encoded(source, index)
    if known is not None:
        data, extension = known
        members = {extension.lstrip("."): data}
        if verify and not isinstance(image, np.ndarray):
            decode(image, source.name(index))
    elif isinstance(image, np.ndarray):
        members = {"npy": _npy(image)}
    else:
        members = {"png": _png(image)}
    if "label" in sample:
        members["cls"] = str(int(sample["label"])).encode()
    described = _json(sample, image)
    if described:
        members["json"] = json.dumps(described, separators=(",", ":")).encode()
    if "mask" in sample:
        members["mask.png"] = _png(Image.fromarray(sample["mask"]))
    return members


def _json(sample: Sample, image: Any) -> dict[str, Any]:
    found: dict[str, Any] = {key: sample[key].tolist() for key in ("box", "parts") if key in sample}
    found |= {"group": int(sample["group"])} if "group" in sample else {}
    if "boxes" in sample:
        height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        boxes, labels, crowd, area = as_listed(sample)
        found |= {
            "image_id": int(sample["image_id"]), "width": int(width), "height": int(height), "boxes_format": "xyxy", "boxes": boxes.tolist(),
            "labels": (labels.astype(int) + 1).tolist(), "first_label": 1,  # 0 is the background, as birder has it
            "area": area.tolist(), "iscrowd": crowd.astype(int).tolist(),
        }  # fmt: skip
    return found


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


class _State:
    """How far a split has been packed: a small file that says which shards are whole."""

    def __init__(self, folder: Path, split: str, key: dict[str, Any], packed: Packed) -> None:
        self.folder, self.split, self.key, self.packed = folder, split, key, packed
        self.path = folder / FOLDER / f"pack-{split}.json"

    @classmethod
    def open(cls, source: Source, folder: Path, split: str, options: dict[str, Any], overwrite: bool) -> _State:
        key = {"source": source.fingerprint, "samples": len(source), **options}
        state = cls(folder, split, key, Packed())
        info = _info(folder)
        before = json.loads(state.path.read_text()) if state.path.exists() else None
        if overwrite:
            state._forget(info)
        elif before is not None and before["key"] == key and all((folder / name).is_file() for name in before["packed"]["shards"]):
            state.packed = Packed(**before["packed"])
        elif before is not None or split in info["splits"] or list(folder.glob(f"{split}-*.tar")):
            raise ConfigError(
                Problem(
                    "--split",
                    split,
                    f"{folder} holds a split of that name, packed from other data or with other options",
                    "another --split name, or --overwrite",
                )
            )
        return state

    def add(self, name: str | None, samples: int, read: int, left_out: list[str]) -> None:
        """Note down a shard that is whole."""
        if name is not None:
            self.packed.shards.append(name)
            self.packed.lengths.append(samples)
        self.packed.read = read
        self.packed.left_out += left_out
        self._save()

    def finish(self, source: Source) -> None:
        self._save()
        if source.classes:
            _write(self.folder / CLASSES, lambda file: file.write(("\n".join(source.classes) + "\n").encode()))
        info = _info(self.folder)
        entry = {
            "name": self.split,
            "filenames": self.packed.shards,
            "shard_lengths": self.packed.lengths,
            "num_samples": self.packed.samples,
        }
        info["splits"] = {**info["splits"], self.split: entry}
        _write(self.folder / INFO, lambda file: file.write(json.dumps(info, indent=2).encode()))

    def _save(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        _write(self.path, lambda file: file.write(json.dumps({"key": self.key, "packed": vars(self.packed)}).encode()))

    def _forget(self, info: dict[str, Any]) -> None:
        if info["splits"].pop(self.split, None) is not None:
            _write(self.folder / INFO, lambda file: file.write(json.dumps(info, indent=2).encode()))
        self.path.unlink(missing_ok=True)
        for shard in self.folder.glob(f"{self.split}-*.tar"):
            shard.unlink()


def _info(folder: Path) -> dict[str, Any]:
    return read_info(str(folder / INFO)) if (folder / INFO).exists() else {"name": folder.resolve().name, "splits": {}}


def _check_classes(source: Source, folder: Path) -> None:
    """Splits in one folder share their classes."""
    path = folder / CLASSES
    if path.exists() and source.classes:
        there = path.read_text(encoding="utf-8").splitlines()
        if there != list(source.classes):
            raise ConfigError(
                Problem(
                    "DST",
                    str(folder),
                    f"its {CLASSES} lists {len(there)} classes, the source has {len(source.classes)} or names them differently",
                    "another folder, or dataset.class_file=<that file>",
                )
            )


def _write(path: Path, fill: Callable[[Any], Any]) -> None:
    """A file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
