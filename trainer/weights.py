"""Starting from weights that were trained elsewhere: what fits is loaded, and every tensor is accounted for.

Names are matched by their endings, so a network finds its weights whether they were saved bare, inside a task, or by DDP or
torch.compile. Position embeddings, relative position tables and patch projections of another size are resampled as timm
does it; a head for other classes is left as it was drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint import CheckpointError, load
from trainer.config.names import nearest
from trainer.ema import clean
from trainer.errors import ConfigError, Problem
from trainer.parts import heads as heads_of
from trainer.resample import resampled
from trainer.task import Task

TIMM = "timm:pretrained"
# Where others keep their weights, the averaged ones first.
_NESTS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model_state_dict", "model", "student", "network", "module", "state")
_SHOWN = 6  # names of each kind that an account lists


@dataclass
class Source:
    """Weights, and what is known about them."""

    label: str
    weights: dict[str, Tensor]
    whole_task: bool = False  # names are those of a task, not of a network
    network: str | None = None  # name of the network inside the task
    classes: Sequence[str] | None = None


@dataclass
class Account:
    """What became of every tensor."""

    source: str
    total: int  # tensors of the model
    loaded: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)  # the head, for other classes
    skipped: list[str] = field(default_factory=list)  # of another shape
    missing: list[str] = field(default_factory=list)  # not in the source
    unused: list[str] = field(default_factory=list)  # only in the source

    def __str__(self) -> str:
        lines = [f"weights from {self.source}: {len(self.loaded)} of {self.total} tensors loaded"]
        for title, entries in (
            ("resampled to this size", self.resampled),
            ("left as drawn, the classes differ", self.reset),
            ("left as drawn, of another shape", self.skipped),
            ("left as drawn, not in the source", self.missing),
            ("in the source only", self.unused),
        ):
            if entries:
                more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
                lines.append(f"    {title}: {', '.join(entries[:_SHOWN])}{more}")
        return "\n".join(lines)


def load_weights(task: Task, source: str, *, classes: Sequence[str] | None = None) -> Account:
    """Load what fits of `source` into `task`: a run directory, a .pt or .safetensors file, or `timm:pretrained`.

    Args:
        classes: the names of the task's classes; where the source's are known and differ, the head is not taken over even
            if it happens to have the same shape.

    Raises:
        ConfigError: `source` is none of these, cannot be had, or nothing in it fits.
    """
    found = _open(task, source)
    target: nn.Module = task
    if not (found.whole_task and _same_task(found.weights, task)):
        target = task.network()
        if found.network is not None:
            found.weights = _under(found.weights, found.network)
    account = fill(target, found, classes)
    if not account.loaded:
        own = ", ".join(list(target.state_dict())[:3])
        theirs = ", ".join(list(found.weights)[:3])
        raise ConfigError(
            Problem("init_from", source, f"nothing in it fits this model, which has {own} …; it has {theirs or 'no tensors'} …")
        )
    return account


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, whoever has written it: bare, or inside a checkpoint.

    Raises:
        ConfigError: it is none, or cannot be read.
    """
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        return {clean(name): tensor for name, tensor in _from_checkpoint(str(path), load(path)).weights.items()}
    except CheckpointError as error:
        raise ConfigError(Problem("file", path, error.why)) from error


def fill(module: nn.Module, source: Source, classes: Sequence[str] | None = None) -> Account:
    """Copy what fits into `module`."""
    target = module.state_dict()
    weights = _matched({clean(name): tensor for name, tensor in source.weights.items()}, target)
    account, heads = Account(source.label, len(target)), heads_of(module)
    other_classes = classes is not None and source.classes is not None and list(classes) != list(source.classes)
    chosen: dict[str, Tensor] = {}
    for name, own in target.items():
        theirs = weights.get(name)
        if theirs is None:
            account.missing.append(name)
        elif other_classes and name.startswith(heads):
            account.reset.append(name)
        elif theirs.shape == own.shape:
            chosen[name] = theirs
        elif (fitted := resampled(module, name, theirs, own)) is not None:
            chosen[name] = fitted
            account.resampled.append(f"{name} {_shape(theirs)} -> {_shape(own)}")
        elif name.startswith(heads):
            account.reset.append(f"{name} {_shape(theirs)} -> {_shape(own)}")
        else:
            account.skipped.append(f"{name} {_shape(theirs)} -> {_shape(own)}")
    account.loaded = list(chosen)
    account.unused = [name for name in weights if name not in target]
    module.load_state_dict(chosen, strict=False)
    return account


# --- where weights come from --------------------------------------------------------------------------------------------


