"""What makes two runs the same run: a short hash of every setting that can change the result.

Left out are fields declared with `identity=False`, and fields that have their schema's default value: a field added to a
schema later, with a default that keeps the old behaviour, therefore leaves every old run where it is found. The values
that a choice's YAML gives (`MISSING` in the schema) are always in. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

from trainer.config.fields import MISSING

_DIGITS = 8  # hex: two of a thousand runs of one name collide once in 10,000 projects


def identity(run: Any) -> str:
    """The hash of a config, the same in every process, whatever the order of keys or the spelling of numbers."""
    text = json.dumps(_node(run), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """The settings that can change a result and differ between two configs: (dotted key, old value, new value).

    Unlike `identity`, this sees a schema's default that was changed between two versions of the code.
    """
    before, after = dict(settings(old)), dict(settings(new))
    keys = [*before, *(key for key in after if key not in before)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def settings(config: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that can change a result, by its dotted key, defaults included."""
    for f in _identity_fields(config):
        key, value = f"{at}.{f.name}" if at else f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            if not _declared(f, value):
                yield key, type(value).__name__
            yield from settings(value, key)
        else:
            yield key, _plain(value)


def _node(config: Any) -> dict[str, Any]:
    content: dict[str, Any] = {"": type(config).__name__}  # no field has an empty name
    for f in _identity_fields(config):
        value = getattr(config, f.name)
        plain = _plain(value)
        if dataclasses.is_dataclass(value) and _declared(f, value) and len(plain) == 1:
            continue  # a group, perhaps a new one, with nothing but defaults in it
        default = _default(f)
        if default is dataclasses.MISSING or _plain(default) != plain:
            content[f.name] = plain
    return content


def _plain(value: Any) -> Any:
    """`value` as JSON, with one spelling for each number: 1 and 1.0, 1e-3 and 0.001 are the same setting."""
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return repr(value)
        return int(value) if value.is_integer() else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _node(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(v) for v in value)
    assert isinstance(value, PurePath), f"a config holds {type(value).__name__}, which has no place in one: {value!r}"
    return str(value)


def _identity_fields(config: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(config) if f.metadata.get("identity", True)]


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return dataclasses.MISSING if f.default == MISSING else f.default


def _declared(f: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a nested config is of exactly the class its field declares, so that its class tells nothing new."""
    return type(value).__name__ == getattr(f.type, "__name__", f.type)
