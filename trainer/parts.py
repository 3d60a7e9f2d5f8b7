"""Parts of a network by the names people give them: its head, its stages, and what of it a run leaves as it is.

Knows modules and their names; does not know how anything is trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from trainer.config import LoopConfig
from trainer.config.names import nearest
from trainer.errors import ConfigError, Problem
from trainer.pyramid import Pyramid
from trainer.task import Task

BACKBONE = "backbone"  # everything but the head
HEADS = {"head", "heads", "fc", "classifier", "last_linear"}
BATCH_NORM = nn.modules.batchnorm._BatchNorm


def heads(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of what turns features into classes."""
    found: list[nn.Module] = []
    for part in module.modules():
        if callable(getter := getattr(part, "get_classifier", None)):  # timm's networks say it themselves
            own: Any = getter()
            found += own if isinstance(own, tuple | list) else [own]
    prefixes = [f"{name}." for name, part in module.named_modules() if any(part is head for head in found)]
    if not prefixes:
        last = [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and set(name.split(".")) & HEADS]
        prefixes = [f"{last[-1]}."] if last else []
    return tuple(prefixes)


def backbone_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters that turn images into features: those of the backbone that a task names, or all but the heads'.
    Empty where no head can be told from the rest."""
    names = {name for name, _ in module.named_parameters()}
    if isinstance(module, Task) and module.backbone_name is not None:
        return {name for name in names if name.startswith(f"{module.backbone_name}.")}
    head = heads(module)
    return {name for name in names if not name.startswith(head)} if head else set()


def freeze(task: Task, loop: LoopConfig) -> None:
    """Take out of training what `loop` names. Parts that are frozen whole stay in evaluation mode, so that no dropout acts in them
    and batch normalisation uses the statistics it has. Call this before the optimizer is made and before DDP."""
    names = frozen_names(task, loop)
    held = list(_whole(task, names))
    if loop.freeze_batchnorm:
        norms = [(name, module) for name, module in task.named_modules() if isinstance(module, BATCH_NORM)]
        if not norms:
            reason = f"{type(task.network()).__name__} has no batch normalisation"
            raise ConfigError(Problem("loop.freeze_batchnorm", True, reason, "loop.freeze_batchnorm=false"))
        names |= {f"{name}.{own}" for name, module in norms for own, _ in module.named_parameters(recurse=False)}
        held += [module for _, module in norms]
    for name, parameter in task.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    task.held = (*task.held, *held)
    if names and not any(p.requires_grad for p in task.parameters()):
        key, value = ("loop.freeze", loop.freeze) if loop.freeze else ("loop.freeze_to", loop.freeze_to)
        raise ConfigError(Problem(key, value, "freezes every parameter: nothing would be trained", f"{key}={BACKBONE}"))


def frozen_names(task: Task, loop: LoopConfig) -> set[str]:
    """The parameters of `task` that loop.freeze_to and loop.freeze name."""
    names = {name for name, _ in task.named_parameters()}
    frozen: set[str] = set()
    if loop.freeze_to is not None:
        frozen |= _up_to(task, str(loop.freeze_to))
    for i, pattern in enumerate(loop.freeze):
        matched = {name for name in names if re.search(pattern, name)}
        if not matched:
            parts = dict.fromkeys(part for name in names for part in name.split("."))
            close = nearest(re.sub(r"[\\^$]", "", pattern), parts)
            fix = f"loop.freeze=[{close}]" if close else ""
            raise ConfigError(Problem(f"loop.freeze[{i}]", pattern, "matches the name of no parameter", fix))
        frozen |= matched
    return frozen


def _up_to(task: Task, end: str) -> set[str]:
    """The parameters of the task's network from its input up to and including `end`: a part's name, a number of stages, or the backbone."""
    network = task.network()
    if end == BACKBONE:
        names = backbone_parameters(task if task.backbone_name else network)
        if not names:
            raise ConfigError(Problem("loop.freeze_to", end, f"{type(network).__name__} has no head that could be told from the rest"))
        return names if task.backbone_name else {_name_of(task, network) + name for name in names}
    if task.backbone_name:  # its stages are meant, and its parts by the names that its library has for them; then the whole's
        backbone = task.get_submodule(task.backbone_name)
        inner = getattr(backbone, "net", None)  # see trainer.pyramid
        named = (part for part in (inner, backbone) if isinstance(part, nn.Module) and _inside(part, end))
        network = backbone if end.isdecimal() else next(named, network)
    part = _stages(network, int(end)) if end.isdecimal() else _part(network, end)
    return {_name_of(task, network) + name for name in part}


def _name_of(task: Task, part: nn.Module) -> str:
    """What the names of a part's parameters begin with."""
    return next(f"{name}." if name else "" for name, module in task.named_modules() if module is part)


def _part(network: nn.Module, end: str) -> set[str]:
    inside = _inside(network, end)
    if not inside:
        parts = [name for name, part in network.named_modules() if name and any(True for _ in part.parameters())]
        close = nearest(end, parts) or BACKBONE
        top = ", ".join(name for name, part in network.named_children() if any(True for _ in part.parameters()))
        reason = f"{type(network).__name__} has no part of this name with parameters; from the input on it has {top}"
        raise ConfigError(Problem("loop.freeze_to", end, reason, f"loop.freeze_to={close}"))
    names = [name for name, _ in network.named_parameters()]
    return set(names[: max(inside) + 1])  # in the order in which the network registers its parts


def _inside(network: nn.Module, part: str) -> list[int]:
    """Places of a part's parameters among the network's."""
    return [i for i, (name, _) in enumerate(network.named_parameters()) if name == part or name.startswith(f"{part}.")]


def _stages(network: nn.Module, count: int) -> set[str]:
    """The first `count` stages, as the network itself divides itself (timm's `group_matcher`): the stem is the first."""
    matcher: Any = getattr(network, "group_matcher", None)
    if isinstance(network, Pyramid):
        depths = network.depths()
        stage_of = {name: depths[name] for name, _ in network.named_parameters()}
        last = max(stage_of.values()) + 1  # there is no head among them
    elif matcher is not None:
        from timm.models import group_parameters

        stage_of = cast("dict[str, int]", group_parameters(network, matcher(coarse=True), reverse=True))
        last = max(stage_of.values())
    else:
        reason = f"{type(network).__name__} does not tell its stages (timm's networks do: group_matcher)"
        raise ConfigError(Problem("loop.freeze_to", count, reason, "loop.freeze_to=<a part's name>"))
    if count > last:
        reason = f"{type(network).__name__} has {last} stages before its head"
        raise ConfigError(Problem("loop.freeze_to", count, reason, f"loop.freeze_to={BACKBONE}"))
    return {name for name, stage in stage_of.items() if stage < count}


def _whole(module: nn.Module, frozen: set[str], at: str = "") -> Iterator[nn.Module]:
    """The outermost modules all of whose parameters are `frozen`."""
    for name, child in module.named_children():
        own = [f"{at}{name}.{inner}" for inner, _ in child.named_parameters()]
        if own and all(inner in frozen for inner in own):
            yield child
        else:
            yield from _whole(child, frozen, f"{at}{name}.")
