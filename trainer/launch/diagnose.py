"""What is wrong with an override, in words: which key, what is allowed, the nearest name, and the override that mends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, get_args, get_type_hints

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.fields import allowed, as_override, type_in_words
from trainer.config.names import nearest
from trainer.config.schemas import schemas
from trainer.errors import Problem
from trainer.launch.resolve import value_at

COMPOSING_FAILED = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
"""What Hydra raises where it cannot compose; the last for a defaults list that is none."""


def not_an_override(line: str, error: Exception) -> Problem:
    """A line that Hydra's grammar refuses."""
    key, equals, value = line.partition("=")
    if not equals:
        return Problem(line, "", "is not an override: write key=value, or group=choice", f"{line}=...")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Problem(
        key.lstrip("+~"), value, f"cannot be read: {reason}; a text with special characters stands in quotes, '{key}=\"{value}\"'"
    )


def a_sweep(override: Override) -> Problem:
    """Several values at once, in a single run."""
    key, value = override.key_or_group, override.get_value_string()
    return Problem(key, value, "is several values: a job for each needs -m, a list needs brackets", f"-m {key}={value}, or {key}=[{value}]")


def unknown_choice(override: Override, options: Sequence[str]) -> tuple[Problem, str | None]:
    """A choice that its group does not have, and the one that was probably meant."""
    group, value = override.key_or_group, override.value()
    close = nearest(str(value), options)
    fix = f"{group}={close}" if close else f"~{group}" if value is None else ""
    return Problem(group, value, f"is not a choice of {group}; there are {', '.join(options)}", fix), close


def wrong_place(override: Override, tree: DictConfig, loader: ConfigLoader) -> Problem | None:
    """Why there is nothing to set at this key; None where there is."""
    key, value = override.key_or_group, override.value()
    adding = override.is_add() or override.is_force_add()
    parent, exists = _find(tree, key)
    if override.package is not None:
        return unknown_group(override, loader)
    if override.is_delete():
        if exists and not _is_typed(parent):
            return None
        return Problem(
            key, "", "cannot be taken out" if exists else "is not there", f"{key}=null where it may be nothing" if exists else ""
        )
    if exists:
        if override.is_add() and value_at(tree, key) is not None and not isinstance(value, dict | list):
            return Problem(f"+{key}", value, "is there already, so it is set without the +", f"{key}={as_override(value)}")
        return None
    if parent is not None and not _is_typed(parent):
        return None if adding else Problem(key, value, "is not there yet, so it is added with a +", f"+{override.input_line}")
    if "." not in key:
        return unknown_group(override, loader, tree)
    return unknown_key(override, tree)


def unknown_group(override: Override, loader: ConfigLoader, tree: DictConfig | None = None) -> Problem:
    """`optimzer=adamw`, or `lr=0.1`: neither a group nor a key."""
    key, value = override.get_key_element().lstrip("+"), override.value()
    groups = [g for g in loader.list_groups("") if g != "hydra"]
    if key in groups:
        return Problem(key, value, "this group has no choices", f"leave {key} out")
    keys = list(leaves(tree)) if tree is not None else []
    close = _nearest_key(key, [*groups, *keys])
    text = as_override(value)
    if close in groups:
        options = loader.get_group_options(str(close))
        text = nearest(text, options) or (options[0] if options else text)
    return Problem(
        key,
        value,
        f"is neither a key nor a group; the groups are {', '.join(groups)}",
        f"{close}={text}" if close else "--help lists every key",
    )


def unknown_key(override: Override, tree: DictConfig) -> Problem:
    """A key that this run does not have. Another choice of its group may have it."""
    key, value = override.key_or_group, override.value()
    group, _, name = key.partition(".")
    others = [choice for choice, kind in schemas(group).items() if name in {f.name for f in dataclasses.fields(kind)}]
    close = _nearest_key(key, list(leaves(tree)))
    if others:
        return Problem(
            key, value, f"this {group} has no {name}; {' and '.join(others)} {'have' if len(others) > 1 else 'has'}", f"{group}={others[0]}"
        )
    return Problem(key, value, "there is no such key", f"{close}={as_override(value)}" if close else "--help lists every key")


