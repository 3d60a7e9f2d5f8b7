"""Where the members of a tar file lie, found without unpacking anything and without trusting any of it.

The reader that comes with Python stops quietly at a header it cannot read, and a streaming reader at the end of a file that
was cut short. This one raises: what it does not understand, it refuses.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainer.errors import DataError

BLOCK = 512
ZEROS = bytes(BLOCK)
LONGEST = 1 << 20  # bytes of a name or of pax records that anyone would write
AHEAD = 2 * BLOCK  # read with each header: small members (a class number) come along
REGULAR, FOLDER = b"0\x007", b"5"
KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file",
}  # fmt: skip
LONG_NAME, LONG_LINK, EXTENDED, GLOBAL = b"L", b"K", b"x", b"g"


class ShardError(DataError):
    """A shard that cannot be what it should be. Names the shard, the member and the way out."""

    def __init__(self, shard: str, why: str) -> None:
        super().__init__(f"shard {shard}: {why}")
        self.shard, self.why = shard, why


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in a tar file."""

    name: str
    offset: int  # bytes from the beginning of the tar file to its first byte
    size: int  # bytes
    start: bytes  # its first bytes, at most one block of them: small files are whole here


ReadAt = Callable[[int, int], bytes]  # (position, how many) -> that many bytes, or those that are left


def members(shard: str, read_at: ReadAt, total: int) -> Iterator[Member]:
    """Every plain file of a tar file (POSIX ustar and pax, GNU long names), in order. Folders are passed over.

    Raises:
        ShardError: it is cut short or damaged, or holds a link, a device, an absolute name or one with `..`.
    """
    position, long_name, extended = 0, None, {}
    while True:
        head = read_at(position, AHEAD)
        block = head[:BLOCK]
        if len(block) < BLOCK:
            raise ShardError(shard, f"is cut short: it ends at byte {total:,} without the mark of an archive's end. Fetch or pack it again")
        if block == ZEROS:
            _check_end(shard, read_at, position, total)
            return
        kind = block[156:157]
        size = _number(block[124:136])
        if size is None or not _checksum_holds(block):
            raise ShardError(shard, f"is damaged: no header of a tar file at byte {position:,}. Fetch or pack it again")
        if kind not in (LONG_NAME, LONG_LINK, EXTENDED, GLOBAL):
            size = int(extended["size"]) if extended.get("size", "").isdigit() else size
        elif size > LONGEST:
            raise ShardError(shard, f"is damaged: a name of {size:,} bytes at byte {position:,}")
        data = position + BLOCK
        if data + size > total:
            raise ShardError(
                shard, f"is cut short inside {_name(block)!r}: {data + size - total:,} bytes are missing. Fetch or pack it again"
            )
        position = data + -(-size // BLOCK) * BLOCK
        if kind == LONG_NAME:
            long_name = _text(read_at(data, size).rstrip(b"\0"))
        elif kind == EXTENDED:
            extended = _records(read_at(data, size))
        elif kind not in (LONG_LINK, GLOBAL):
            name = extended.get("path") or long_name or _name(block)
            long_name, extended = None, {}
            if kind in KINDS or kind not in (*(bytes([k]) for k in REGULAR), FOLDER):
                raise ShardError(shard, f"{name!r} is {KINDS.get(kind, f'of the unknown kind {kind!r}')}; shards may hold plain files only")
            _check_name(shard, name)
            if kind != FOLDER and not name.endswith("/"):
                yield Member(name, data, size, head[BLOCK : BLOCK + size])


def _check_name(shard: str, name: str) -> None:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ShardError(
            shard,
            f"{name!r} is {'an absolute name' if name.startswith('/') else 'a name that leaves the archive'}: refused. Pack it again with plain names",
        )


def _check_end(shard: str, read_at: ReadAt, position: int, total: int) -> None:
    """An archive ends with two blocks of zeros, and nothing but zeros comes behind them."""
    if total - position < 2 * BLOCK:
        raise ShardError(shard, "is cut short: one of the two blocks that mark an archive's end is missing. Fetch or pack it again")
    while position < total:
        rest = read_at(position, 1 << 20)
        if rest.strip(b"\0"):
            raise ShardError(
                shard, "has data behind its end: several archives in one file. Readers stop at the first, so pack them again as one"
            )
        if not rest:
            return
        position += len(rest)


def _number(field: bytes) -> int | None:
    """A number in a header: octal text, or, above 8 GiB, GNU's binary form."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    text = field.rstrip(b"\0 ").lstrip(b" ")
    try:
        return int(text or b"0", 8)
    except ValueError:
        return None


def _checksum_holds(block: bytes) -> bool:
    """The sum of a header's bytes, its own field taken for spaces. Adler-32's lower half is 1 + that sum modulo 65521."""
    stored = _number(block[148:156])
    blanked = block[:148] + b"        " + block[156:]
    if stored is not None and zlib.adler32(blanked) & 0xFFFF == (stored + 1) % 65521:
        return True
    return stored == sum(byte - 256 if byte > 127 else byte for byte in blanked)  # old writers took bytes for signed


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _records(data: bytes) -> dict[str, str]:
    """pax's `length key=value` lines (POSIX.1-2001, pax Interchange Format)."""
    found, position = {}, 0
    while position < len(data) and data[position : position + 1] != b"\0":
        length, _, _ = data[position:].partition(b" ")
        end = position + int(length) if length.isdigit() else 0
        if end <= position:
            break
        key, _, value = data[position + len(length) + 1 : end - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = _text(value)
        position = end
    return found
