"""As much of DICOM as chest X-rays need: one grey frame, plain or as JPEG (DICOM PS3.5 and PS3.10)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from trainer.data.images import MAX_PIXELS, decode, open_image
from trainer.data.source import BadSample

LONG_FORMS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")  # PS3.5, 7.1.2
UNDEFINED = 0xFFFFFFFF
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
JPEGS = {  # transfer syntaxes whose frames are files that Pillow reads
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91",
}  # fmt: skip
Tag = tuple[int, int]
PIXELS: Tag = (0x7FE0, 0x0010)


def read_dicom(data: bytes, name: str) -> Image.Image:
    """The frame as RGB. 16-bit values are stretched from their least to their greatest."""
    if not data:
        raise BadSample(name, "the file is empty (0 bytes)")
    if data[128:132] != b"DICM":
        raise BadSample(name, "is not a DICOM file")
    try:
        return _image(data, name)
    except (struct.error, KeyError, ValueError, UnicodeDecodeError) as error:
        raise BadSample(name, f"is a broken or unusual DICOM file: {error!r}") from None


def _image(data: bytes, name: str) -> Image.Image:
    head = dict(_elements(data, 132, explicit=True, only_group=2))
    syntax = head[(2, 0x10)].rstrip(b"\0 ").decode()
    if syntax not in (IMPLICIT, EXPLICIT, *JPEGS):
        raise BadSample(name, f"its transfer syntax {syntax} is not supported; convert it to PNG")
    start = 132 + 12 + struct.unpack("<I", head[(2, 0)])[0]  # the group's length counts from behind its own element
    body = dict(_elements(data, start, explicit=syntax != IMPLICIT))
    if PIXELS not in body:
        raise BadSample(name, "is cut short: it has no pixels")
    frame, photometric = body[PIXELS], body.get((0x28, 4), b"").strip(b"\0 ").decode()
    if not photometric.startswith("MONOCHROME"):
        raise BadSample(name, f"is not a grey image but {photometric or 'of an unknown kind'}")
    if syntax in JPEGS:
        grey = np.asarray(decode(open_image(frame, name), name).convert("L"))
    else:
        grey = _plain(body, frame, name)
    return Image.fromarray(255 - grey if photometric == "MONOCHROME1" else grey).convert("RGB")


def _plain(body: dict[Tag, bytes], frame: bytes, name: str) -> np.ndarray:
    """uint8 [H, W] from uncompressed pixels."""
    rows, columns, bits, signed = (struct.unpack("<H", body[(0x28, e)][:2])[0] for e in (0x10, 0x11, 0x100, 0x103))
    if rows * columns > MAX_PIXELS:
        raise BadSample(name, f"refused before decoding: {columns} x {rows} pixels, more than {MAX_PIXELS:,}")
    dtype = np.dtype({(8, 0): "<u1", (16, 0): "<u2", (16, 1): "<i2"}[(bits, signed)])
    if len(frame) < rows * columns * dtype.itemsize:
        raise BadSample(name, f"is cut short: {len(frame):,} bytes of pixels for {columns} x {rows}")
    values = np.frombuffer(frame, dtype, rows * columns).reshape(rows, columns)
    if bits == 8:
        return values
    low, high = int(values.min()), int(values.max())
    return ((values.astype(np.float32) - low) * (255 / max(high - low, 1))).astype(np.uint8)


def _elements(data: bytes, position: int, *, explicit: bool, only_group: int | None = None) -> Iterator[tuple[Tag, bytes]]:
    """Tag and value of every element, from `position` on. Sequences are passed over."""
    while position + 8 <= len(data):
        tag = struct.unpack_from("<HH", data, position)
        if only_group is not None and tag[0] != only_group:
            return
        kind = data[position + 4 : position + 6]
        if explicit and tag[0] != 0xFFFE:
            long = kind in LONG_FORMS
            (length,) = struct.unpack_from("<I", data, position + 8) if long else struct.unpack_from("<H", data, position + 6)
            position += 12 if long else 8
        else:
            (length,) = struct.unpack_from("<I", data, position + 4)
            position += 8
        if length == UNDEFINED and tag == PIXELS:
            yield tag, b"".join(_fragments(data, position))
            return
        if length == UNDEFINED:
            position = _end_of_sequence(data, position, explicit)
            continue
        if position + length > len(data):
            if tag == PIXELS:
                yield tag, data[position:]  # the caller says how much is missing
            return
        yield tag, data[position : position + length]
        position += length


def _fragments(data: bytes, position: int) -> Iterator[bytes]:
    """The pieces of an encapsulated frame (PS3.5, A.4): after a table of offsets, items up to a delimiter."""
    first = True
    while position + 8 <= len(data):
        group, element, length = struct.unpack_from("<HHI", data, position)
        position += 8
        if (group, element) != (0xFFFE, 0xE000):
            return
        if not first:
            yield data[position : position + length]
        first = False
        position += length


def _end_of_sequence(data: bytes, position: int, explicit: bool) -> int:
    """Behind a sequence of undefined length: items, defined or not, up to a delimiter (PS3.5, 7.5)."""
    while True:
        group, element, length = struct.unpack_from("<HHI", data, position)
        position += 8
        if (group, element) == (0xFFFE, 0xE0DD):
            return position
        if length != UNDEFINED:
            position += length
            continue
        position = _end_of_item(data, position, explicit)


def _end_of_item(data: bytes, position: int, explicit: bool) -> int:
    while True:
        group, element, length = struct.unpack_from("<HHI", data, position)
        if (group, element) == (0xFFFE, 0xE00D):
            return position + 8
        if explicit:
            long = data[position + 4 : position + 6] in LONG_FORMS
            (length,) = struct.unpack_from("<I", data, position + 8) if long else struct.unpack_from("<H", data, position + 6)
            position += 12 if long else 8
        else:
            position += 8
        position = _end_of_sequence(data, position, explicit) if length == UNDEFINED else position + length
