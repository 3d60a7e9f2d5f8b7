"""What can go wrong, and the exit code each kind ends with. Imports nothing, so every layer may raise these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: which key, what is wrong with its value, and the way out."""

    key: str  # dotted, as on the command line: "optimizer.lr"
    value: object
    reason: str  # what is allowed, in words: "a learning rate is a positive number"
    fix: str = ""  # an override that mends it, or what to do: "optimizer.lr=1e-3"

    def __str__(self) -> str:
        line = f"{self.key}={_short(self.value)}: {self.reason}"
        return f"{line}\n    try: {self.fix}" if self.fix else line


def _short(value: object) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


class TrainyardError(Exception):
    """Base of the errors that end a run with a code of their own and without a traceback."""

    exit_code = 1


class ConfigError(TrainyardError):
    """The configuration cannot work. Holds every problem found, not only the first."""

    exit_code = 2

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = problems
        super().__init__("\n".join(str(p) for p in problems))


class DataError(TrainyardError):
    """Data turned out bad while they were read."""

    exit_code = 3


class Diverged(TrainyardError):
    """The loss or the gradients were not finite for too many steps in a row."""

    exit_code = 4


class StorageError(TrainyardError):
    """Something could not be written or read back: disk full, read-only, or a corrupt file with no good one behind it."""

    exit_code = 5


class DistributedError(TrainyardError):
    """A rank died, hung, or could not be reached."""

    exit_code = 6


class Stopped(TrainyardError):
    """Told to stop (signal, deadline) and did so at a step boundary with a checkpoint: the same command resumes."""

    exit_code = 75


class Pruned(Stopped):
    """A search has ended this run, at a step boundary with a checkpoint: what it has shown is enough. That is no failure."""

    exit_code = 0


class Interrupted(TrainyardError):
    """Ctrl-C: stopped like `Stopped`, by a person."""

    exit_code = 130
