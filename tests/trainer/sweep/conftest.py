"""Sweeps whose jobs are scripts (`light.py`), so that it is the launcher that is tested."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.trainer.sweep import light
from trainer.sweep import drive
from trainer.sweep.manifest import Job, Manifest, new_directory


@pytest.fixture
def light_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the verbs start are scripts, too."""
    monkeypatch.setattr(drive, "Pool", functools.partial(drive.Pool, server=light.SERVER))


@pytest.fixture
def sweep(tmp_path: Path):
    def make(*scripts: str) -> Manifest:
        path = new_directory(tmp_path / "runs" / "digits" / "sweeps")
        manifest = Manifest(path, path.name, "digits", "", [], "local", [])
        manifest.jobs = [Job(n, [f"seed={n}"], {}, n, f"runs/digits/s{n}-00000000") for n in range(len(scripts))]
        for job, script in zip(manifest.jobs, scripts, strict=True):
            manifest.directory(job).create()
            manifest.directory(job).config_path.write_text("")
            (manifest.directory(job).path / light.SCRIPT).write_text(script)
        manifest.save()
        return manifest

    return make
