"""How a job ended, and why: from its exit code, its status, and the last words it printed."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from trainer.errors import ConfigError, DataError, DistributedError, Diverged, Interrupted, Stopped, StorageError
from trainer.rundir import RunDirectory
from trainer.sweep.manifest import State

_KINDS = {kind.exit_code: kind.__name__ for kind in (ConfigError, DataError, Diverged, StorageError, DistributedError)}
_LAST_BYTES = 10_000  # of a log, looked through for the last words


def explain_end(directory: RunDirectory, code: int, log: Path, *, cancelled: bool = False) -> tuple[str, str | None]:
    """(state, reason) of a job whose process has ended with `code` (-n: by signal n). Makes its status.json say the same."""
    status = directory.read_status()
    said, reason = status.get("state"), status.get("reason")
    if code == 0 and directory.is_finished():
        return "completed", None
    if said == "pruned":
        return said, reason
    if cancelled:
        directory.status("cancelled", reason="cancelled")
        return "cancelled", "cancelled"
    if code in (Stopped.exit_code, Interrupted.exit_code):
        state = "interrupted" if code == Interrupted.exit_code else "preempted"
        if said not in ("preempted", "interrupted"):  # before it had begun
            directory.status(state, reason="stopped before it had begun")
        return state, reason
    if said in ("failed", "cancelled") and reason:
        return said, reason
    reason = _fate(code, log)
    if (
        code == ConfigError.exit_code and directory.live_writer() is not None
    ):  # refused, as another process runs it: that one's status stays
        return "failed", reason
    directory.status("failed", reason=reason)
    return "failed", reason


def _fate(code: int, log: Path) -> str:
    if code == 0:
        return "ended without a result"
    if code < 0:
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{memory}"
    return f"{_KINDS.get(code, 'exit code ' + str(code))}: {last_words(log)}"


def last_words(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return "it left no log"
    said = [line.strip() for line in lines if line.strip()]
    problem = next((line for line in said if re.match(r"[\w.\[\]]+=.*: ", line)), None)  # of a configuration error: what, not the way out
    return (problem or (said[-1] if said else "it said nothing"))[:500]


def has_passed(directory: RunDirectory, steps: int) -> bool:
    """Whether a run has come so far, or is done."""
    status = directory.read_status()
    return directory.is_finished() or (status.get("state") == "running" and (status.get("step") or 0) >= steps)


def describe(directory: RunDirectory, state: State) -> str:
    """A job's end, in words."""
    if state.state == "completed" and (result := directory.read_result()):
        metric = result["metric"]
        value = result["best"].get(metric)
        return f"completed: best {metric} {value:.4f}" if isinstance(value, float) else "completed"
    return f"{state.state}: {state.reason}" if state.reason else state.state
