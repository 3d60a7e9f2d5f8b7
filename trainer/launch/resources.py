"""What a job asks of SLURM, where that follows from its config: the rules of `hydra.launcher.resources`."""

from __future__ import annotations

import operator
import re
from typing import Any

from trainer.config.launcher import RESOURCES, LauncherConfig, SlurmLauncherConfig
from trainer.config.names import nearest
from trainer.errors import ConfigError, Problem
from trainer.launch.compose import Composed
from trainer.launch.resolve import value_at

_KEY = "hydra.launcher.resources"
_COMPARED = re.compile(r"(>=|<=|>|<|!=)\s*(.+)")
_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "!=": operator.ne}


def resources_for(composed: Composed, settings: LauncherConfig) -> dict[str, Any]:
    """What the rules say of this job, the last one that fits winning; empty where they say nothing.

    Raises:
        ConfigError: a rule that makes no sense.
    """
    found: dict[str, Any] = {}
    for place, rule in enumerate(settings.resources if isinstance(settings, SlurmLauncherConfig) else ()):
        when, then = _taken_apart(rule, f"{_KEY}[{place}]")
        if all(_fits(_value(composed, key, f"{_KEY}[{place}]"), wanted) for key, wanted in when.items()):
            found |= then
    return found


def _taken_apart(rule: Any, at: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if not isinstance(rule, dict) or not isinstance(rule.get("when"), dict) or not isinstance(rule.get("then"), dict):
        raise ConfigError(Problem(at, rule, "is no rule", "{when: {model: vit_l}, then: {gpus_per_node: 8}}"))
    for name in rule["then"]:
        if name not in RESOURCES:
            close = nearest(str(name), RESOURCES)
            raise ConfigError(
                Problem(f"{at}.then.{name}", rule["then"][name], f"is no resource; there are {', '.join(RESOURCES)}", close or "")
            )
    return rule["when"], rule["then"]


def _value(composed: Composed, key: str, at: str) -> Any:
    """A choice by its group's name, or a setting."""
    if key in composed.choices:
        return composed.choices[key]
    value = value_at(composed.tree, key)
    if value is None and key.split(".")[0] not in composed.tree:
        raise ConfigError(Problem(f"{at}.when.{key}", "", "there is no such group or setting"))
    return value


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return any(_fits(value, entry) for entry in wanted)
    compared = _COMPARED.fullmatch(wanted) if isinstance(wanted, str) else None
    if compared is None:
        return value == wanted or str(value) == str(wanted)
    sign, bound = compared.groups()
    try:
        return _SIGNS[sign](float(value), float(bound))
    except (TypeError, ValueError):
        return sign == "!=" and str(value) != bound
