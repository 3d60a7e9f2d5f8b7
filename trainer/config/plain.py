"""A config as plain containers, for `config.yaml` and for checkpoints, and back.

A node whose class is not the one its field declares (a task, a dataset …) carries it as `_schema_: "module:Class"`. What
is read back comes from files that others may have written: only dataclasses of the declared kind are made, from the
packages trainer and tasks or from modules that are imported already. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Union, get_args, get_origin, get_type_hints

from trainer.config.fields import MISSING, type_in_words
from trainer.config.names import nearest
from trainer.config.run import RunConfig
from trainer.errors import ConfigError, Problem

SCHEMA = "_schema_"
PACKAGES = ("trainer", "tasks")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def to_plain(config: Any) -> dict[str, Any]:
    """`config` as nested dicts and lists of str, int, float, bool and None."""
    return _fields(config, None)


def from_plain(content: Mapping[str, Any], kind: type[Any] = RunConfig) -> Any:
    """The config that `to_plain` made `content` of. Fields that it lacks take their defaults.

    Raises:
        ConfigError: with every key that is unknown, missing, of the wrong type or of a class that may not be made.
    """
    problems: list[Problem] = []
    config = _build(content, kind, "", problems) if isinstance(content, Mapping) else None
    if config is None and not problems:
        problems.append(Problem("config", content, "must be a mapping of keys to values"))
    if problems:
        raise ConfigError(*problems)
    return config


def _fields(config: Any, declared: type[Any] | None) -> dict[str, Any]:
    cls = type(config)
    hints = get_type_hints(cls)
    head = {} if declared is cls or (declared is None and cls is RunConfig) else {SCHEMA: f"{cls.__module__}:{cls.__qualname__}"}
    return head | {f.name: _value(getattr(config, f.name), hints[f.name]) for f in dataclasses.fields(config)}


def _value(value: Any, hint: Any) -> Any:
    hint = _without_none(hint)
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool | str | int | float):
        return value
    if dataclasses.is_dataclass(value):
        return _fields(value, hint if isinstance(hint, type) else None)
    if isinstance(value, Mapping):
        return {str(k): _value(v, _element(hint)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_value(v, _element(hint)) for v in value]
    assert isinstance(value, PurePath), f"a config holds {type(value).__name__}, which has no place in one: {value!r}"
    return str(value)


def _build(content: Mapping[str, Any], declared: type[Any], at: str, problems: list[Problem]) -> Any:
    cls = _class_of(content, declared, at, problems)
    if cls is None:
        return None
    hints = get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in content:
        if name not in known and name != SCHEMA:
            close = nearest(str(name), known)
            problems.append(
                Problem(
                    _join(at, name),
                    content[name],
                    f"{cls.__name__} has no such field",
                    f"did you mean {_join(at, close)}?" if close else "",
                )
            )
    values = {}
    for name, f in known.items():
        key = _join(at, name)
        if name in content:
            values[name] = _read(content[name], hints[name], key, problems)
        elif f.default == MISSING or (f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING):
            problems.append(Problem(key, MISSING, f"has no value, and {cls.__name__} has no default for it", f"{key}=..."))
    # A config that cannot be right is not made: __post_init__ may rely on its fields.
    return None if problems else cls(**values)


def _class_of(content: Mapping[str, Any], declared: type[Any], at: str, problems: list[Problem]) -> type[Any] | None:
    """The dataclass a node asks for, if it may have it."""
    name = content.get(SCHEMA)
    if name is None:
        return declared
    module, _, path = str(name).partition(":")
    found: Any = None
    if module in sys.modules or module.split(".")[0] in PACKAGES:
        try:
            found = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            found = None
    if isinstance(found, type) and dataclasses.is_dataclass(found) and issubclass(found, declared):
        return found
    problems.append(
        Problem(
            _join(at, SCHEMA), name, f"names no {declared.__name__} in {' or '.join(PACKAGES)}, nor in a module that is imported already"
        )
    )
    return None


def _read(value: Any, hint: Any, key: str, problems: list[Problem]) -> Any:
    optional, hint = _is_optional(hint), _without_none(hint)
    if value is None and (optional or hint is Any):
        return None
    if hint is Any:
        return value
    origin = get_origin(hint) or hint
    if isinstance(origin, type):
        if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
            return _build(value, origin, key, problems)
        if issubclass(origin, Enum) and isinstance(value, str) and value in origin.__members__:
            return origin[value]
        if issubclass(origin, PurePath) and isinstance(value, str):
            return origin(value)
        if origin in (list, tuple) and isinstance(value, list | tuple):
            return origin(_read(v, _element(hint), f"{key}[{i}]", problems) for i, v in enumerate(value))
        if origin is dict and isinstance(value, Mapping):
            return {str(k): _read(v, _element(hint), f"{key}.{k}", problems) for k, v in value.items()}
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is float and isinstance(value, str) and _NUMBER.fullmatch(value):
            return float(value)  # YAML 1.1 reads 1e-3, typed by hand, as text
        if origin in (int, str, bool) and type(value) is origin:
            return value
    problems.append(Problem(key, value, f"must be {type_in_words(hint, optional=optional)}"))
    return None


def _join(at: str, name: object) -> str:
    return f"{at}.{name}" if at else str(name)


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _without_none(hint: Any) -> Any:
    """`T` of `T | None`; OmegaConf allows no other union in a schema that may be missing."""
    if not _is_optional(hint):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else Any


def _element(hint: Any) -> Any:
    """The type of what a container holds."""
    args = [a for a in get_args(hint) if a is not ...]
    return args[-1] if args else Any
