"""JPEGs to read: photograph-like textures in class folders, and the same bytes in shards.

`python -m benchmarks.peers.corpus DIR COUNT WIDTH HEIGHT SHARDS SLOPE QUALITY` writes DIR/folder/{train,val}/<class>/, the same as DIR/plain/,
and DIR/shards/.
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ash", "beech", "cedar", "elm")


def texture(seed: int, width: int, height: int, slope: float, quality: int) -> bytes:
    """A JPEG whose spectrum falls with 1 / frequency ** slope, as those of photographs do.

    Slope 1 and quality 92 make 130 KB of 500x375, about what ImageNet's files have (5.5 bits a pixel).
    """
    random = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    amplitude = np.maximum(np.hypot(x, y), 1 / width) ** -slope  # [H, W/2 + 1]
    planes = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * random.random(amplitude.shape))
        planes.append(np.fft.irfft2(amplitude * phase, s=(height, width)))
    grey, *tint = planes
    image = np.stack([grey, grey + 0.4 * tint[0], grey + 0.4 * tint[1]], axis=-1)  # [H, W, 3]
    image = (image - image.mean()) / image.std() * 55 + 120
    stream = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def write(root: Path, count: int, width: int, height: int, shards: int, slope: float = 1.0, quality: int = 92) -> None:
    for split, number in (("train", count), ("val", len(CLASSES))):
        images = [texture(i, width, height, slope, quality) for i in range(number)]
        for i, data in enumerate(images):
            folder = root / "folder" / split / CLASSES[i % len(CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:06d}.jpg").write_bytes(data)
            link(folder / f"{i:06d}.jpg", root / "plain" / split / CLASSES[i % len(CLASSES)])
        write_shards(root / "shards", split, images, shards if split == "train" else 1)
    (root / "shards" / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def link(image: Path, folder: Path) -> None:
    """The same file in a tree for the others: torchvision takes the folder of our index for a class."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / image.name).hardlink_to(image)


def write_shards(folder: Path, split: str, images: list[bytes], shards: int) -> None:
    """Samples dealt out in turn, so that every shard has as many, to within one."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        with tarfile.open(folder / f"{split}-{number:06d}.tar", "w") as tar:
            for i in range(number, len(images), shards):
                for name, data in members(i, images[i]):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def members(i: int, image: bytes) -> Iterator[tuple[str, bytes]]:
    yield f"{i:06d}.jpg", image
    yield f"{i:06d}.cls", str(i % len(CLASSES)).encode()


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:6]), slope=float(sys.argv[6]), quality=int(sys.argv[7]))
