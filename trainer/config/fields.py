"""How a config field says what it means: default, unit, allowed range, and whether it can change a run's result."""

from __future__ import annotations

import dataclasses
import math
import operator
import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Union, cast, get_args, get_origin

from trainer.errors import Problem

MISSING: Any = "???"  # OmegaConf's word for a value that must be given; to import OmegaConf for it takes longer than to read a sweep


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    length: int | None = None,
    choices: Sequence[Any] | None = None,
    words: Sequence[str] | None = None,
    identity: bool = True,
) -> Any:
    """A dataclass field that explains itself.

    Args:
        default: the value every choice shares; leave it out where the choices differ (their YAML gives it).
        help: meaning and unit, shown by `--help`.
        ge, gt, le, lt: allowed range of a number, or of each number in a list.
        length: how many entries a list must have. OmegaConf does not check the length of a tuple.
        choices: the allowed values, or values of a list's entries, where an Enum would be too much.
        words: what may stand for a whole number, as "auto"; the field is annotated `Any`.
        identity: False where the value cannot change the result of a run (worker counts, log periods, paths of
            outputs); such fields are left out of the run's hash.
    """
    metadata = {
        "help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "length": length, "choices": choices, "words": words, "identity": identity,
    }  # fmt: skip
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def allowed(metadata: Mapping[str, Any]) -> str:
    """The range of a field in words: "> 0, <= 1"; empty where anything goes."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    parts = [f"{sign} {metadata[key]:g}" for key, sign in signs.items() if metadata.get(key) is not None]
    if metadata.get("length") is not None:
        parts.append(f"{metadata['length']} values")
    if metadata.get("choices"):
        parts.append("one of " + ", ".join(map(str, metadata["choices"])))
    if metadata.get("words"):
        parts.append("or " + ", ".join(metadata["words"]))
    return ", ".join(parts)


def type_in_words(hint: Any, *, optional: bool = False, many: bool = False) -> str:
    """What a field takes, for someone who has never seen an annotation: "a number or null"."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        named = " or ".join(type_in_words(kind, many=many) for kind in kinds)
        return f"{named} or null" if len(kinds) < len(get_args(hint)) else named
    origin = get_origin(hint) or hint
    arguments = [a for a in get_args(hint) if a is not ...]
    if isinstance(origin, type) and issubclass(origin, Enum):
        named = "one of " + ", ".join(origin.__members__)
    elif origin in (list, tuple):
        named = f"{'lists' if many else 'a list'} of {type_in_words(arguments[0], many=True) if arguments else 'values'}"
    elif origin is dict or dataclasses.is_dataclass(origin):
        named = "mappings" if many else "a mapping"
    else:
        one, several = {
            int: ("a whole number", "whole numbers"),
            float: ("a number", "numbers"),
            bool: ("true or false", "true or false"),
            str: ("text", "texts"),
        }.get(cast(Any, origin), ("a value", "values"))
        named = several if many else one
    return f"{named} or null" if optional else named


def field_problems(config: Any, at: str = "") -> Iterator[Problem]:
    """Check every field of a config, and of the configs inside it, against its own metadata.

    Catches what OmegaConf lets through: ranges, NaN and infinity, lengths, values outside `choices`, no value at all.
    """
    for f in dataclasses.fields(config):
        key = f"{at}.{f.name}" if at else f.name
        value = getattr(config, f.name)
        yield from nested_problems(value, key)
        reason = value_problem(value, f.metadata)
        if reason:
            yield Problem(key, _shown(value), reason, example(f, key))


def nested_problems(value: Any, key: str) -> Iterator[Problem]:
    """The problems of the configs inside a value."""
    if dataclasses.is_dataclass(value):
        yield from field_problems(value, key)
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            yield from nested_problems(entry, f"{key}[{i}]")
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from nested_problems(entry, f"{key}.{name}")


def value_problem(value: Any, metadata: Mapping[str, Any]) -> str:
    """What is wrong with a field's value, or one of its entries; empty where nothing is."""
    if isinstance(value, str) and value == MISSING:
        return f"has no value{': must be ' + allowed(metadata) if allowed(metadata) else ''}"
    if isinstance(value, list | tuple):
        length = metadata.get("length")
        if length is not None and len(value) != length:
            return f"needs exactly {length} values, got {len(value)}"
        entries = [value_problem(entry, {**metadata, "length": None}) for entry in value]
        return next((f"entry {i} {reason}" for i, reason in enumerate(entries) if reason), "")
    if isinstance(value, Mapping):
        entries_by_name = {name: value_problem(entry, metadata) for name, entry in value.items()}
        return next((f"entry {name} {reason}" for name, reason in entries_by_name.items() if reason), "")
    if value is None or isinstance(value, Enum):
        return ""
    return _scalar_problem(value, metadata)


def _scalar_problem(value: Any, metadata: Mapping[str, Any]) -> str:
    range_ = allowed(metadata)
    if metadata.get("words"):
        if value in metadata["words"]:
            return ""
        if not isinstance(value, int) or isinstance(value, bool):
            return f"must be a whole number {range_}"
    if metadata.get("choices"):
        return "" if value in metadata["choices"] else f"must be {range_}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number{', ' + range_ if range_ else ''}"
    bounds = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    broken = any(metadata.get(name) is not None and not holds(value, metadata[name]) for name, holds in bounds.items())
    return f"must be {range_}" if broken else ""


def example(f: dataclasses.Field[Any], key: str) -> str:
    """An override that mends the field: a near choice, or its own default where that is a plain value."""
    default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    if default is dataclasses.MISSING or default is None or default == MISSING or dataclasses.is_dataclass(default):
        return ""
    return f"{key}={as_override(default)}"


def as_override(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(as_override, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{as_override(v)}" for k, v in value.items()) + "}"
    text = str(value)
    plain = bool(text) and all(c.isalnum() or c in "-_./$%*@?|" for c in text)
    return text if plain else "'" + text.replace("'", "\\'") + "'"


def _shown(value: Any) -> Any:
    return as_override(value) if isinstance(value, list | tuple | Mapping) else value
