"""The run directory: where it is (decided from the config, before the run), who writes in it, and what its files say.

Knows files and locks; knows nothing of training. Imports no torch, so that launchers, sweeps and reports can read runs fast.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.config.run import Resume, RunConfig
from trainer.errors import ConfigError, Interrupted, Problem, Pruned, Stopped, StorageError
from trainer.files import storage_error, write_atomically
from trainer.identity import differences, identity
from trainer.lock import Busy, Heart, Holder, Lock, busy_problem, job_id, live_holder

__all__ = ["RESULT_KEYS", "STATES", "RunDirectory", "identity", "run_directory", "write_atomically"]

STATES = ("queued", "running", "completed", "failed", "preempted", "interrupted", "cancelled", "pruned")
RESULT_KEYS = ("metric", "mode", "best", "last", "history", "steps", "samples", "seconds", "images_per_second", "parameters")
_UNKNOWN = {"state": "queued", "step": 0, "total_steps": None, "heartbeat": None, "host": None, "pid": None, "job_id": None, "reason": None}

log = logging.getLogger(__name__)


def run_directory(run: RunConfig) -> Path:
    """Where this run lives: `<runs_dir>/<name>/<version>-<hash>`.

    With `resume=never`, the next free of that and `…-2`, `…-3` …, created here and now, so that no two processes get the
    same: call it once per run (in one rank) and hand the path on. With `resume=must`, a ConfigError where nothing is.
    """
    problems = list(run.problems())
    if problems:
        raise ConfigError(*problems)
    base = Path(run.runs_dir) / run.name / f"{run.version}-{identity(run)}"
    if run.resume is Resume.must and not RunDirectory(base).has_checkpoint():
        raise ConfigError(Problem("resume", "must", f"there is no checkpoint in {base} to go on from", "resume=auto"))
    return _next_free(base) if run.resume is Resume.never else base


def _next_free(base: Path) -> Path:
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = base if number == 1 else base.with_name(f"{base.name}-{number}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        raise storage_error(base, error) from error


class RunDirectory:
    """One run's directory. Anyone may read; the process inside `claim()` writes."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.environment_path = self.path / "environment.json"
        self.status_path = self.path / "status.json"
        self.result_path = self.path / "result.json"
        self.extensions_path = self.path / "extended.json"
        self.prune_path = self.path / "prune.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"
        self.previews = self.path / "previews"
        self._status: dict[str, Any] | None = None  # None: not ours to keep, read from disk
        self._status_lock = threading.Lock()  # the heartbeat reads it too
        self._write_lock = threading.Lock()  # held while writing, so that an older status never replaces a newer one
        self._heart: Heart | None = None

    def __str__(self) -> str:
        return str(self.path)

    def log_path(self, rank: int = 0) -> Path:
        return self.path / ("train.log" if rank == 0 else f"train.rank{rank}.log")

    def create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def has_checkpoint(self) -> bool:
        return any(self.checkpoints.glob("*.pt"))

    def extensions(self) -> list[dict[str, Any]]:
        """How the run was made longer than its first command said, by `python -m trainer extend`; config.yaml is the last word."""
        return (_read_json(self.extensions_path) or {}).get("extensions", [])

    def record_extension(self, **facts: Any) -> None:
        write_atomically(self.extensions_path, _json({"extensions": [*self.extensions(), facts]}))

    def is_finished(self) -> bool:
        return self.result_path.exists() and self.read_status().get("state") == "completed"

    # Who writes

    @contextmanager
    def claim(self) -> Iterator[RunDirectory]:
        """Be the only writer, with a heartbeat. Raises `Busy`, a ConfigError, where a live process writes here already.

        A run left by an exception is marked as preempted, interrupted or failed, with the reason, unless it was said already.
        """
        self.create()
        lock = Lock(self.path)
        lock.acquire()
        self.prune_path.unlink(missing_ok=True)  # was meant for a process that is gone; a search will ask again
        self._status = _UNKNOWN | self.read_status() | {"state": "running", "reason": None} | _whereabouts()
        self._heart = Heart(lambda: self._beat(lock))
        try:
            self._write_status()
            self._heart.start()
            yield self
        except BaseException as error:
            self._record_end(error)
            raise
        finally:
            if self._heart.is_alive():
                self._heart.stop()
            self._heart = self._status = None
            lock.release()

    def live_writer(self) -> Holder | None:
        """Who writes here right now; None where nobody does."""
        return live_holder(self.path)

    def refuse_second_writer(self) -> None:
        """Raise `Busy` where a live process writes here: what `claim()` would do, asked before other processes are started."""
        if (holder := self.live_writer()) is not None:
            raise Busy(busy_problem(self.path, holder))

    def _beat(self, lock: Lock) -> None:
        lock.beat()
        try:
            self._write_status()
        except StorageError as error:  # a full disk is for the checkpoint to report; the lock must stay alive till then
            log.debug("heartbeat: %s", error)

    def _record_end(self, error: BaseException) -> None:
        if self._status is None or self._status["state"] != "running":
            return
        state = "failed"
        if isinstance(error, Interrupted | KeyboardInterrupt):
            state = "interrupted"
        elif isinstance(error, Stopped):
            state = "pruned" if isinstance(error, Pruned) else "preempted"
        try:
            self.status(state, reason=f"{type(error).__name__}: {error}".splitlines()[0][:500])
        except StorageError as second:
            log.debug("could not record %r: %s", error, second)

    # What a search asks for

    def ask_to_prune(self, reason: str) -> None:
        """Let the process that runs here, when it is told to stop, end for good and say `reason`."""
        write_atomically(self.prune_path, _json({"reason": reason}))

    def asked_to_prune(self) -> str | None:
        """The reason; None where nobody has asked."""
        return (_read_json(self.prune_path) or {}).get("reason")

    # What is written

    def status(self, state: str | None = None, **fields: Any) -> None:
        """Say how the run is doing: `state`, and any of step, total_steps, reason …

        Inside `claim()`, new numbers without a new state wait for the next heartbeat, so this may be called at every log line.
        """
        assert state is None or state in STATES, f"{state!r} is none of {STATES}"
        if self._heart is not None and self._heart.trouble is not None:
            raise self._heart.trouble
        if self._status is None:  # a launcher marking a job as queued or cancelled
            self.create()
            said = fields | ({"state": state} if state else {})
            content = _json(_UNKNOWN | self.read_status() | said | {"heartbeat": time.time()})
            write_atomically(self.status_path, content, durable=state != "queued")  # a manifest knows what is queued
            return
        changed = state is not None and state != self._status["state"]
        with self._status_lock:
            self._status.update(fields)
            if state is not None:
                self._status["state"] = state
        if changed:
            self._write_status(durable=True)

    def _write_status(self, *, durable: bool = False) -> None:
        with self._write_lock:
            with self._status_lock:
                assert self._status is not None
                content = self._status | {"heartbeat": time.time()}
            write_atomically(self.status_path, _json(content), durable=durable)

    def read_status(self) -> dict[str, Any]:
        """What `status.json` says; empty where there is none."""
        return _read_json(self.status_path) or {}

    def write_config(self, run: RunConfig, *, durable: bool = True) -> None:
        """The whole resolved config: enough to run it again anywhere. A sweep of a thousand does not wait for the disk each time."""
        import yaml

        from trainer.config.plain import to_plain

        self.create()
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # five times as fast
        text = yaml.dump(to_plain(run), Dumper=dumper, sort_keys=False, allow_unicode=True)
        write_atomically(self.config_path, text, durable=durable)

    def read_config(self) -> RunConfig:
        import yaml

        from trainer.config.plain import from_plain

        try:
            content = yaml.load(self.config_path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except FileNotFoundError:
            raise ConfigError(
                Problem(
                    "run directory",
                    self.path,
                    "holds no config.yaml, so it is not a run",
                    "name a folder like runs/<name>/<version>-<hash>",
                )
            ) from None
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise StorageError(f"cannot read {self.config_path}: {error}") from error
        return from_plain(content)

    def changes(self, run: RunConfig) -> list[tuple[str, Any, Any]]:
        """Settings that differ from the recorded config although the hash is the same, because a default changed
        with the code or the run was extended: (key, recorded, now)."""
        return differences(self.read_config(), run) if self.config_path.exists() else []

    def write_environment(self, environment: dict[str, Any]) -> None:
        """What `trainer.environment.describe` found. Earlier starts of this run are kept under `previous`."""
        before = self.read_environment()
        previous = [*before.pop("previous", []), before] if before else []
        write_atomically(self.environment_path, _json(environment | {"previous": previous}))

    def read_environment(self) -> dict[str, Any]:
        return _read_json(self.environment_path) or {}

    def write_result(self, result: Mapping[str, Any]) -> None:
        """What a completed run reached: at least `RESULT_KEYS`. `mode` is max or min: which end of `metric` is better."""
        missing = [key for key in RESULT_KEYS if key not in result]
        assert not missing, f"the result lacks {missing}"
        write_atomically(self.result_path, _json(dict(result)))

    def read_result(self) -> dict[str, Any] | None:
        """What `result.json` says; None where the run is not completed."""
        return _read_json(self.result_path)


def _whereabouts() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "job_id": job_id()}


def _json(content: Any) -> str:
    return json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; readers in other languages choke on Python's."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no mapping")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read and is ignored: %s", path, error)
        return None
