"""Reads checkpoints and believes nothing: a file is used only if it is whole, is what was written, and holds no code."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.publish import PREVIOUS, listed, sidecar_path
from trainer.errors import StorageError
from trainer.files import sha256_of

log = logging.getLogger(__name__)


class CheckpointError(StorageError):
    """One file that cannot be used, and why."""

    def __init__(self, path: Path, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(f"{path} cannot be used: {why}")


def load(path: Path | str, *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The state in `path`, verified against its `.sha256`, or against the sums inside it where it came without.

    Raises:
        CheckpointError: missing, empty, truncated, altered, or holding more than tensors and plain containers.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(path, "the file is empty")
        _verify(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on other pickle protocols: such a file is loaded or refused, there is nothing to do
            content = torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(path, "there is no such file") from None
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(path, _refusal(str(error))) from error
    except Exception as error:  # a file of arbitrary bytes makes the unpickler raise almost anything
        why = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(path, f"it is not a whole checkpoint file ({why})") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, f"it holds a {type(content).__name__}, not a checkpoint")
    return content


def newest_good(directory: Path | str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be used, skipping bad ones aloud; None where there has never been one.

    Raises:
        StorageError: there are checkpoints, and none can be used.
    """
    directory = Path(directory)
    bad: list[CheckpointError] = []
    seen: set[int | None] = set()  # inodes: one file under several names is good or bad under all of them
    best: tuple[Path, dict[str, Any]] | None = None
    for path in _candidates(directory):
        inode = _inode(path)
        if inode is not None and inode in seen:
            continue
        seen.add(inode)
        try:
            content = load(path)
        except CheckpointError as error:
            bad.append(error)
            log.error("%s", error)
            continue
        if not bad:  # last.pt, as a rule
            return path, content
        if best is None or content.get("step", -1) > best[1].get("step", -1):
            best = path, content
    if best is not None:
        log.warning(
            "%s is not used; going on from %s (step %s) instead",
            ", ".join(e.path.name for e in bad),
            best[0],
            best[1].get("step", "unknown"),
        )
        return best
    if bad:
        reasons = "\n".join(f"    {error.path.name}: {error.why}" for error in bad)
        raise StorageError(
            f"none of the checkpoints in {directory} can be used:\n{reasons}\n"
            f"    bring back one of them from a copy, delete {directory} to begin anew, or resume=never for a new run beside this one"
        )
    return None


def _candidates(directory: Path) -> Iterator[Path]:
    """The newest first, as far as names tell; where `last` is bad, the steps inside the others decide."""
    found = {path.stem: path for path in directory.glob("*.pt")}  # a directory or a broken link of that name is a bad one
    for name in ("last", PREVIOUS, *sorted(found, reverse=True)):
        if name in found:
            yield found.pop(name)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _verify(path: Path) -> None:
    expected = listed(path)
    if expected:
        digest = sha256_of(path)
        if digest not in expected:
            raise CheckpointError(
                path,
                f"its content has changed since it was written (sha256 {digest[:12]}…, {sidecar_path(path).name} says {expected[0][:12]}…)",
            )
    elif zipfile.is_zipfile(path):  # torch checks none of the sums in its own files
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise CheckpointError(path, f"{broken} in it is damaged")


def _refusal(message: str) -> str:
    found = re.search(r"(?:GLOBAL|Unsupported (?:class|global)[: ]+(?:GLOBAL)?)\s*([\w.]+)", message)
    what = f" ({found[1]})" if found else ""
    return f"it holds objects{what} that could run code when loaded; only tensors and plain containers are accepted"
