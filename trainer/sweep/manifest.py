"""The list of a sweep's jobs, on disk: `runs/<name>/sweeps/<sweep id>/manifest.json`.

It records what the launcher knows: overrides, directories, job ids. How a job is doing, its own run directory says (`states`).
Imports no torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, Problem
from trainer.files import json_by_lines, storage_error, write_atomically
from trainer.lock import Busy, Heart, Lock, live_holder
from trainer.rundir import RunDirectory
from trainer.sweep.cluster import GONE, in_our_words

VERSION = 1
FILE = "manifest.json"
STATES = ("queued", "running", "completed", "failed", "preempted", "interrupted", "pruned", "cancelled", "held")
OPEN = ("queued", "running", "preempted")  # may still go on without anybody's help; the other states are final
LEFT = ("queued", "preempted", "interrupted")  # what `resume` starts again, where nothing runs
_GONE = "its process is gone"


@dataclass
class Job:
    """One run of a sweep, as the launcher knows it."""

    index: int
    overrides: list[str]  # the swept ones only
    group: dict[str, Any]  # the same as settings, without the seed: jobs of one group are repeats of one another
    seed: int | None
    directory: str  # of the run; relative to the folder that holds runs_dir where it is in there
    job_id: str | None = None  # SLURM's, as `scancel` takes it
    state: str = "queued"
    reason: str | None = None
    attempts: int = 0  # how often it was started, or queued
    resources: dict[str, Any] = field(default_factory=dict)  # of SLURM's, where they differ from the sweep's

    def __str__(self) -> str:
        return " ".join(self.overrides) or "as it is"


@dataclass(frozen=True)
class State:
    """How a job is doing, from its run directory."""

    state: str
    reason: str | None = None
    step: int = 0
    total_steps: int | None = None
    heartbeat: float | None = None  # unix time

    @property
    def is_final(self) -> bool:
        return self.state not in OPEN


@dataclass
class Manifest:
    """All jobs of a sweep."""

    path: Path  # the sweep's directory
    sweep: str
    name: str
    created: str
    argv: list[str]
    launcher: str
    base: list[str]  # overrides common to all jobs
    jobs: list[Job] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # the launcher's own, so that `resume` starts the rest alike
    search: dict[str, Any] = field(default_factory=dict)  # of a sweep that chooses its jobs as it goes on: how
    cwd: str = ""  # the folder that relative paths in configs count from
    version: int = VERSION

    @classmethod
    def load(cls, path: Path | str) -> Manifest:
        """The manifest of a sweep's directory (or the file itself).

        Raises:
            ConfigError: there is none, or it is damaged; with what is wrong in it.
        """
        path = Path(path)
        path = path.parent if path.name == FILE else path
        try:
            content = json.loads((path / FILE).read_text())
        except FileNotFoundError:
            raise ConfigError(
                Problem("sweep", path, f"holds no {FILE}, so it is not a sweep", "name a folder like runs/<name>/sweeps/<id>")
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(Problem("sweep", path / FILE, f"cannot be read: {error}", _MEND)) from None
        problems = list(_problems(content, path / FILE))
        if problems:
            raise ConfigError(*problems)
        known = {f.name for f in fields(cls)} - {"path", "jobs"}
        jobs = [Job(**{f.name: job[f.name] for f in fields(Job) if f.name in job}) for job in content["jobs"]]
        return cls(path, jobs=jobs, **{key: value for key, value in content.items() if key in known})

    def save(self, *, durable: bool = True) -> None:
        """Replace the file in one step: a reader sees the old manifest or the new one, never half of it. What a power cut may
        take back, as the run directories know it too, need not be `durable`."""
        head = ["version", "sweep", "name", "created", "cwd", "argv", "launcher", "settings", "search", "base"]
        text = json_by_lines({key: getattr(self, key) for key in head}, "jobs", map(vars, self.jobs))
        write_atomically(self.path / FILE, text, durable=durable)

    @property
    def root(self) -> Path:
        """The folder that holds runs_dir: what relative run directories count from. It moves with the runs."""
        return self.path.absolute().parents[2 + len(Path(self.name).parts)]

    @property
    def trials_left(self) -> int:
        """How many trials a search has still to start; 0 of a sweep whose jobs are all known."""
        if not self.search:
            return 0
        return max(0, int(self.search["n_trials"]) - len(self.jobs) // len(self.search["repeats"]))

    def directory(self, job: Job) -> RunDirectory:
        return RunDirectory(self.root / job.directory)


_MEND = "restore it, or start the sweep's command line again: jobs that are finished are not run again"


def _problems(content: Any, path: Path) -> Iterable[Problem]:
    """What is wrong with a manifest that somebody has edited, or that comes from elsewhere."""
    if not isinstance(content, dict) or not isinstance(content.get("jobs"), list):
        yield Problem("sweep", path, "is no manifest: it lists no jobs", _MEND)
        return
    if content.get("version") != VERSION:
        yield Problem("sweep", path, f"has version {content.get('version')}, and this code reads version {VERSION}")
        return
    for key in ("sweep", "name", "created", "launcher"):
        if not isinstance(content.get(key), str):
            yield Problem("sweep", path, f"{key} must be text", _MEND)
    search = content.get("search") or {}
    if search and not (isinstance(search, dict) and isinstance(search.get("n_trials"), int) and search.get("repeats")):
        yield Problem("sweep", path, "search must be a mapping with n_trials and repeats", _MEND)
    for key in ("argv", "base"):
        if not _is_texts(content.get(key)):
            yield Problem("sweep", path, f"{key} must be a list of texts", _MEND)
    for place, job in enumerate(content["jobs"]):
        wrong = _wrong_with(job)
        if wrong:
            yield Problem("sweep", path, f"jobs[{place}]{wrong}", _MEND)


def _wrong_with(job: Any) -> str:
    if not isinstance(job, dict):
        return " is no mapping"
    checks = {
        "index": isinstance(job.get("index"), int),
        "overrides": _is_texts(job.get("overrides")),
        "group": isinstance(job.get("group"), dict),
        "seed": job.get("seed") is None or isinstance(job["seed"], int),
        "directory": isinstance(job.get("directory"), str) and bool(job["directory"]),
        "state": job.get("state") in STATES,
        "attempts": isinstance(job.get("attempts", 0), int),
        "resources": isinstance(job.get("resources", {}), dict),
    }
    bad = [key for key, fine in checks.items() if not fine]
    return f".{bad[0]} is {job.get(bad[0])!r}" if bad else ""


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


# Who drives


@contextmanager
def driving(path: Path) -> Iterator[None]:
    """Be the only one who starts jobs of the sweep in `path` and writes its manifest.

    Raises:
        ConfigError: another launcher that is alive does so already.
    """
    lock = Lock(path)
    try:
        lock.acquire()
    except Busy:
        holder = live_holder(path)
        raise Busy(
            Problem(
                "sweep",
                path,
                f"is being driven by {holder or 'a launcher that has just started'}",
                f"wait for it, or python -m trainer cancel {path}",
            )
        ) from None
    heart = Heart(lock.beat)
    heart.start()
    try:
        yield
    finally:
        heart.stop()
        lock.release()


def new_directory(parent: Path) -> Path:
    """A new sweep's directory, named by the time and created exclusively: two sweeps of one second get two."""
    stem = time.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            path = parent / (stem if number == 1 else f"{stem}-{number}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        raise storage_error(parent, error) from error


# How the jobs are doing


def states(manifest: Manifest, cluster: Mapping[str, str] | None = None) -> list[State]:
    """The effective state of every job, in the manifest's order.

    Args:
        cluster: SLURM's words for job ids (`trainer.sweep.cluster.words`), where it could be asked; for jobs that have no
            process of theirs to speak for them.
    """
    return [state_of(job, manifest.directory(job), cluster) for job in manifest.jobs]


def state_of(job: Job, directory: RunDirectory, cluster: Mapping[str, str] | None = None) -> State:
    """The state of one job: its run directory's word, unless it has said nothing yet or its process is gone."""
    status = directory.read_status()
    said = status.get("state")
    numbers = {"step": status.get("step") or 0, "total_steps": status.get("total_steps"), "heartbeat": status.get("heartbeat")}
    word = (cluster or {}).get(job.job_id or "")
    at_slurm = in_our_words(word) if word else None
    if said == "completed":
        return State("completed" if directory.result_path.exists() else "interrupted", None, **numbers)
    if said == "running" and at_slurm in ("failed", "cancelled"):  # of a node that is gone no file could tell for minutes
        return State(at_slurm, f"SLURM says {word}", **numbers)
    if said == "running":
        if directory.live_writer() is not None:
            return State("running", None, **numbers)
        if at_slurm in ("queued", "running"):  # its host is gone or slow, and SLURM starts it again
            return State(at_slurm, _GONE, **numbers)
        return State(*((job.state, job.reason) if job.state in ("failed", "cancelled", "held") else ("interrupted", _GONE)), **numbers)
    if said in (None, "queued"):  # only the launcher knows
        if at_slurm in STATES and job.state in ("queued", "running"):
            return State(at_slurm, job.reason or (f"SLURM says {word}" if at_slurm not in OPEN else None), **numbers)
        return State("queued" if job.state in ("running", "completed") else job.state, job.reason or status.get("reason"), **numbers)
    if at_slurm == "cancelled" and said in ("preempted", "interrupted"):  # stopped in good order, by scancel
        return State("cancelled", status.get("reason"), **numbers)
    if said == "preempted" and word == GONE and job.state != "cancelled":  # nobody can say why; it does not go on by itself
        return State("interrupted", "it has left SLURM's queue", **numbers)
    if job.state in ("held", "cancelled") and said in ("failed", "interrupted", "preempted"):
        return State(job.state, job.reason or status.get("reason"), **numbers)
    return State(str(said), status.get("reason"), **numbers)


def counts(found: Sequence[State]) -> dict[str, int]:
    """How many jobs are in each state, in the order of a job's life."""
    return {state: n for state in STATES if (n := sum(s.state == state for s in found))}


def relative_directory(directory: Path, root: Path) -> str:
    """How a manifest writes down a run directory."""
    absolute = Path(os.path.abspath(directory))
    return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else str(absolute)
