"""A run that exists, with some of its settings changed: what verbs do with `RUN_DIR group=choice key=value`.

Overrides are typed, checked and explained as launch.py does it; what they change is the run's own config.yaml. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from trainer.config import RunConfig
from trainer.config.schemas import schemas
from trainer.config.stages import stage_runs
from trainer.errors import ConfigError, Problem
from trainer.launch import diagnose
from trainer.launch.compose import Composed, apply_to, compose, hydra_loader, parse
from trainer.launch.resolve import to_run
from trainer.rundir import RunDirectory

INPUT = ("image_size", "mean", "std")  # of a dataset: what the network is used to, so another dataset takes it over

WHOLE_RUNS = dict.fromkeys(("experiment", "debug"), "chooses settings of all groups, for a run that is yet to begin")


def existing_run(path: str) -> tuple[RunDirectory, RunConfig]:
    """The run directory at `path`, and its config.

    Raises:
        ConfigError: there is none, with the nearest that there is.
    """
    directory = RunDirectory(path)
    if not directory.path.is_dir():
        raise ConfigError(Problem("run directory", path, "there is no such directory", _beside(directory.path)))
    return directory, directory.read_config()


def trained_run(path: str) -> tuple[RunDirectory, RunConfig]:
    """As `existing_run`, for whoever uses its network: of a run in stages, the config is at the image size of the last."""
    directory, run = existing_run(path)
    last = stage_runs(run)[-1].dataset.image_size
    return directory, dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, image_size=last))


def _beside(path: Path) -> str:
    from trainer.config.names import nearest

    here = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
    near = nearest(path.name, here)
    return str(path.parent / near) if near else "name a folder like runs/<name>/<version>-<hash>"


def words(arguments: Sequence[str], **defaults: str) -> tuple[dict[str, str], list[str]]:
    """The words of a verb that look like overrides and are its own (`checkpoint=best`), and the overrides."""
    own = [line for line in arguments if line.partition("=")[0] in defaults]
    return defaults | {key: value for key, _, value in (line.partition("=") for line in own)}, [a for a in arguments if a not in own]


def amended(
    run: RunConfig, overrides: Sequence[str], *, fixed: Mapping[str, str] = MappingProxyType({}), config_dir: str | None = None
) -> tuple[RunConfig | None, dict[str, Any], list[Problem]]:
    """`run` with overrides: (the new run where it could be made, what they set by dotted key, what is wrong with them).

    Args:
        fixed: what may not change: patterns of keys -> the reason why.
    """
    parsed, problems = parse(overrides)
    hints = get_type_hints(RunConfig)
    choices = [o for o in parsed if dataclasses.is_dataclass(hints.get(o.key_or_group)) and not isinstance(o.value(), dict)]
    for override in parsed:
        key = override.key_or_group
        reason = next((why for pattern, why in {**WHOLE_RUNS, **fixed}.items() if fnmatchcase(key, pattern)), "")
        if key.partition(".")[0] not in hints and not reason:
            reason = f"is neither a key nor a group of a run; there are {', '.join(hints)}"
        if reason:
            problems.append(Problem(key, override.get_value_string(), reason, "leave it out"))
    if problems:
        return None, {}, problems
    fresh = compose([str(o.input_line) for o in choices], config_dir) if choices else None
    tree: DictConfig = OmegaConf.structured(schemas("")["run"](**{f.name: getattr(run, f.name) for f in dataclasses.fields(run)}))
    composed = Composed(tree, OmegaConf.create(), problems=list(fresh.problems) if fresh else [])
    for override in choices:
        assert fresh is not None
        group = override.key_or_group
        tree[group] = fresh.tree[group]
        composed.given[group] = override.value()
        if group == "dataset":
            for name in INPUT:
                tree.dataset[name] = getattr(run.dataset, name)
    with hydra_loader() as loader:
        for override in parsed:
            if override not in choices:
                apply_to(composed, override, loader)
    new, wrong = to_run(tree, composed.given)
    found = [diagnose.with_fix(p, composed.before) for p in (*composed.problems, *wrong)]
    return new, composed.given, found
