"""What a run ran on and with: `environment.json`. Looks, never imports: versions come from package metadata, so this is fast.

It records no environment variables but a few harmless ones: others may hold keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.rundir import RunDirectory

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "hydra-core", "omegaconf", "safetensors", "wandb", "trainyard")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG", "NCCL_DEBUG",
    "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT",
)  # fmt: skip
STATE_FILE = "code_state.json"  # beside trainer/ in a copy of the code: what git said of the original
SPLITS = {"train": "training", "val": "validation"}
_LONGEST_DIFF = 1_000_000  # characters; beyond it, data were changed, not code


def write_environment(directory: Path | str, *, ranks: int = 1, **more: Any) -> dict[str, Any]:
    """Describe this process's surroundings and write them into the run directory. Returns the description.

    Args:
        more: what else the run was made from, as `data={"train": fingerprint, ...}` (`trainer.data.source.fingerprints`).
    """
    environment = {**describe(ranks=ranks), **more}
    RunDirectory(directory).write_environment(environment)
    return environment


def describe(*, ranks: int = 1) -> dict[str, Any]:
    return {
        "argv": [sys.executable, *sys.argv],
        "directory": str(Path.cwd()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "ranks": ranks,
        "git": code_state(),
        "versions": versions(),
        "hardware": hardware(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def code_state(folder: Path | None = None) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the code that runs; None where it is not in a git repository.

    `code` sums up all of it: two runs with equal `code` ran the same files. Untracked files count too where they are Python
    or YAML: a new task is one of them until it is committed.
    """
    if folder is None:
        folder = Path(__file__).resolve().parent
        if (copied := folder.parent / STATE_FILE).exists():
            return json.loads(copied.read_text())
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None:
        return None
    top = Path(root.strip())
    commit = (_git(top, "rev-parse", "HEAD") or "").strip() or None  # none yet in a fresh repository
    diff = (_git(top, "diff", "HEAD") if commit else None) or ""
    listing = _git(top, "ls-files", "--others", "--exclude-standard", "-z", "--", "*.py", "*.yaml", "*.yml", "*.toml") or ""
    untracked = {name: _hash_of(top / name) for name in sorted(filter(None, listing.split("\0")))}
    summary = hashlib.sha256(repr((commit, diff, untracked)).encode(errors="replace")).hexdigest()[:16]
    if len(diff) > _LONGEST_DIFF:
        diff = f"{diff[:_LONGEST_DIFF]}\n[cut off: {len(diff)} characters in all]\n"
    return {"commit": commit, "dirty": bool(diff or untracked), "code": summary, "diff": diff, "untracked": untracked}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two environments that can change a result, in words; nothing where nobody can tell."""
    if (old := before.get("git")) and (new := now.get("git")) and old.get("code") != new["code"]:
        if old.get("commit") != new["commit"]:
            yield f"the code was at commit {_short(old.get('commit'))} and is at {_short(new['commit'])} now"
        else:
            yield f"the code has other uncommitted changes on commit {_short(new['commit'])} than it had then"
    then, there = before.get("data") or {}, now.get("data") or {}
    if splits := [SPLITS[name] for name in SPLITS if name in then and name in there and then[name] != there[name]]:
        yield f"the {' and '.join(splits)} data have changed since: files were added, removed or altered"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [],
    }
    torch = sys.modules.get("torch")  # a process that has not loaded it does not compute either
    if torch is not None and torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            found["gpus"].append({"name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)})
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails, is missing, or takes too long."""
    try:
        # No optional locks: looking must not disturb a git command that the user runs at the same time.
        done = subprocess.run(["git", "--no-optional-locks", *arguments], cwd=folder, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _hash_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return "unreadable"


def _short(commit: str | None) -> str:
    return commit[:10] if commit else "none"
