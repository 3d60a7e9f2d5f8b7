"""Fixtures that several test files share."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

# Before torch is imported, and for every process that a test starts: two test processes on two cores, each with two threads that wait
# for one another, cost a third more than with one; and a process that is forked from one with such threads can hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

import tasks  # noqa: F401  (registers the schemas)

# The same examples every time and no deadline: a shared machine pauses for longer than any sensible one.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")


class OneWorkerForSlurm(LoadScopeScheduling):
    """A module's tests stay together; and all of tests/slurm, which share a cluster that some of them take nodes away from."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores, as many tests wait for processes of their own."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return OneWorkerForSlurm(config, log)


REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


class RealData:
    """Real photographs, unpacked when first asked for: `shared_data / "cifar10"`. Skips where they are not at hand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __truediv__(self, name: str) -> Path:
        packed = REAL_DATA / f"{name}.tar"
        if not packed.exists():
            pytest.skip(f"needs the real photographs of {name}.tar in ../shared/data beside the checkout")
        if not (self.directory / name).exists():
            with tarfile.open(packed) as tar:
                tar.extractall(self.directory, filter="data")
        return self.directory / name


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> RealData:
    """Real data for the session. Read only: a test that changes files copies them first."""
    return RealData(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Nothing a test caches ends up in the home directory."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
