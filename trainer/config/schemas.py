"""Which dataclass is behind each choice of `conf/`, by group and name. Hydra learns of them in `trainer.launch.store`.

Reading what runs left behind needs these names and none of Hydra, whose import alone takes longer than to read a sweep.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")

_KINDS: dict[str, dict[str, type[Any] | str]] = {}
"""group -> name -> the dataclass, or the module that registers it when imported."""

_DECORATOR = re.compile(r'^@schema\("(\w+)", "(\w+)"\)$', re.MULTILINE)


def schema(group: str, name: str) -> Callable[[type[Config]], type[Config]]:
    """Register a dataclass as the schema behind `conf/<group>/<name>.yaml`, which lists it as `<name>_schema`."""

    def register(cls: type[Config]) -> type[Config]:
        _KINDS.setdefault(group, {})[name] = cls
        return cls

    return register


def announce_schemas(package: str, directory: Path | str, pattern: str = "*.py") -> None:
    """Make the schemas of a package known by name; a module is imported when a run chooses one of its schemas.

    The names are read from the source: to run the decorators of a hundred dataclasses takes longer than to compose a run.
    """
    for path in sorted(Path(directory).glob(pattern)):
        module = ".".join([package, *path.relative_to(directory).with_suffix("").parts])
        for group, name in _DECORATOR.findall(path.read_text(encoding="utf-8")):
            _KINDS.setdefault(group, {}).setdefault(name, module)


def groups() -> list[str]:
    """The groups that have schemas; "" is the run itself."""
    return list(_KINDS)


def schema_names(group: str) -> list[str]:
    """The names of a group's schemas. Imports none of them."""
    return list(_KINDS.get(group, ()))


def schema_of(group: str, name: str) -> type[Any]:
    """The dataclass registered under that name; a KeyError where there is none."""
    source = _KINDS[group][name]
    if isinstance(source, str):
        importlib.import_module(source)
        source = _KINDS[group][name]
        assert not isinstance(source, str), f"{source} does not register {group}/{name}"
    return source


def schemas(group: str) -> dict[str, type[Any]]:
    """The registered dataclasses of a group, by name."""
    return {name: schema_of(group, name) for name in schema_names(group)}
