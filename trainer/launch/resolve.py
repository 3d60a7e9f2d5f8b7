"""From Hydra's tree to plain dataclasses. Nothing after this module touches OmegaConf."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, ValueNode
from omegaconf.errors import OmegaConfBaseException

from trainer.config import RunConfig
from trainer.errors import ConfigError, Problem

ALTERNATIVES = {  # setting -> (what it stands in for, and how that is switched off)
    "loop.steps": ("loop.epochs", None),
    "loop.epochs": ("loop.steps", None),
    "loop.validate_every_steps": ("loop.validate_every", None),
    "scheduler.warmup_steps": ("scheduler.warmup_epochs", 0.0),
    "scheduler.warmup_epochs": ("scheduler.warmup_steps", None),
    "scheduler.cooldown_steps": ("scheduler.cooldown_epochs", 0.0),
    "scheduler.cooldown_epochs": ("scheduler.cooldown_steps", None),
    "scheduler.decay_every_steps": ("scheduler.decay_every", None),
    "scheduler.decay_every": ("scheduler.decay_every_steps", None),
    "scheduler.milestones_steps": ("scheduler.milestones", None),
    "scheduler.milestones": ("scheduler.milestones_steps", None),
}


def resolve(cfg: DictConfig, overrides: Sequence[str] = ()) -> RunConfig:
    """The typed run behind a composed tree. `overrides` are the command line's: what a user sets displaces YAML.

    Raises:
        ConfigError: with everything that has no value or does not belong there.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    run, problems = to_run(cfg, {key for override in parsed for key in flat(override.key_or_group, override.value())})
    if problems:
        raise ConfigError(*problems)
    assert run is not None
    return run


def to_run(tree: DictConfig, given: Collection[str]) -> tuple[RunConfig | None, list[Problem]]:
    """The run, and what is wrong with its tree. Where a setting has no value the run holds "???" in its place."""
    displace(tree, given)
    problems = list(_strays(tree, ""))
    try:
        run = RunConfig(**{f.name: _child(tree, f.name) for f in dataclasses.fields(RunConfig)})
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        return None, [*problems, Problem(error.full_key or "config", "", str(error).splitlines()[0])]
    if _is_incomplete(run):
        problems += [_missing(key) for key in sorted(OmegaConf.missing_keys(tree))]
    misfits = list(_misfits(run))
    return (None if misfits else run), [*problems, *misfits]


def _misfits(run: RunConfig) -> Iterator[Problem]:
    """Parts that are not of their kind: their YAML lists no schema, or one of another group."""
    for group, declared in get_type_hints(RunConfig).items():
        part = getattr(run, group)
        if not (isinstance(declared, type) and dataclasses.is_dataclass(declared)) or part == MISSING:
            continue
        if not isinstance(part, declared) or _is_abstract(type(part)):
            reason = f"is no {declared.__name__}: its YAML lists no schema of this group"
            yield Problem(group, type(part).__name__, reason, f"defaults: [<name>_schema, _self_] in conf/{group}/")


def flat(key: str, value: Any) -> dict[str, Any]:
    """What an override sets, setting by setting: `loop={steps: 3}` sets loop.steps."""
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, entry in value.items() for k, v in flat(f"{key}.{name}", entry).items()}


def _missing(key: str) -> Problem:
    group, _, name = key.partition(".")
    if not name and dataclasses.is_dataclass(get_type_hints(RunConfig).get(group)):
        return Problem(group, MISSING, "has no choice, and every run needs one", f"{group}=<one of --help's list>")
    return Problem(key, MISSING, "has no value, and its YAML gives it none", f"{key}=...")


def displace(tree: DictConfig, given: Collection[str]) -> dict[str, str]:
    """What a user sets displaces the YAML's value of what it stands in for: with loop.steps=100, the epochs go.

    Returns what displaced what: {"loop.epochs": "loop.steps"}.
    """
    displaced = {}
    for key, (other, off) in ALTERNATIVES.items():
        if key not in given or other in given or value_at(tree, key) is None:
            continue
        group, _, name = other.partition(".")
        if name in tree[group]:
            tree[group][name] = off
            displaced[other] = key
    return displaced


def value_at(tree: DictConfig, key: str) -> Any:
    """The value at a dotted key as plain containers; None where there is none yet."""
    try:
        value = OmegaConf.select(tree, key, throw_on_missing=False)
    except OmegaConfBaseException:
        return None
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _strays(node: Any, at: str) -> Iterator[Problem]:
    """Keys that a typed node holds and its dataclass does not: `+key=...` gets past Hydra."""
    if not isinstance(node, DictConfig) or OmegaConf.is_missing(node, "") or node._is_none() or node._is_missing():
        return
    kind = OmegaConf.get_type(node)
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else None
    content: Any = node._content
    for name in node:
        key = f"{at}.{name}" if at else str(name)
        if fields is not None and name not in fields:
            yield Problem(key, node[name], f"{getattr(kind, '__name__', kind)} has no such field")
        elif isinstance(child := content[name], DictConfig) and not OmegaConf.is_missing(node, name):
            yield from _strays(child, key)


def to_object(node: Any) -> Any:
    """`OmegaConf.to_object`, for a tree in which something may be missing still."""
    if isinstance(node, ListConfig):
        return None if node._is_none() else [_child(node, i) for i in range(len(node))]
    if not isinstance(node, DictConfig):
        return node
    if node._is_none():
        return None
    kind = OmegaConf.get_type(node)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return {name: _child(node, name) for name in node}
    values = {f.name: _child(node, f.name) for f in dataclasses.fields(kind)}
    if MISSING not in values.values():
        return kind(**values)
    incomplete = object.__new__(kind)  # __post_init__ may rely on every field
    for name, value in values.items():
        setattr(incomplete, name, value)
    return incomplete


def _child(node: Any, key: Any) -> Any:
    plain = _plain(node, key)
    if plain is not None:
        return plain
    return MISSING if OmegaConf.is_missing(node, key) else to_object(node[key])


def _plain(node: Any, key: Any) -> Any:
    """The value of a leaf that refers to nothing; None for everything else. OmegaConf's own way to it takes ten times as long."""
    leaf = node._content[key]
    value = leaf._value() if isinstance(leaf, ValueNode) else None
    return None if isinstance(value, str) and (value == MISSING or "${" in value) else value


def _is_incomplete(value: Any) -> bool:
    """Whether something in there has no value."""
    if dataclasses.is_dataclass(value):
        return any(_is_incomplete(entry) for entry in vars(value).values())
    if isinstance(value, dict | list):
        return any(map(_is_incomplete, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and value == MISSING


def _is_abstract(kind: type[Any]) -> bool:
    return any(getattr(getattr(kind, name, None), "__isabstractmethod__", False) for name in dir(kind))