def _open(task: Task, source: str) -> Source:
    if source.startswith("timm:"):
        if source != TIMM:
            raise ConfigError(Problem("init_from", source, "the only published weights by this name are timm's own", f"init_from={TIMM}"))
        return _timm(task)
    path = Path(source).expanduser()
    if path.is_dir():
        path = _in_directory(path, source)
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else None
        fix = f"init_from={path.parent / near}" if near else f"init_from=<run directory, .pt or .safetensors file, or {TIMM}>"
        raise ConfigError(Problem("init_from", source, "there is no such file or run directory", fix))
    if path.suffix == ".safetensors":
        return Source(str(path), _safetensors(path))
    try:
        return _from_checkpoint(str(path), load(path))
    except CheckpointError as error:
        raise ConfigError(Problem("init_from", source, error.why)) from error


def _in_directory(directory: Path, source: str) -> Path:
    """The best weights of a run, or its last where nothing was validated."""
    for folder in (directory / "checkpoints", directory):
        for name in ("best.pt", "last.pt"):
            if (folder / name).is_file():
                return folder / name
    raise ConfigError(
        Problem("init_from", source, "holds no checkpoints/best.pt or checkpoints/last.pt, so there are no weights to start from")
    )


def _from_checkpoint(label: str, content: Mapping[str, Any]) -> Source:
    if "task" in content and "config" in content:  # our own
        averages = content.get("ema") or {}
        what = f"{label} (step {content.get('step')}{', averaged weights' if averages else ''})"
        return Source(what, {**content["task"], **averages}, True, content.get("network"), content.get("classes"))
    return Source(label, _state_in(content))


def _state_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in somebody else's checkpoint."""
    if content and all(isinstance(v, Tensor) for v in content.values()):
        return dict(content)
    for key in _NESTS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and (state := _state_in(inner)):
            return state
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(Problem("init_from", path, f"cannot be read: {error}")) from error


def _timm(task: Task) -> Source:
    """The published weights of the task's network, fetched into one of their own size."""
    import timm

    from trainer.pretrained import first_line, timm_weights_within_reach

    network = task.network()
    published: Any = getattr(network, "pretrained_cfg", None)
    if not published:
        raise ConfigError(Problem("init_from", TIMM, f"{type(network).__name__} is not one of timm's networks", "init_from=<file>"))
    name = ".".join(filter(None, (published["architecture"], published.get("tag"))))
    if not published.get("file"):
        try:
            timm_weights_within_reach(name, timm.models.get_pretrained_cfg(name))
        except ConfigError as error:
            reasons = [p.reason if isinstance(p, Problem) else p for p in error.problems]
            raise ConfigError(Problem("init_from", TIMM, "; ".join(reasons), "init_from=<file>")) from error
    channels: dict[str, Any] = {"in_chans": c} if (c := _input_channels(network)) else {}
    try:
        # Built at its own size, so that how it is fitted to ours is decided, and accounted for, in one place.
        with torch.random.fork_rng(devices=[]):
            twin = timm.create_model(name, pretrained=True, pretrained_cfg=published if published.get("file") else None, **channels)
    except Exception as error:
        raise ConfigError(
            Problem("init_from", TIMM, f"the weights of {name} cannot be had: {first_line(error)}", "init_from=<file>")
        ) from error
    return Source(f"timm {name}", twin.state_dict())


def _input_channels(network: nn.Module) -> int | None:
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels * first.groups if first is not None and first.groups == 1 else None


# --- matching -----------------------------------------------------------------------------------------------------------


def _matched(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under the target's names: with the prefix taken off one side and put on the other that makes most names meet."""
    votes: Counter[tuple[str, str]] = Counter({("", ""): 0})
    for name in weights:
        for theirs in _prefixes(name):
            rest = name[len(theirs) :]
            if rest in target:
                votes[theirs, ""] += 1
    for name in target:
        for ours in _prefixes(name)[1:]:
            rest = name[len(ours) :]
            if rest in weights:
                votes["", ours] += 1
    # Of equals the shortest prefixes, and then the first by name, so that the choice is the same every time.
    theirs, ours = min(votes, key=lambda pair: (-votes[pair], len(pair[0]) + len(pair[1]), pair))
    return {ours + name[len(theirs) :]: tensor for name, tensor in weights.items() if name.startswith(theirs)}


def _prefixes(name: str) -> list[str]:
    """ "", "a.", "a.b." … of "a.b.c"."""
    parts = name.split(".")
    return ["".join(f"{part}." for part in parts[:n]) for n in range(min(len(parts), 5))]


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    dotted = f"{prefix}." if prefix else ""
    return {name[len(dotted) :]: tensor for name, tensor in weights.items() if name.startswith(dotted)}


def _same_task(weights: Mapping[str, Tensor], task: Task) -> bool:
    """Whether `task` has the names of the source's: then all of it is taken over, heads and centres too, not the network alone."""
    own = task.state_dict().keys()
    return sum(name in own for name in weights) > 0.9 * len(weights)  # a part or two may have been added since


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"
