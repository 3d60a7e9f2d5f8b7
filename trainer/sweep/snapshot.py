"""`hydra.launcher.code=snapshot`: a copy of the code that jobs run, so that editing goes on while they wait."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from trainer.environment import STATE_FILE, code_state

ROOT = Path(__file__).resolve().parents[2]
_ALWAYS = ("trainer", "tasks", "conf", "hydra_plugins", "launch.py", "pyproject.toml")


def take(target: Path) -> None:
    """Copy what git knows and what it does not ignore; without git, the packages. What git says of it goes along."""
    listed = _listed()
    for name in listed if listed is not None else ():
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    if listed is None:
        for name in _ALWAYS:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target / name)
    (target / STATE_FILE).write_text(json.dumps(code_state(ROOT)))


def _listed() -> list[str] | None:
    """None where the code is not in a git repository of its own."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [name for name in done.stdout.split("\0") if name]