def wrong_value(override: Override, tree: DictConfig, error: OmegaConfBaseException) -> Problem:
    """A value that its key does not take."""
    key, value = override.key_or_group, override.value()
    parent, _ = _find(tree, key)
    kind = OmegaConf.get_type(parent) if isinstance(parent, DictConfig) else None
    f = (
        next((f for f in dataclasses.fields(kind) if f.name == key.rpartition(".")[2]), None)
        if kind and dataclasses.is_dataclass(kind)
        else None
    )
    if f is None or kind is None:
        return Problem(key, value, str(error).splitlines()[0])
    hint = get_type_hints(kind)[f.name]
    if (stray := _stray_entry(key, value, hint)) is not None:
        return stray
    reason = f"must be {type_in_words(hint)}"
    if allowed(f.metadata):
        reason += f", {allowed(f.metadata)}"
    members = next((list(h.__members__) for h in (hint, *get_args(hint)) if isinstance(h, type) and issubclass(h, Enum)), [])
    close = nearest(str(value), members)
    if isinstance(value, dict):  # of several entries: which one it was, only OmegaConf knows
        reason += f" ({str(error).splitlines()[0]})"
    return Problem(key, value if not isinstance(value, dict | list) else as_override(value), reason, f"{key}={close}" if close else "")


def _stray_entry(key: str, value: Any, hint: Any) -> Problem | None:
    """The first setting that an entry of a list of mappings does not have."""
    kind = next(iter(get_args(hint)), None)
    if not (isinstance(value, list) and dataclasses.is_dataclass(kind)):
        return None
    known = [f.name for f in dataclasses.fields(kind)]
    for i, entry in enumerate(value):
        for name in entry if isinstance(entry, dict) else ():
            if str(name) not in known:
                close = nearest(str(name), known)
                fix = f"{close}: {as_override(entry[name])}" if close else f"one of {', '.join(known)}"
                return Problem(f"{key}[{i}].{name}", as_override(entry[name]), "there is no such key", fix)
    return None


def with_fix(problem: Problem, before: Mapping[str, Any]) -> Problem:
    """A problem without a way out gets the one that is always there: the value from before."""
    if problem.fix or isinstance(before.get(problem.key, {}), dict):
        return problem
    if problem.key == "dataset.path" and before[problem.key] is None:  # without a path there is still less to read
        return dataclasses.replace(problem, fix="mend the data, or dataset.path=/path/to/data")
    return dataclasses.replace(problem, fix=f"{problem.key}={as_override(before[problem.key])}")


def in_words(error: Exception) -> str:
    """What Hydra says, with what OmegaConf says behind it, without the search path."""
    texts = [str(e) for e in (error, error.__cause__) if e is not None and str(e)]
    lines = [line.expandtabs(2) for text in texts for line in text.partition("\nConfig search path:")[0].splitlines() if line.strip()]
    return "\n".join(lines) or type(error).__name__


def leaves(node: Any, at: str = "") -> Iterator[str]:
    """The dotted key of every setting in a tree."""
    for name in node:
        key = f"{at}.{name}" if at else str(name)
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing() and len(child):
            yield from leaves(child, key)
        else:
            yield key


def _nearest_key(key: str, known: list[str]) -> str | None:
    """The known key most like `key`, by its last part: "epochs" means loop.epochs, and "train.batchsize" loop.batch_size."""
    group, _, last = key.rpartition(".")
    beside = [k for k in known if k.rpartition(".")[0] == group]
    for keys in (beside, sorted(known, key=lambda k: k.count("."))):
        parts = {k.rpartition(".")[2]: k for k in reversed(keys)}
        close = last if last in parts else nearest(last, parts)
        if close:
            return parts[close]
    return None


def _find(tree: DictConfig, key: str) -> tuple[Any, bool]:
    """The node that holds a key's last part, or would, and whether it is there. (None, False) where the way ends before."""
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        node = _step(node, part)
    return (node, _step(node, last) is not None) if isinstance(node, DictConfig | ListConfig) else (None, False)


def _step(node: Any, part: str) -> Any:
    """The child of a node, a missing one included; None where there is none."""
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        return node._get_node(part, validate_access=False)
    if isinstance(node, ListConfig) and not node._is_none() and not node._is_missing() and part.isdigit() and int(part) < len(node):
        return node._get_node(int(part))
    return None


def _is_typed(node: Any) -> bool:
    return isinstance(node, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(node))
