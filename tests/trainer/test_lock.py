"""One writer per directory: a live one is never displaced, a dead one never blocks, and of several heirs one inherits."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.errors import ConfigError, StorageError
from trainer.lock import STALE_SECONDS, Busy, Holder, Lock, _create_whole, live_holder

fork = multiprocessing.get_context("fork")


def plant(directory: Path, generation: int = 1, *, age: float = 0.0, **changes) -> Path:
    """A lock as another process would have left it."""
    path = directory / f".lock-{generation:06d}"
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(Holder.this_process(), **changes))))
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def dead_process() -> tuple[int, int]:
    """Number and start of a process that is no more."""
    child = subprocess.Popen(["sleep", "60"])
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    child.kill()
    child.wait()
    return child.pid, started


def test_a_second_writer_is_told_who_the_first_is_and_what_to_do(tmp_path):
    Lock(tmp_path).acquire()
    with pytest.raises(Busy) as refused:
        Lock(tmp_path).acquire()
    assert isinstance(refused.value, ConfigError) and refused.value.exit_code == 2
    assert str(os.getpid()) in str(refused.value) and "resume=never" in str(refused.value)


def test_a_released_lock_is_free_and_its_number_is_never_used_again(tmp_path):
    seen = set()
    for _ in range(3):
        lock = Lock(tmp_path)
        lock.acquire()
        assert lock.path not in seen and live_holder(tmp_path) == lock.holder
        seen.add(lock.path)
        lock.release()
        assert live_holder(tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 1  # the spent ones are cleared away


def test_a_dead_holder_of_this_host_is_replaced_at_once_and_aloud(tmp_path, caplog):
    pid, started = dead_process()
    plant(tmp_path, pid=pid, started=started)
    Lock(tmp_path).acquire()
    assert str(pid) in caplog.text and "gone" in caplog.text


def test_a_process_number_used_again_is_not_the_holder(tmp_path):
    plant(tmp_path, started=Holder.this_process().started - 1)  # our own number, another life
    Lock(tmp_path).acquire()


def test_a_zombie_is_dead(tmp_path):
    child = subprocess.Popen(["true"])
    deadline = time.monotonic() + 10
    while "Z" not in Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    plant(tmp_path, pid=child.pid, started=started)
    Lock(tmp_path).acquire()
    child.wait()


@pytest.mark.parametrize(("age", "free"), [(0, False), (STALE_SECONDS / 2, False), (STALE_SECONDS + 30, True)])
def test_a_holder_on_another_host_is_judged_by_its_silence(tmp_path, age, free):
    plant(tmp_path, age=age, host="elsewhere", machine="another boot", pid=1)
    if free:
        Lock(tmp_path).acquire()
    else:
        with pytest.raises(Busy, match="elsewhere"):
            Lock(tmp_path).acquire()


def test_a_requeued_job_takes_over_from_its_own_former_life(tmp_path, monkeypatch):
    plant(tmp_path, host="elsewhere", machine="another boot", job_id="77", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(Busy):  # the same incarnation: another rank's mistake, not a requeue
        Lock(tmp_path).acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Lock(tmp_path).acquire()


def test_a_file_that_its_writer_never_finished_blocks_only_for_a_while(tmp_path):
    (tmp_path / ".lock-000001").touch()
    with pytest.raises(Busy):
        Lock(tmp_path).acquire()
    os.utime(tmp_path / ".lock-000001", (0, 0))
    Lock(tmp_path).acquire()


def test_a_late_linker_below_the_highest_withdraws(tmp_path):
    plant(tmp_path, 5, host="elsewhere", machine="another boot")
    lock = Lock(tmp_path)
    assert not lock._link(3)  # as after a stale directory listing
    assert [p.name for p in tmp_path.iterdir()] == [".lock-000005"]


def test_the_displaced_holder_notices_and_leaves_the_new_one_alone(tmp_path):
    lock = Lock(tmp_path)
    lock.acquire()
    lock.beat()
    heir = plant(tmp_path, 2, token="another")
    with pytest.raises(StorageError, match="taken over"):
        lock.beat()
    lock.release()
    assert not json.loads(heir.read_text())["released"]


def test_without_hard_links_a_lock_is_still_exclusive(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert _create_whole(tmp_path / "x", b"1")
    assert not _create_whole(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"1"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def _race(directory: Path, start, results) -> None:
    start.wait()
    lock = Lock(directory)
    try:
        lock.acquire()
    except Busy:
        results.put(None)
    else:
        results.put(os.getpid())
        time.sleep(0.3)  # hold it until all the others have tried


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 on; these children only lock
@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_race_for_a_dead_holders_lock_exactly_one_wins(tmp_path, links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    pid, started = dead_process()
    for round_number in range(8):
        directory = tmp_path / str(round_number)
        directory.mkdir()
        plant(directory, pid=pid, started=started)
        start, results = fork.Event(), fork.Queue()
        racers = [fork.Process(target=_race, args=(directory, start, results)) for _ in range(6)]
        for racer in racers:
            racer.start()
        start.set()
        won = [w for w in (results.get(timeout=30) for _ in racers) if w]
        for racer in racers:
            racer.join()
        assert len(won) == 1, f"{won} all believe that they are the only writer"


def test_a_killed_holder_is_replaced(tmp_path):
    code = f"import time, pathlib; from trainer.lock import Lock; Lock(pathlib.Path({str(tmp_path)!r})).acquire(); print('held', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(Busy):
        Lock(tmp_path).acquire()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    Lock(tmp_path).acquire()
