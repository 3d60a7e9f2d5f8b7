"""The cached index: what is written is read back, it is rebuilt exactly when it has to be, and it costs nothing to hold."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import thresholds
from trainer.data.index import FOLDER, SETTLED, Watch, cached
from trainer.data.table import Ragged, Strings, Table, read_table
from trainer.errors import DataError

ROWS = 1_000_000


def settle(*paths: Path) -> None:
    """Make files look as if they had been left alone for a while."""
    for path in paths:
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10 * SETTLED))


@given(
    st.lists(st.binary(max_size=20).filter(lambda b: b"\0" not in b), max_size=30),
    st.lists(st.lists(st.floats(width=32), max_size=4), max_size=10),
)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, names: list[bytes], rows: list[list[float]]) -> None:
    values = np.array([v for row in rows for v in row], dtype=np.float32)
    columns = {"name": Strings.pack(names), "rows": Ragged.pack([len(r) for r in rows], values)}
    table = Table.of(columns, {"classes": ["a", "b"]})
    back = table.write(tmp_path_factory.mktemp("table") / "x.index", note={"why": "test"})
    assert [back["name"].bytes(i) for i in range(len(names))] == names == back["name"].all()
    assert [os.fsencode(back["name"][i]) for i in range(len(names))] == names
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(back["rows"][i], np.array(row, np.float32))
    assert back.fingerprint == table.fingerprint == Table.of(columns, {"classes": ["a", "b"]}).fingerprint
    assert back.fingerprint != Table.of(columns, {"classes": ["b", "a"]}).fingerprint


def test_rows_and_slices_of_a_stored_array_are_those_of_the_array(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(6, 4)
    stored = Table.of({"a": array}).write(tmp_path / "t.index")["a"]
    for rows in (0, 5, slice(None), slice(2, 4), slice(4, 2), slice(3, 100)):
        np.testing.assert_array_equal(stored[rows], array[rows])
    np.testing.assert_array_equal(np.asarray(stored), array)
    for rows in (6, -1):
        with pytest.raises(IndexError):
            stored[rows]


def test_a_cut_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.index"
    Table.of({"a": np.arange(1000)}).write(path)
    whole = path.read_bytes()
    for content in (b"", whole[:10], whole[:200], whole[:-1], whole + b"x", b"\0" * 500, b"trainyd1" + b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cut short|not an index"):
            read_table(path)


def test_pickles_as_a_path_and_notices_a_rebuilt_file(tmp_path: Path) -> None:
    path = tmp_path / "t.index"
    table = Table.of({"a": np.arange(100_000)}).write(path)
    packed = pickle.dumps(table)
    assert len(packed) < 1000
    np.testing.assert_array_equal(pickle.loads(packed)["a"], np.arange(100_000))
    Table.of({"a": np.arange(5)}).write(path)
    assert table["a"][99_999] == 99_999  # who has it open keeps what was there
    with pytest.raises(DataError, match="the data changed"):
        pickle.loads(packed)


class Counted:
    """A scan of a directory's file names that counts how often it ran."""

    def __init__(self, root: Path) -> None:
        self.root, self.times = root, 0

    def __call__(self, watch: Watch):
        self.times += 1
        watch.add(self.root)
        return {"name": Strings.pack(sorted(p.name for p in self.root.iterdir() if not p.name.startswith(".")))}, {}


def opened(root: Path, scan: Counted, **options: object) -> list[bytes]:
    return cached(root, "test", options, scan)["name"].all()


def test_scanned_once_and_again_when_a_file_comes_or_goes(tmp_path: Path) -> None:
    scan = Counted(tmp_path)
    (tmp_path / "a").touch()
    (tmp_path / FOLDER).mkdir()
    settle(tmp_path)
    assert opened(tmp_path, scan) == opened(tmp_path, scan) == [b"a"]
    assert scan.times == 1
    (tmp_path / "b").touch()
    settle(tmp_path)
    os.utime(tmp_path, ns=(0, tmp_path.stat().st_mtime_ns + 1))
    assert opened(tmp_path, scan) == opened(tmp_path, scan) == [b"a", b"b"]
    assert scan.times == 2
    (tmp_path / "a").unlink()
    assert opened(tmp_path, scan) == [b"b"]


