"""Read a W&B log (`wandb/*run-*/run-*.wandb`) back, record by record, for tests (wandb 0.31).

The file is a 7-byte header, then LevelDB log framing in 32 KiB blocks, each record a protobuf `Record`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as messages

HEADER, BLOCK, FRAME = 7, 32768, 7  # bytes
FULL, FIRST, LAST = 1, 2, 4  # kinds of frame; 3 is one in the middle


def records(path: str | Path) -> Iterator[Any]:
    data = Path(path).read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is not a W&B log")
    offset, parts = HEADER, b""
    while offset + FRAME <= len(data):
        room = BLOCK - offset % BLOCK
        if room < FRAME:
            offset += room
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + FRAME])
        payload = data[offset + FRAME : offset + FRAME + length]
        if kind == 0 and length == 0:
            offset += room
            continue
        if len(payload) < length:
            return  # torn tail: the writer was killed
        offset += FRAME + length
        parts = payload if kind in (FULL, FIRST) else parts + payload
        if kind in (FULL, LAST):
            record = messages.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(parts)
            yield record


def history(path: str | Path) -> Iterator[dict[str, Any]]:
    """Each logged row."""
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def config(path: str | Path) -> dict[str, Any]:
    """The run's config."""
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.run.config.update}
    return {}
