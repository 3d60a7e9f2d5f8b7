"""Writes checkpoints while training goes on. A file is whole, verified and durable before it gets its name.

Order of events for one checkpoint, each step safe to be killed in or after:

    snapshot -> hidden .partial file, hashed on the way -> fsync -> read back and compared -> published under each name
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import torch
from torch import Tensor, nn

from trainer.checkpoint.faults import strike
from trainer.checkpoint.publish import PREVIOUS, delete, publish
from trainer.checkpoint.snapshot import Snapshot, state_size
from trainer.errors import StorageError
from trainer.files import PARTIAL, partial_path, sha256_of, storage_error

_NUMBERED = re.compile(r"(?:epoch|step)-(\d+)(?:-loss-[^/]+)?\.pt")

log = logging.getLogger(__name__)


class Writer:
    """Saves states into `directory`, one at a time, in a thread of its own. Only one process may have one on a directory.

    What goes wrong in the thread is raised as a StorageError by the next `save`, `check` or `wait`.
    """

    def __init__(self, directory: Path | str, *, keep: int = 1) -> None:
        self.directory = Path(directory)
        self.keep = keep  # how many numbered checkpoints (epoch-0010.pt) stay
        self.stall_seconds = 0.0  # how long the last `save` held training up
        self.save_seconds = 0.0  # from the last call of `save` to a durable file: what a deadline must leave time for
        self._snapshot = Snapshot()
        self._trouble: StorageError | None = None
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._open_directory()
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Get memory for snapshots like `state`, in the background. Best called after the first optimizer step: optimizers
        make their state in it."""
        self.wait()
        size, device = state_size(state)
        self._submit(lambda: self._snapshot.reserve(size, device))

    def save(self, state: Mapping[str, Any], names: Iterable[str]) -> None:
        """Save `state` as `<name>.pt` for each name. Returns once it is copied; it may change from then on.

        Waits first for an earlier checkpoint that is still being written.
        """
        started = time.perf_counter()
        self.wait()
        copy = self._snapshot.take(state)
        # `last` goes last: a run that is killed in between goes on from the old one and writes the same `best` again.
        ordered = sorted(set(names), key=lambda name: (name == "last", name))
        self._submit(lambda: self._write(copy, ordered, started))
        self.stall_seconds = time.perf_counter() - started

    def wait(self) -> None:
        """Until everything asked for is on disk."""
        self._idle.wait()
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did."""
        if self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            raise trouble

    def forget_previous(self) -> None:
        """Delete `previous.pt`: a run that is complete does not need it any more."""
        self.wait()
        delete(self.directory / f"{PREVIOUS}.pt")

    def close(self) -> None:
        """Finish what is being written, and end the thread."""
        if self._thread.is_alive():
            self._idle.wait()
            self._jobs.put(None)
            self._thread.join()
        self.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except StorageError as trouble:
            if error is None:
                raise
            log.error("%s", trouble)  # what ended the run matters more

    def _open_directory(self) -> None:
        """Fail at the start of a run rather than at its first checkpoint; clear away what a killed writer left."""
        probe = partial_path(self.directory / "probe")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(f".*{PARTIAL}"):
                leftover.unlink(missing_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise storage_error(self.directory, error) from error

    # In the thread

    def _submit(self, job: Any) -> None:
        self._idle.clear()
        self._jobs.put(job)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except StorageError as error:
                self._trouble = error
            except BaseException as error:  # whatever it is, the main thread must not wait for ever
                self._trouble = StorageError(f"a checkpoint could not be written: {type(error).__name__}: {error}")
                self._trouble.__cause__ = error
            finally:
                job = None  # the copy's containers, and with them nothing that the next snapshot needs
                self._idle.set()

    def _write(self, state: Any, names: list[str], started: float) -> None:
        self._snapshot.finish()
        partial = partial_path(self.directory / f"{names[0]}.pt")
        try:
            digest = _write_hashed(state, partial)
            publish(partial, digest, self.directory, [f"{name}.pt" for name in names])
        except (OSError, StorageError) as error:
            trouble = storage_error(self.directory / f"{names[-1]}.pt", error) if isinstance(error, OSError) else error
            raise StorageError(
                f"{trouble}\n    the earlier checkpoints in {self.directory} are intact; the same command goes on from them"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self._prune()
        self.save_seconds = time.perf_counter() - started

    def _prune(self) -> None:
        """Keep the newest `keep` numbered checkpoints."""
        strike("prune")
        numbered = sorted((int(m[1]), p) for p in self.directory.iterdir() if (m := _NUMBERED.fullmatch(p.name)))
        for _, path in numbered[: max(0, len(numbered) - self.keep)]:
            delete(path)


class _HashingFile:
    """The part of a file that torch.save needs. Hashing here costs no second pass, and checks what was meant to be written."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115  torch hands over whole tensors
        self.digest = hashlib.sha256()
        self.trouble: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        view = memoryview(data).cast("B")
        try:
            while len(view):  # a raw file may take less than it is given
                view = view[self.file.write(view) :]
                strike("write")
        except OSError as error:  # on its way through torch's C++ writer it would lose its errno
            self.trouble = error
            raise
        return memoryview(data).nbytes

    def flush(self) -> None:
        self.file.flush()


def _write_hashed(state: Any, path: Path) -> str:
    """Write `state`, make it durable, read it back. Returns its hash."""
    file = _HashingFile(path)
    with file.file:
        try:
            torch.save(state, cast(IO[bytes], file))
        except Exception as error:
            raise (file.trouble or error) from error
        strike("sync")
        os.fsync(file.file.fileno())
    digest = file.digest.hexdigest()
    strike("verify")
    if sha256_of(path, from_disk=True) != digest:
        raise StorageError(
            f"{path.parent} does not give back what was written to it: the checkpoint was thrown away, the one before it stays"
        )
    return digest


def save_safetensors(weights: nn.Module | Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights alone, for other programs, with the same care as a checkpoint."""
    from safetensors.torch import save_file

    path = Path(path)
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # The format has no notion of tied weights: each name gets bytes of its own.
        plain[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(plain, partial, metadata={"format": "pt", **(metadata or {})})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        publish(partial, sha256_of(partial, from_disk=True), path.parent, [path.name])
    except OSError as error:
        raise storage_error(path, error) from error
    except Exception as error:  # safetensors has an error class of its own for a full disk
        if "os error" not in str(error).lower():
            raise
        raise StorageError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
