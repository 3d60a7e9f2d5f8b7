"""The settings of many runs, read from their config.yaml fast. Knows YAML and schemas; knows nothing of sweeps.

The configs of one sweep are nearly the same text: each group's lines are parsed once, however many runs have them.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from trainer.config.plain import PACKAGES, SCHEMA
from trainer.config.run import RunConfig

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SECTION = re.compile(r"^(?=[A-Za-z_]\w*:)", re.MULTILINE)  # a key that is not indented; lists of safe_dump are not, either


def read_plain(path: Path) -> dict[str, Any]:
    """The content of a config.yaml. Raises OSError, or ValueError where it is not a mapping in YAML."""
    text = path.read_text()
    try:
        content: dict[str, Any] = {}
        for section in _SECTION.split(text):
            content.update(_section(section))
        return content or _whole(text, path)
    except (yaml.YAMLError, TypeError, ValueError):  # an alias across sections, an indented document, or no YAML at all
        return _whole(text, path)


def _whole(text: str, path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds no settings")
    return content


@cache
def _section(text: str) -> dict[str, Any]:
    return yaml.load(text, Loader=_LOADER) or {}


def settings(content: Mapping[str, Any], *, identity_only: bool = True) -> dict[str, Any]:
    """Every setting by its dotted key, in the order of the file: `model` is the class of a part, `model.name` a value of it.

    With `identity_only`, those that can change a result: what `trainer.identity` counts, of a config that is not built.
    """
    return dict(_flat(content, RunConfig, "", identity_only))


def _flat(content: Mapping[str, Any], kind: type[Any] | None, at: str, identity_only: bool) -> Iterator[tuple[str, Any]]:
    ignored, kinds = _fields(kind) if kind else (frozenset(), {})
    for name, value in content.items():
        if name == SCHEMA or (identity_only and name in ignored):
            continue
        key = f"{at}.{name}" if at else str(name)
        if not isinstance(value, Mapping):
            yield key, value
            continue
        if SCHEMA in value:
            yield key, str(value[SCHEMA]).rpartition(":")[2]
        yield from _flat(value, _class(str(value[SCHEMA])) if SCHEMA in value else kinds.get(name), key, identity_only)


@cache
def _fields(kind: type[Any]) -> tuple[frozenset[str], dict[str, type[Any]]]:
    """The fields that cannot change a result, and the classes of nested ones."""
    hints = get_type_hints(kind)
    ignored = frozenset(f.name for f in dataclasses.fields(kind) if not f.metadata.get("identity", True))
    return ignored, {f.name: hints[f.name] for f in dataclasses.fields(kind) if dataclasses.is_dataclass(hints[f.name])}


@cache
def _class(name: str) -> type[Any] | None:
    """The schema behind `module:Class`; None where it is not ours to import: all its fields count then."""
    module, _, path = name.partition(":")
    found: Any = None
    if module in sys.modules or module.split(".")[0] in PACKAGES:
        try:
            found = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return None
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None
