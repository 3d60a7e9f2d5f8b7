"""From bytes to pixels, warily: nothing is allocated before the header has been checked, and every failure is a BadSample."""

from __future__ import annotations

import functools
import io
import itertools
import os
import stat
from typing import TYPE_CHECKING

from trainer.data.source import BadSample

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
# Named, so that a file called .jpg can never reach a format that runs programs (EPS, by Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 100_000_000  # about 300 MB as RGB: beyond it a file is taken for a decompression bomb


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of our formats that this build of Pillow reads; it stumbles over the names of others."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(data: bytes, name: str) -> Image:
    """An image whose header has been read and whose pixels have not."""
    from PIL import Image

    if not data:
        raise BadSample(name, "the file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as bomb:
        raise BadSample(name, f"refused before decoding: {bomb}") from None
    except Image.UnidentifiedImageError:
        raise BadSample(name, f"not an image (starts with {data[:12]!r})") from None
    except Exception as error:  # a malformed header makes decoders raise anything: struct.error, SyntaxError, ValueError ...
        raise BadSample(name, f"broken header: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(name, f"refused before decoding: {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def decode(image: Image, name: str, *, least: int | None = None) -> Image:
    """The pixels of an opened image, as RGB.

    Args:
        least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side keeps this many pixels.
    """
    try:
        if least is not None and image.format == "JPEG":
            factor = least / min(image.size)
            if factor <= 0.5:  # draft() takes the smallest scale that keeps both sides at least as long as asked for
                image.draft("RGB", (max(1, round(image.width * factor)), max(1, round(image.height * factor))))
        image.load()
        return to_rgb(image)
    except Exception as error:  # as above; MemoryError and "image file is truncated" among them
        raise BadSample(name, f"cannot be decoded: {error}") from None


def load_down_to(image: Image, bottom: int) -> None:
    """Read an opened JPEG until its rows above `bottom` are there, or further; what is below is then black or unread. A file
    that does not end as a JPEG ends is read whole, so that one that was cut off is found out wherever the rows lie.

    A decoder unpacks every bit from the first to the last row that is wanted: not going on is all that can be saved.
    """
    file = getattr(image, "fp", None)
    if bottom >= image.height * _NEARLY_ALL or not isinstance(file, io.BytesIO) or file.getbuffer()[-2:] != b"\xff\xd9":
        image.load()
        return

    length = len(file.getbuffer())
    blocks = itertools.chain([round(length * _BEFORE * bottom / image.height)], itertools.repeat(max(length // _LOOKS, 1024)))

    def more(count: int) -> bytes:
        # Rows are written from the top, over zeros: when the one below shows anything, all above are there.
        if image.im.crop((0, bottom, image.width, bottom + 1)).getbbox() is not None:
            raise _Enough
        return file.read(next(blocks))

    image.load_read = more  # type: ignore[attr-defined]  (Pillow's way to read: only its subclasses for files declare it)
    try:
        image.load()
    except _Enough:
        image.tile = []  # type: ignore[attr-defined]  (nothing more is to be read)
    finally:
        del image.load_read  # type: ignore[attr-defined]  (it holds the image)


_NEARLY_ALL = 0.9  # of the rows: for the rest it is not worth looking
_BEFORE = 0.75  # of the share of a file that its rows' share lets expect: read before the first look
_LOOKS = 32  # how many blocks a file is then read in


class _Enough(Exception):
    """Leaves Pillow's loop over a file's blocks."""


def to_rgb(image: Image) -> Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit greys: keep the upper byte; convert() would clip
        import numpy as np
        from PIL import Image as Images

        values = np.asarray(image)
        return Images.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_image(data: bytes, name: str, *, least: int | None = None) -> Image:
    return decode(open_image(data, name), name, least=least)


def read_file(path: str) -> bytes:
    """A whole file; BadSample where it is gone or cannot be read."""
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes into would wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BadSample(path, "not a regular file")
            return file.read()
    except OSError as error:
        raise BadSample(path, error.strerror or str(error)) from None


def header_size(path: str) -> tuple[int, int] | None:
    """Width and height from the header alone; None where the file is not an image. Reads a few kilobytes."""
    from PIL import Image

    try:
        with Image.open(path, formats=_formats()) as image:
            return image.size
    except Exception:
        return None
