"""What lies at the paths that a verb was given: a sweep, a run, a folder of runs. Reads, and never writes.

A job of a sweep is one run directory like any other, so everything after this file knows runs only.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, Problem
from trainer.rundir import RunDirectory
from trainer.sweep.cluster import recently
from trainer.sweep.configs import read_plain, settings
from trainer.sweep.manifest import FILE, OPEN, Job, Manifest, State, state_of

DEPTH = 4  # folders below a path that are looked through for runs: runs/<name>/<version>-<hash>, and a name may hold a slash
REPRODUCTION = "reproduces.json"  # marks a run that repeats another: it is no seed of its own
_CODE = re.compile(rb'"code": "([0-9a-f]+)"')


@dataclass
class Run:
    """One run, and what its directory says of it."""

    directory: RunDirectory
    job: Job  # of a run that no sweep started: made up from its config
    state: State
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def seed(self) -> int | None:
        return self.job.seed

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """result.json of a completed run, if it is one."""
        if self.state.state != "completed":
            return None
        result = self.directory.read_result()
        if result is None or not all(isinstance(result.get(key), dict) for key in ("best", "last")):
            self.notes.append(f"{self.directory}: result.json is damaged: its run does not count")
            return None
        return result

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its settings by dotted key, those that can change a result, and its name; empty where there is no config."""
        try:
            plain = read_plain(self.directory.config_path)
            return settings(plain) | {"name": plain.get("name")}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.notes.append(f"{self.directory}: config.yaml cannot be read: {str(error).splitlines()[0]}")
            return {}

    @cached_property
    def code(self) -> str | None:
        """The hash of the code that ran, from the head of environment.json: its diff may be long."""
        try:
            with open(self.directory.environment_path, "rb") as file:
                found = _CODE.search(file.read(8192))
        except OSError:
            return None
        return found.group(1).decode() if found else None

    @cached_property
    def duration(self) -> float | None:
        """Seconds in the run over all its starts, where it is completed."""
        seconds = (self.result or {}).get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None


@dataclass
class Found:
    """All runs at the paths."""

    title: str
    home: Path  # where what is made of them is put
    runs: list[Run]
    sweep: Manifest | None = None  # where it is exactly one

    def notes(self) -> list[str]:
        return [note for run in self.runs for note in run.notes]


def find(paths: Sequence[Path | str], verb: str = "report") -> Found:
    """The runs at `paths`: sweeps, run directories, folders of either.

    Raises:
        ConfigError: there is nothing of the kind at one of them, or a manifest is damaged.
    """
    found: list[Run] = []
    sweeps: list[Manifest] = []
    problems: list[Problem | str] = []
    for path in map(Path, paths):
        try:
            held = list(_at(path))
        except ConfigError as error:
            problems += error.problems
            continue
        for kind in held:
            if isinstance(kind, Manifest):
                sweeps.append(kind)
                at_slurm = recently([job.job_id for job in kind.jobs if job.state in OPEN]) if kind.launcher == "slurm" else None
                found += (_run(kind.directory(job), job, at_slurm) for job in kind.jobs)
            else:
                found.append(_run(kind))
        if not held:
            reason = "holds neither runs nor a sweep" if path.exists() else "is not there"
            problems.append(Problem(verb, path, reason, f"python -m trainer {verb} runs/<name>, or runs/<name>/sweeps/<id>"))
    if problems:
        raise ConfigError(*problems)
    one = Path(paths[0]) if len(paths) == 1 else None
    sweep = sweeps[0] if one and len(sweeps) == 1 and len(found) == len(sweeps[0].jobs) else None
    home = sweep.path if sweep else one if one and not _is_run(one) else Path("outputs")
    title = f"{sweep.name} {sweep.sweep}" if sweep else one.resolve().name if one else f"{len(paths)} folders"
    return Found(title, home, list({os.path.abspath(run.directory.path): run for run in found}.values()), sweep)


def _at(path: Path) -> Iterator[Manifest | RunDirectory]:
    if path.name == FILE or (path / FILE).exists():
        yield Manifest.load(path)
    elif _is_run(path):
        yield RunDirectory(path)
    else:
        directories = sorted(_runs_below(path, DEPTH))
        yield from map(RunDirectory, directories)
        if not directories:  # a folder of sweeps, whose runs lie elsewhere
            yield from (Manifest.load(manifest) for manifest in sorted(path.glob(f"*/{FILE}")))


def _runs_below(path: Path, depth: int) -> Iterator[Path]:
    try:
        children = [Path(entry.path) for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return
    for child in children:
        if _is_run(child):
            if not (child / REPRODUCTION).exists():
                yield child
        elif depth > 1:
            yield from _runs_below(child, depth - 1)


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "status.json").is_file()


def _run(directory: RunDirectory, job: Job | None = None, at_slurm: Mapping[str, str] | None = None) -> Run:
    if job is not None:
        state = state_of(job, directory, at_slurm)
        if state.state == "queued" and job.attempts and not directory.path.exists():
            state = State("missing", f"{directory} is gone")
        return Run(directory, job, state)
    job = Job(0, [], {}, None, str(directory.path))
    run = Run(directory, job, state_of(job, directory))
    seed = run.config.get("seed")
    job.seed = seed if isinstance(seed, int) else None
    job.group = {key: value for key, value in run.config.items() if key != "seed"} or {"directory": str(directory)}
    return run


def last_row(path: Path, wanted: str = "", *, tail: int = 65_536) -> dict[str, Any] | None:
    """The last row of a metrics.jsonl with a key that begins with `wanted`, read from the file's end."""
    from trainer.log.record import parse

    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - tail))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return None
    for line in reversed(lines):
        row = parse(line)
        if row is not None and (not wanted or any(key.startswith(wanted) for key in row)):
            return row
    return None


def number(value: Any) -> float | None:
    """`value` where it is a finite number: JSON has none for NaN, which a diverged run ends with."""
    if type(value) is float:  # nearly all of them, and there are very many
        return value if math.isfinite(value) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def text_of(value: Any) -> str:
    """A setting as one types it."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.6g}" if float(f"{value:.6g}") == value else repr(value)
    return ",".join(map(text_of, value)).join("[]") if isinstance(value, list) else str(value)
