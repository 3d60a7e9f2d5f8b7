"""Which jobs a command line stands for: its values multiplied out, zipped (`+sweep.zip`), or read from a file (`+sweep.file`)."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from trainer.config.fields import as_override
from trainer.errors import ConfigError, Problem
from trainer.launch.compose import Composer, parse_line

_ZIP, _FILE = "sweep.zip", "sweep.file"


def is_sweep(line: str) -> bool:
    """Whether this line stands for several jobs."""
    try:
        override = parse_line(line)
    except HydraException:
        return False
    return key_of(line) in (_ZIP, _FILE) or (override.is_sweep_override() and not override.is_hydra_override())


def key_of(line: str) -> str:
    return line.partition("=")[0].lstrip("+~")


def expand(lines: Sequence[str], composer: Composer) -> tuple[list[str], list[list[str]]]:
    """What all jobs have in common, and what each has of its own."""
    axes: dict[str, list[str]] = {}  # key -> the line of each value
    base, problems = [], []
    zipped: list[list[str]] = []
    rows: list[list[str]] = [[]]
    for line in lines:
        key = key_of(line)
        if not is_sweep(line):
            base.append(line)
        elif key == _ZIP:
            zipped += _zip_groups(line, problems)
        elif key == _FILE:
            rows = _rows(line.partition("=")[2], problems)
        else:
            axes[key] = _values(line, composer, problems)
    dimensions = [[[line] for line in axes[key]] for key in axes if not any(key in group for group in zipped)]
    dimensions += [_zipped(group, axes, problems) for group in zipped]
    if problems:
        raise ConfigError(*problems)
    return base, [[*row, *itertools.chain(*job)] for row in rows for job in itertools.product(*dimensions)]


def _values(line: str, composer: Composer, problems: list[Problem]) -> list[str]:
    (override,) = OverridesParser.create(config_loader=composer.loader).parse_overrides([line])
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        kind = str(override.get_value_string())
        problems.append(Problem(key, kind, "is a range to be searched: say how many jobs are to be drawn", "+sweep.random=20"))
        return []
    values = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not values:
        problems.append(Problem(key, line.partition("=")[2], "stands for no value at all", f"{key}=<value>,<value>"))
    return values


def _zip_groups(line: str, problems: list[Problem]) -> list[list[str]]:
    """`+sweep.zip=[a,b]`, or `[[a,b],[c,d]]`."""
    value = parse_line(line).value()
    groups = value if isinstance(value, list) and value and all(isinstance(entry, list) for entry in value) else [value]
    if not all(isinstance(group, list) and len(group) > 1 and all(isinstance(key, str) for key in group) for group in groups):
        problems.append(
            Problem(_ZIP, line.partition("=")[2], "lists the swept keys that go together", "+sweep.zip=[optimizer.lr,loop.batch_size]")
        )
        return []
    return groups  # type: ignore[return-value]


def _zipped(group: list[str], axes: dict[str, list[str]], problems: list[Problem]) -> list[list[str]]:
    missing = [key for key in group if key not in axes]
    for key in missing:
        problems.append(Problem(_ZIP, key, "is not swept, so there is nothing to go with the others", f"{key}=<value>,<value>"))
    lengths = {key: len(axes[key]) for key in group if key not in missing}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} has {n}" for key, n in lengths.items())
        problems.append(Problem(_ZIP, "[" + ",".join(group) + "]", f"needs as many values of each: {told}"))
    return [] if missing else [list(job) for job in zip(*(axes[key] for key in group))]


def _rows(name: str, problems: list[Problem]) -> list[list[str]]:
    """Jobs from a file: a YAML list of mappings or of lists of overrides, or a CSV whose header has the keys."""
    path = Path(name.strip("'\"")).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return [
                [f"{key.strip()}={value.strip()}" for key, value in row.items() if value and value.strip()]
                for row in csv.DictReader(text.splitlines())
            ]
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(Problem(_FILE, name, f"cannot be read: {error}".splitlines()[0]))
        return []
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict | list | str) for entry in content):
        problems.append(Problem(_FILE, name, "is no list of jobs: each is a mapping {optimizer.lr: 0.1, seed: 1} or a list of overrides"))
        return []
    return [
        [f"{key}={as_override(value)}" for key, value in entry.items()] if isinstance(entry, dict) else [entry] if isinstance(entry, str) else list(map(str, entry))
        for entry in content
    ]  # fmt: skip
