"""The jobs of a sweep that differ in plain settings only: the typed run of what they share, with those settings put in.

Composing a job from a copy of the tree takes ten times as long. Whatever is not plain (a choice of a group, a list, a key that is
added or taken out, a value that is refused, a setting that displaces another) is left to the long way, which also has the words
for what is wrong.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import MISSING, DictConfig, ListConfig, ValueNode
from omegaconf.errors import OmegaConfBaseException

from trainer.config import RunConfig
from trainer.launch.compose import Composed
from trainer.launch.resolve import ALTERNATIVES, to_object

_DISPLACING = frozenset(ALTERNATIVES) | {other for other, _ in ALTERNATIVES.values()}
Path = tuple[str, ...]  # of a setting, name by name


class Quick:
    """One set of choices. `composed` must be free of problems, and `run` made of it."""

    def __init__(self, composed: Composed, run: RunConfig) -> None:
        self.composed, self.run = composed, run
        self._hydra = HydraConfig.instance().cfg
        self._dependent = _interpolated(composed.tree)  # None: something refers to others in a way that is not followed here
        self._references = {path: _references(parent, path, self._dependent or {}) for path, parent in (self._dependent or {}).items()}

    @contextmanager
    def applied(self, overrides: Sequence[Override]) -> Iterator[RunConfig | None]:
        """The run with these settings, while the tree has them too; None where that takes the long way."""
        leaves = self._leaves(overrides)
        if leaves is None or self._dependent is None:
            yield None
            return
        HydraConfig.instance().cfg = self._hydra
        before = [leaf._value() for leaf in leaves.values()]
        try:
            yield self._with(leaves, overrides)
        finally:
            for leaf, value in zip(leaves.values(), before, strict=True):
                leaf._set_value(value)

    def _with(self, leaves: Mapping[Path, ValueNode], overrides: Sequence[Override]) -> RunConfig | None:
        assert self._dependent is not None
        try:
            for leaf, override in zip(leaves.values(), overrides, strict=True):
                leaf._set_value(override.value())
            changed = {path: leaf._value() for path, leaf in leaves.items()}
            changed |= {path: to_object(parent[path[-1]]) for path, parent in self._dependent.items() if self._may_change(path, leaves)}
            return _replaced(self.run, changed)
        except (OmegaConfBaseException, ValueError, TypeError):
            return None

    def _may_change(self, path: Path, settings: Iterable[Path]) -> bool:
        """Whether a setting that refers to others may have another value now."""
        named = self._references[path]
        return named is None or any(setting[: len(name)] == name for setting in settings for name in named)

    def _leaves(self, overrides: Sequence[Override]) -> dict[Path, ValueNode] | None:
        """The leaf that each override sets; None if one of them is more than a plain value for an existing setting."""
        found: dict[Path, ValueNode] = {}
        for override in overrides:
            key, value = override.key_or_group, override.value()
            plain = value is None or isinstance(value, bool | int | float | str)
            if not plain or not override.type or override.is_add() or override.is_force_add() or override.is_delete() or key in _DISPLACING:
                return None
            if override.package is not None or (isinstance(value, str) and ("${" in value or value == MISSING)):
                return None
            leaf = _leaf(self.composed.tree, path := tuple(key.split(".")))
            if leaf is None or path in found:
                return None
            found[path] = leaf
        return found


def _leaf(tree: DictConfig, path: Path) -> ValueNode | None:
    """The node of a setting that has a value of its own."""
    node: Any = tree
    for name in path:
        content = node._content if isinstance(node, DictConfig) else None
        node = content.get(name) if isinstance(content, dict) else None
    value = node._value() if isinstance(node, ValueNode) else "${}"
    return None if isinstance(value, str) and "${" in value else node


def _interpolated(node: DictConfig, at: Path = ()) -> dict[Path, DictConfig] | None:
    """The settings that refer to others, with the node that holds each; None where a list or a whole group does."""
    if node._is_interpolation():
        return None
    if node._is_none() or node._is_missing():
        return {}
    found: dict[Path, DictConfig] = {}
    content: Any = node._content
    for name, child in content.items():
        path = (*at, str(name))
        if isinstance(child, DictConfig):
            inner = _interpolated(child, path)
            if inner is None:
                return None
            found |= inner
        elif isinstance(child, ListConfig):
            if "${" in str(child._content):
                return None
        elif isinstance(child, ValueNode) and isinstance(text := child._value(), str) and "${" in text:
            found[path] = node
    return found


_REFERENCE = re.compile(r"\$\{([^{}$]*)\}")


def _references(parent: DictConfig, path: Path, dependent: Mapping[Path, object]) -> frozenset[Path] | None:
    """The settings that the text of one names; None where it may depend on more: on a resolver's work, or on another such text.

    `${hydra:...}` is the same for one set of choices.
    """
    content: Any = parent._content
    text = content[path[-1]]._value()
    named = [name.strip() for name in _REFERENCE.findall(text) if not name.startswith("hydra:")]
    paths = frozenset(tuple(name.split(".")) for name in named)
    plain = text.count("${") == len(_REFERENCE.findall(text)) and all(re.fullmatch(r"\w+(\.\w+)*", name) for name in named)
    return paths if plain and not any(one in dependent for one in paths) else None


def _replaced(config: Any, changed: Mapping[Path, Any]) -> Any:
    """A copy of nested dataclasses with some of their values changed."""
    values: dict[str, Any] = {}
    inner: dict[str, dict[Path, Any]] = {}
    for (name, *rest), value in changed.items():
        if rest:
            inner.setdefault(name, {})[tuple(rest)] = value
        elif getattr(config, name) != value or type(getattr(config, name)) is not type(value):
            values[name] = value
    for name, changes in inner.items():
        old = getattr(config, name)
        if isinstance(old, dict):  # settings that no schema knows, as model.args
            raise TypeError(name)
        new = _replaced(old, changes)
        if new is not old:
            values[name] = new
    return dataclasses.replace(config, **values) if values else config