def test_a_change_in_the_same_tick_as_the_scan_is_noticed(tmp_path: Path) -> None:
    scan = Counted(tmp_path)
    (tmp_path / "a").touch()
    assert opened(tmp_path, scan) == [b"a"]
    before = tmp_path.stat()
    (tmp_path / "b").touch()
    os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a coarse clock shows the same time
    assert opened(tmp_path, scan) == [b"a", b"b"]


def test_a_time_in_the_far_future_does_not_scan_for_ever(tmp_path: Path) -> None:
    scan = Counted(tmp_path)
    (tmp_path / FOLDER).mkdir()
    os.utime(tmp_path, (0, time.time() + 1e6))
    assert opened(tmp_path, scan) == opened(tmp_path, scan)
    assert scan.times == 1


def test_options_have_indexes_of_their_own_and_a_moved_folder_keeps_its(tmp_path: Path) -> None:
    root = tmp_path / "here"
    (root / FOLDER).mkdir(parents=True)
    settle(root)
    scan = Counted(root)
    assert opened(root, scan, size=1) == opened(root, scan, size=2) == opened(root, scan, size=1)
    assert scan.times == 2
    moved = root.rename(tmp_path / "there")
    scan = Counted(moved)
    opened(moved, scan, size=1)
    assert scan.times == 0


def test_where_nothing_may_be_written_the_cache_directory_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    (root / FOLDER).touch()  # a file where the folder should be: not even root can write an index into it
    settle(root)
    scan = Counted(root)
    assert opened(root, scan) == opened(root, scan)
    assert scan.times == 1
    assert list((tmp_path / "cache" / "trainyard").rglob("*.index"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert opened(root, scan) == []  # nowhere at all: it works, and costs a scan
    assert scan.times == 2


def test_a_broken_index_is_made_anew(tmp_path: Path) -> None:
    scan = Counted(tmp_path)
    (tmp_path / FOLDER).mkdir()
    settle(tmp_path)
    opened(tmp_path, scan)
    (index,) = (tmp_path / FOLDER).iterdir()
    index.write_bytes(index.read_bytes()[:-100])
    opened(tmp_path, scan)
    assert scan.times == 2
    assert [p.name for p in (tmp_path / FOLDER).iterdir()] == [index.name]  # no temporary files left


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the cached index of a million files (which need not exist)."""
    root = tmp_path_factory.mktemp("million")
    (root / FOLDER).mkdir()
    settle(root)
    cached(root, "test", {}, scan_million)
    return root


def scan_million(watch: Watch):
    watch.add(watch.directory)
    names = Strings.pack(b"class_%04d/image_%08d.jpg" % (i % 1000, i) for i in range(ROWS))
    return {"path": names, "label": np.arange(ROWS, dtype=np.int32) % 1000, "size": np.full(ROWS, 100_000)}, {}


def test_opening_a_million_rows_costs_less_than_reading_their_file(million: Path) -> None:
    def fail(_: Watch):
        raise AssertionError("scanned again")

    path = cached(million, "test", {}, fail).path
    assert path is not None
    opening, reading = [], []
    for _ in range(5):
        start = time.perf_counter()
        cached(million, "test", {}, fail)
        opening.append(time.perf_counter() - start)
        start = time.perf_counter()
        path.read_bytes()
        reading.append(time.perf_counter() - start)
    assert sorted(opening)[2] <= thresholds.INDEX_OPEN_OVER_READ * sorted(reading)[2]


def test_a_worker_that_reads_every_row_does_not_grow(million: Path) -> None:
    code = f"""
import os, pickle, random, sys
from pathlib import Path
from trainer.data.index import cached
table = cached(Path({str(million)!r}), "test", {{}}, None)

def resident():  # all that this process holds, shared with its parent or not
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def walk(table):
    before = resident()
    for i in range(0, {ROWS}, 7):
        table["path"][i], int(table["label"][i])
    print((resident() - before) / {ROWS}, flush=True)

pid = os.fork()
if pid == 0:
    walk(table)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
before = resident()
walk(pickle.loads(pickle.dumps(table)))  # as a spawned worker does
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    forked, spawned = (float(line) for line in done.stdout.split())
    assert forked <= thresholds.INDEX_BYTES_PER_SAMPLE
    assert spawned <= thresholds.INDEX_BYTES_PER_SAMPLE
