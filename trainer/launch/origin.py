"""Which YAML file gave each setting of a composed run its value."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.types import RunMode

from trainer.launch.compose import CONF, Composed, hydra_loader


def origins(composed: Composed) -> dict[str, tuple[str, Any]]:
    """For every dotted key that YAML sets: the last file that does, and the value it gives."""
    with hydra_loader() as loader:
        defaults = loader.compute_defaults_list("config", composed.lines, RunMode.RUN).defaults
    folders = [Path(source.path) for source in composed.hydra.runtime.config_sources if source.schema == "file"]
    found: dict[str, tuple[str, Any]] = {}
    for element in defaults:
        path = element.config_path
        file = next((f for f in (folder / f"{path}.yaml" for folder in folders) if f.is_file()), None) if path else None
        if file is None or str(path).startswith("hydra/"):
            continue
        content = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if isinstance(content, dict):
            package = "" if element.package in (None, "_global_") else str(element.package)
            content = {k: v for k, v in content.items() if k not in ("defaults", "hydra")}
            found.update((key, (_shown(file), value)) for key, value in _leaves(content, package))
    return found


def _leaves(content: dict[Any, Any], at: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{at}.{name}" if at else str(name)
        if isinstance(value, dict):
            yield from _leaves(value, key)
        yield key, value


def _shown(file: Path) -> str:
    if file.is_relative_to(CONF):
        return str(Path("conf") / file.relative_to(CONF))
    near = os.path.relpath(file)
    return str(file) if near.startswith("..") else near
