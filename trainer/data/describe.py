"""What is in a dataset, before anything is trained on it: counts, sizes, colours, duplicates, bad files. Prints and plots."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.dataset import DatasetConfig
from trainer.data.source import BadSample, Source, encoded

BAD_SHOWN = 20  # samples of a split that cannot be read; a file has them all
READERS = 4  # threads: decoders let go of the interpreter's lock


@dataclass
class Split:
    """What was found in one split."""

    name: str
    samples: int
    looked_at: int  # images that were read: all, or evenly spread ones
    classes: list[str]
    counts: list[int] | None  # samples of each class; None where there are no labels
    objects: list[int] | None  # boxes of each class, where there are boxes
    sizes: np.ndarray  # int [looked_at, 2] (width, height) in pixels
    mean: np.ndarray  # float [C], over pixels of images scaled to [0, 1], every image weighing the same
    std: np.ndarray  # float [C]
    duplicates: list[list[str]]  # names of images whose bytes are equal, one list for each such image
    bad: list[str]
    digests: dict[bytes, str] = field(repr=False, default_factory=dict)  # of every image: the first name it has


@dataclass
class _Moments:
    """Of one image: its size, the mean and mean square of each channel, and the hash of its bytes."""

    name: str
    size: tuple[int, int]
    mean: np.ndarray
    square: np.ndarray
    digest: bytes


def describe_source(source: Source, name: str, limit: int | None = None) -> Split:
    """Look through a split.

    Args:
        limit: read this many images at most, evenly spread; None reads all.
    """
    count = len(source) if limit is None else min(limit, len(source))
    rows = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)) if count else np.zeros(0, int)
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda row: _look(source, int(row)), rows))
    good = [f for f in found if isinstance(f, _Moments)]
    by_digest: dict[bytes, list[str]] = {}
    for moments in good:
        by_digest.setdefault(moments.digest, []).append(moments.name)
    labels, whole = source.labels(), getattr(source, "source", source)
    object_counts: Callable[[], np.ndarray | None] = getattr(whole, "object_counts", lambda: None)
    objects = object_counts()
    shape = Counter(len(m.mean) for m in good).most_common(1)
    channels = shape[0][0] if shape else source.channels
    same = [m for m in good if len(m.mean) == channels]
    mean = np.mean([m.mean for m in same], axis=0) if same else np.full(channels, np.nan)
    square = np.mean([m.square for m in same], axis=0) if same else np.full(channels, np.nan)
    return Split(
        name=name,
        samples=len(source),
        looked_at=len(rows),
        classes=list(source.classes),
        counts=None if labels is None else np.bincount(labels[labels >= 0], minlength=len(source.classes)).tolist(),
        objects=None if objects is None else objects.tolist(),
        sizes=np.array([m.size for m in good], dtype=int).reshape(-1, 2),
        mean=mean,
        std=np.sqrt(np.maximum(square - mean**2, 0)),
        duplicates=[names for names in by_digest.values() if len(names) > 1],
        bad=[str(f) for f in found if isinstance(f, BadSample)],
        digests={digest: names[0] for digest, names in by_digest.items()},
    )


def _look(source: Source, row: int) -> _Moments | BadSample:
    try:
        image = source[row]["image"]
        file = encoded(source, row)
    except BadSample as bad:
        return bad
    pixels = np.asarray(image)
    digest = hashlib.blake2b(file[0] if file is not None else pixels.tobytes(), digest_size=16).digest()
    scale = {"uint8": 255.0, "uint16": 65535.0}.get(pixels.dtype.name, 1.0)
    values = pixels.reshape(-1, pixels.shape[-1]).astype(np.float32) / scale  # [H W, C]
    size = (pixels.shape[1], pixels.shape[0])
    return _Moments(source.name(row), size, values.mean(axis=0, dtype=np.float64), (values**2).mean(axis=0, dtype=np.float64), digest)


def shared_between(a: Split, b: Split) -> list[tuple[str, str]]:
    """Images of both splits, byte for byte: what was learned by heart would count as generalised."""
    return [(name, b.digests[digest]) for digest, name in a.digests.items() if digest in b.digests]


def describe(config: DatasetConfig, out: Path | None = None, limit: int | None = None, say: Callable[[str], object] = print) -> list[Split]:
    """Look through the splits of a dataset, tell what is there, and draw it into `out`/data.png.

    What cannot be read is all in `out`/bad.txt, one sample a line, where there is more of it than is told.
    """
    splits = [describe_source(config.build(name), name, limit) for name in config.splits]
    for split in splits:
        for line in _lines(split):
            say(line)
    both = shared_between(*splits) if len(splits) == 2 else []
    if both:
        say(f"{len(both)} images are in both splits, byte for byte: {_few(f'{a} = {b}' for a, b in both)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        bad = [line for split in splits for line in split.bad]
        if any(len(split.bad) > BAD_SHOWN for split in splits):
            (out / "bad.txt").write_text("".join(f"{line}\n" for line in bad), encoding="utf-8", errors="surrogateescape")
            say(f"all {len(bad)} that cannot be read: {out / 'bad.txt'}")
        _draw(splits, out / "data.png")
        say(f"drawn: {out / 'data.png'}")
    return splits


def _lines(split: Split) -> Iterable[str]:
    seen = "" if split.looked_at == split.samples else f" ({split.looked_at} of them looked at)"
    yield f"{split.name}: {split.samples} samples{seen}, {len(split.classes)} classes"
    for what, counts in (("samples", split.counts), ("objects", split.objects)):
        if counts:
            order = np.argsort(counts, kind="stable")[::-1]
            named = [f"{split.classes[i]} {counts[i]}" for i in order]
            shown = named if len(named) <= 12 else [*named[:6], "…", *named[-5:]]
            yield f"  {what} a class: {min(counts)} to {max(counts)}, {', '.join(shown)}"
            empty = [split.classes[i] for i in order if not counts[i]]
            if empty:
                yield f"  classes without any: {_few(empty)}"
    if len(split.sizes):
        low, middle, high = (np.percentile(split.sizes, q, axis=0).round().astype(int) for q in (0, 50, 100))
        yield f"  width {low[0]} to {high[0]} (median {middle[0]}), height {low[1]} to {high[1]} (median {middle[1]}) pixels"
        yield f"  dataset.mean=[{_numbers(split.mean)}] dataset.std=[{_numbers(split.std)}]"
    if split.duplicates:
        yield f"  {sum(len(names) - 1 for names in split.duplicates)} duplicates: {_few(' = '.join(names[:3]) for names in split.duplicates)}"
    if split.bad:
        yield f"  {len(split.bad)} that cannot be read:"
        yield from (f"    {bad}" for bad in split.bad[:BAD_SHOWN])
        if len(split.bad) > BAD_SHOWN:
            yield f"    … and {len(split.bad) - BAD_SHOWN} more"


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" … ({len(names)})" if len(names) > 5 else "")


def _numbers(values: np.ndarray) -> str:
    return ",".join(f"{v:.3f}" for v in values)


def _draw(splits: list[Split], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, len(splits), squeeze=False)
    for column, split in enumerate(splits):
        counts = split.counts or split.objects or []
        above, below = axes[0][column], axes[1][column]
        above.bar(range(len(counts)), counts)
        above.set_title(f"{split.name}: {'samples' if split.counts else 'objects'} a class")
        if len(counts) <= 30:
            above.set_xticks(range(len(counts)), split.classes[: len(counts)], rotation=90)
        below.scatter(*split.sizes.T, s=4, alpha=0.3)
        below.set(title="size of the images", xlabel="width in pixels", ylabel="height in pixels")
    figure.savefig(path, dpi=110)
