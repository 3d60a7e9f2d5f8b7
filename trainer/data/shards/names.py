"""Which shards make a split: from a directory, from braces, or from info files. Looks at names only, opens no shard."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.shards.store import exists, is_remote, join, parent, read_all
from trainer.data.source import LayoutError

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
INFO = "_info.json"
CLASSES = "classes.txt"


@dataclass(frozen=True)
class Shards:
    """The shards of a split, in order, and what is said about them."""

    places: tuple[str, ...]  # paths or addresses
    lengths: tuple[int, ...] | None = None  # samples of each, as an info file says
    size: int | None = None  # samples of all, as an info file says
    said_by: str = ""  # that info file


def expand(pattern: str) -> list[str]:
    """Braces as a shell has them: {000..099} counts, keeping leading zeros; {a,b} lists; several multiply."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        if "{" in pattern or "}" in pattern:
            raise LayoutError(f"{pattern}: the braces do not match")
        return [pattern]
    before, inside, after = pattern[: found.start()], found.group(1), pattern[found.end() :]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers:
        first, last = numbers.groups()
        if int(first) > int(last):
            raise LayoutError(f"{pattern}: {{{inside}}} counts backwards")
        width = len(first) if len(first) == len(last) or first.startswith("0") else 0
        choices = [str(n).zfill(width) for n in range(int(first), int(last) + 1)]
    elif "," in inside:
        choices = inside.split(",")
    else:
        raise LayoutError(f"{pattern}: {{{inside}}} is neither {{first..last}} nor {{this,that}}")
    return [place for choice in choices for place in expand(before + choice + after)]


def is_pattern(path: str) -> bool:
    return "{" in path or "::" in path or path.endswith(".tar")


def of_pattern(path: str) -> Shards:
    """Shards named one by one: braces, one .tar, or several of these joined by `::`. Local ones must all be there."""
    places = [str(Path(p).expanduser()) if not is_remote(p) else p for part in path.split("::") for p in expand(part)]
    missing = [p for p in places if not is_remote(p) and not os.path.isfile(p)]
    if missing:
        raise LayoutError(
            f"{len(missing)} of the {len(places)} shards named are missing: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
        )
    doubled = sorted({p for p in places if places.count(p) > 1}) if len(set(places)) < len(places) else []
    if doubled:
        raise LayoutError(f"names {doubled[0]} more than once")
    return Shards(tuple(places))


def of_directory(directory: str, split: str, *, alone: bool) -> Shards:
    """The shards of a split among those of a directory. Numbering may have gaps; numbers are ordered as numbers.

    Args:
        alone: the directory is meant for this split, so shards whose names tell no split belong to it too.
    """
    below = next((p for name in SPLITS[split] for p in [os.path.join(directory, name)] if os.path.isdir(p) and _tars(p)), None)
    if below is not None and not _tars(directory):
        return Shards(tuple(os.path.join(below, name) for name in _tars(below)))
    names = _tars(directory)
    if not names:
        packed = sorted(n for n in os.listdir(directory) if n.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2")))
        hint = f"; {packed[0]} is compressed: unpack it with gunzip or the like, random access needs plain .tar" if packed else ""
        raise LayoutError(f"{directory} holds no .tar file{hint}")
    told = {name: _split_of(name) for name in names}
    confused = [name for name, splits in told.items() if len(splits) > 1]
    if confused:
        raise LayoutError(
            f"{directory}: the name {confused[0]} speaks of several splits ({', '.join(sorted(told[confused[0]]))}); name the shards with braces"
        )
    chosen = [name for name in names if split in told[name]]
    if not chosen and alone:
        chosen = [name for name in names if not told[name]]
    if not chosen:
        raise LayoutError(f"{directory} holds {len(names)} shards ({names[0]} …), but none with {' or '.join(SPLITS[split])} in its name")
    return Shards(tuple(os.path.join(directory, name) for name in chosen))


def _tars(directory: str) -> list[str]:
    names = [e.name for e in os.scandir(directory) if e.name.endswith(".tar") and not e.name.startswith(".") and e.is_file()]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _split_of(name: str) -> set[str]:
    words = set(re.split(r"[^a-z]+", name.lower()))
    found = {split for split, known in SPLITS.items() if words & set(known)}
    return found | ({"test"} if "test" in words else set())


def of_info(places: Sequence[str], split_names: Sequence[str]) -> Shards:
    """The shards that info files list under one of `split_names`, file after file. Their samples are known where every file tells."""
    shards: list[str] = []
    lengths: list[int] = []
    known: list[str] = []
    sizes: list[int | None] = []  # of each file that has the split
    for place in places:
        splits = read_info(place)["splits"]
        known += splits
        entry = next((splits[name] for name in split_names if name in splits), None)
        if entry is None:
            continue
        names, counts = entry["filenames"], entry.get("shard_lengths")
        shards += [join(parent(place), name) for name in names]
        lengths += counts if isinstance(counts, list) and len(counts) == len(names) else []
        sizes.append(entry.get("num_samples") or sum(counts or []) or None)
    if not shards:
        raise LayoutError(
            f"{', '.join(places)}: no split {' or '.join(split_names)}; there are {', '.join(dict.fromkeys(known)) or 'none'}"
        )
    missing = [p for p in shards if not is_remote(p) and not os.path.isfile(p)]
    if missing:
        raise LayoutError(
            f"{', '.join(places)}: {len(missing)} of the {len(shards)} shards listed are missing: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
        )
    whole = [p if is_remote(p) else os.path.normpath(p) for p in shards]
    doubled = [p for p in whole if whole.count(p) > 1] if len(set(whole)) < len(whole) else []
    if doubled:
        raise LayoutError(f"{', '.join(places)}: {doubled[0]} is listed more than once")
    size = None if None in sizes else sum(n for n in sizes if n)
    return Shards(tuple(shards), tuple(lengths) if len(lengths) == len(shards) else None, size, ", ".join(places))


def read_info(place: str) -> dict[str, Any]:
    """An _info.json as birder and timm write it: {"splits": {name: {"filenames", "shard_lengths", "num_samples"}}}."""
    try:
        info = json.loads(read_all(place))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LayoutError(f"{place} is not JSON: {error}") from None
    splits = info.get("splits") if isinstance(info, dict) else None
    if not isinstance(splits, dict):
        raise LayoutError(f"{place} has no `splits`")
    for name, entry in splits.items():
        files, counts = (entry.get(k) for k in ("filenames", "shard_lengths")) if isinstance(entry, dict) else (None, None)
        if not isinstance(files, list) or not all(isinstance(f, str) for f in files) or not files:
            raise LayoutError(f"{place}: the split {name!r} lists no `filenames`")
        if counts is not None and (not isinstance(counts, list) or len(counts) != len(files)):
            raise LayoutError(
                f"{place}: the split {name!r} lists {len(files)} filenames, but {len(counts) if isinstance(counts, list) else 'no list of'} shard_lengths"
            )
    return info


def find_beside(places: Sequence[str], name: str) -> str | None:
    """A file of this name beside the shards, or one folder up."""
    folders = dict.fromkeys(folder for place in places[:1] for folder in (parent(place), parent(parent(place))))
    return next((join(folder, name) for folder in folders if exists(join(folder, name))), None)
