"""Ranks on one host start, are signalled, fail and end as one, and none is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import SERVER, free_port
from tests.thresholds import FAILURE_SECONDS
from trainer.launch import local
from trainer.launch.local import LocalRanks
from trainer.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
PUPPET = ROOT / "tests" / "puppet.py"


class Launch:
    """A launcher in a process of its own."""

    def __init__(
        self,
        directory: Path,
        *what: str,
        processes: int = 2,
        restarts: int = 0,
        command: list[str] | None = None,
        patience: float | None = None,
    ) -> None:
        self.directory = directory
        command = command or [sys.executable, str(PUPPET), str(directory), *what]
        self.process = SERVER.Process(target=_launch, args=(str(directory), processes, restarts, command, patience))
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    def wait_for(self, name: str, ranks: int = 2, attempt: int = 0) -> None:
        end = time.monotonic() + 60
        while not all((self.directory / f"{name}.{rank}.{attempt}").exists() for rank in range(ranks)):
            assert self.process.is_alive() and time.monotonic() < end, self.output()
            time.sleep(0.02)

    def tell(self, *numbers: int, pause: float = 0.0) -> None:
        for number in numbers:
            os.kill(self.pid, number)
            time.sleep(pause)

    def code(self) -> int | None:
        self.process.join(90)
        if self.process.is_alive():
            self.process.kill()
        return self.process.exitcode

    def read(self, name: str, rank: int, attempt: int = 0) -> str:
        return (self.directory / f"{name}.{rank}.{attempt}").read_text()

    def output(self) -> str:
        return (self.directory / "launcher.txt").read_text()

    def pids(self, ranks: int = 2, attempt: int = 0) -> list[int]:
        return [int(self.read("pid", rank, attempt)) for rank in range(ranks)]


def _launch(directory: str, processes: int, restarts: int, command: list[str], patience: float | None) -> None:
    with open(f"{directory}/launcher.txt", "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if patience is not None:
        local.PATIENCE = dict.fromkeys(local.PATIENCE, patience)
    os.environ["OMP_NUM_THREADS"] = "1"
    code = local.start_local_ranks(directory, processes, restarts, command=command)
    sys.stdout.flush()
    os._exit(code)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def end_of(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_every_rank_is_told_its_place_and_rank_0_has_the_terminal(tmp_path):
    launch = Launch(tmp_path, "exit 0", processes=3)
    assert launch.code() == 0, launch.output()
    for rank in range(3):
        env = dict(line.split("=", 1) for line in launch.read("env", rank).splitlines() if "=" in line)
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == (str(rank), str(rank), "3", "3")
        assert env["MASTER_ADDR"] == "127.0.0.1" and 1024 < int(env["MASTER_PORT"]) < 65536
    assert launch.output().strip() == "rank 0 says hello"  # not a word of ours
    assert (tmp_path / "train.rank2.log").read_text() == "rank 2 says hello\n"


@pytest.mark.parametrize(
    ("codes", "sent", "killed_by_us", "verdict"),
    [
        ([0, 0], [], [], 0),
        ([3, 3], [], [], 3),
        ([6, 3], [], [], 3),  # 6 lost the one that had bad data
        ([6, 1], [], [], 1),
        ([75, 75], ["SIGTERM"], [], 75),
        ([130, 130], ["SIGINT"], [], 130),
        ([6, -9], [], [], 6),  # out of memory
        ([-11, 6], [], [], 6),
        ([-15, -15], ["SIGTERM"], [], 75),  # told before they had begun
        ([-2, 130], ["SIGINT"], [], 130),
        ([-15, 6], ["SIGTERM"], [], 6),
        ([3, -9], [], [1], 3),
        ([75, -9], ["SIGTERM"], [1], 75),
        ([0, -9], [], [1], 6),  # one never came to its end
        ([6, 6], [], [], 6),
        ([2, 2], [], [], 2),
    ],
)  # fmt: skip
def test_the_code_of_all_is_the_code_of_the_cause(codes, sent, killed_by_us, verdict, tmp_path):
    for order in (1, -1):  # whichever is noticed first
        ranks = LocalRanks(["-"], RunDirectory(tmp_path), tmp_path)
        ranks.codes = dict(list(enumerate(codes))[::order])
        ranks.sent = [getattr(signal, name) for name in sent]
        ranks._stopped = set(killed_by_us)
        assert ranks.verdict() == verdict


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_rank_once_and_there_is_time_to_save(number, code, tmp_path):
    launch = Launch(tmp_path, "stop", restarts=3)
    launch.wait_for("ready")
    launch.tell(number)
    assert launch.code() == code, launch.output()
    assert [launch.read("got", rank) for rank in range(2)] == [number.name] * 2
    assert (tmp_path / "saved.1.0").exists()  # 1 s after the other rank had ended
    assert not (tmp_path / "pid.0.1").exists()  # and not started again
    assert local.PATIENCE["ended"] > 30  # what torch's own launcher would have given it


@pytest.mark.parametrize("number", local.FORWARDED)
def test_each_signal_of_a_stop_is_passed_on(number, tmp_path):
    class Process:
        def __init__(self) -> None:
            self.got: list[int] = []

        def send_signal(self, number: int) -> None:
            self.got.append(number)

    ranks = LocalRanks(["-"], RunDirectory(tmp_path), tmp_path)
    processes = [Process(), Process()]
    ranks.processes = processes  # pyright: ignore[reportAttributeAccessIssue]
    before = signal.getsignal(number)
    with ranks.forwarding():
        os.kill(os.getpid(), number)
    assert [process.got for process in processes] == [[number], [number]]
    assert signal.getsignal(number) is before


def test_signals_before_the_ranks_are_ready_stop_them_too(tmp_path):
    launch = Launch(tmp_path, "unprepared", restarts=3)
    launch.wait_for("ready")
    launch.tell(signal.SIGTERM)
    assert launch.code() == 75, launch.output()
    assert end_of(launch.pids(), 1)


def test_a_second_ctrl_c_ends_ranks_that_do_not_listen(tmp_path):
    launch = Launch(tmp_path, "endless", patience=1.0)
    launch.wait_for("ready")
    launch.tell(signal.SIGINT, signal.SIGINT, pause=0.5)
    assert launch.code() == 130, launch.output()
    assert end_of(launch.pids(), 1)


def test_the_rank_that_failed_is_named_with_the_end_of_its_log(tmp_path):
    (tmp_path / "train.rank1.log").write_text("an earlier run\n")
    launch = Launch(tmp_path, "complain")
    assert launch.code() == 1
    assert "rank 1 of 2 ended with exit code 1" in launch.output()
    assert "ValueError: this rank is not well" in launch.output() and "train.rank1.log" in launch.output()
    assert "an earlier run" not in launch.output()


def test_dead_ranks_are_started_again_as_often_as_allowed(tmp_path):
    launch = Launch(tmp_path, "die once", restarts=1)
    assert launch.code() == 0, launch.output()
    assert "rank 1 of 2 was killed by SIGKILL" in launch.output() and "starting all ranks again" in launch.output()
    again = tmp_path / "again"
    again.mkdir()
    launch = Launch(again, "die", restarts=1)
    assert launch.code() == 6, launch.output()
    assert (again / "pid.0.1").exists() and not (again / "pid.0.2").exists()


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_what_another_start_cannot_mend_is_not_started_again(code, tmp_path):
    launch = Launch(tmp_path, f"exit {code} 6", restarts=3)
    assert launch.code() == code, launch.output()
    assert not (tmp_path / "pid.0.1").exists()


def test_a_rank_that_hangs_after_anothers_failure_is_ended(tmp_path):
    launch = Launch(tmp_path, "hang", patience=1.0)
    assert launch.code() == 3, launch.output()
    assert end_of(launch.pids(), 1)
    assert local.PATIENCE["failed"] < FAILURE_SECONDS


@pytest.mark.parametrize("what", ["endless", "unprepared"])
def test_no_rank_outlives_a_killed_launcher(what, tmp_path):
    """The puppets do not call `die_with_parent`; those of `trainer` do, as this one does in its own words."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['puppet', {str(tmp_path)!r}, {what!r}]\n"
               "from trainer.surroundings import die_with_parent; die_with_parent()\n"
               f"exec(compile(open({str(PUPPET)!r}).read(), 'puppet', 'exec'))"]  # fmt: skip
    launch = Launch(tmp_path, command=command)
    launch.wait_for("ready")
    launch.tell(signal.SIGKILL)
    assert end_of(launch.pids(), 5)


def test_ranks_of_torch_meet_again_after_one_has_died(tmp_path):
    """Torch's agent keeps the addresses of the dead."""
    launch = Launch(tmp_path, restarts=1, command=[sys.executable, "-m", "tests.ranks", "40", "0.01", "SIGKILL once", "20"])
    assert launch.code() == 0, launch.output()
    assert "attempt 1" in launch.output() and "'step': 39" in launch.output()


def test_no_rank_of_torch_outlives_a_killed_launcher(tmp_path):
    launch = Launch(tmp_path, command=[sys.executable, "-m", "tests.ranks", "100000", "0.01", "-", "-1"])
    log = tmp_path / "train.rank1.log"
    while not log.exists() or "rank 1 attempt 0" not in log.read_text():
        assert launch.process.is_alive(), launch.output()
        time.sleep(0.05)
    children = Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()
    assert len(children) == 2
    launch.tell(signal.SIGKILL)
    assert end_of([int(pid) for pid in children], 15)  # at the latest when torch is imported


def test_torchrun_on_two_nodes(tmp_path):
    """Two agents on this host, one rank each, told to stop through one rank."""
    port = free_port()
    agents = [
        SERVER.Process(
            target=_torchrun, args=(str(tmp_path / f"agent{i}.txt"), port, i == 0, ["-m", "tests.ranks", "2000", "0.01", "SIGUSR2", "10"])
        )
        for i in range(2)
    ]
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join(60)
    output = "".join((tmp_path / f"agent{i}.txt").read_text() for i in range(2))
    assert [agent.exitcode for agent in agents] == [0, 0], output
    said = [line for line in output.splitlines() if "'reason'" in line]
    assert len(said) == 2 and all("'reason': 3" in line for line in said), output
    assert len({line.split(",")[0] for line in said}) == 1  # the same step


def _torchrun(log: str, port: int, is_host: bool, program: list[str]) -> None:
    with open(log, "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    from torch.distributed.run import main

    main(
        [
            "--nnodes=2",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=test",
            f"--rdzv-conf=is_host={int(is_host)}",
            *program,
        ]
    )


def test_the_launcher_is_imported_without_torch():
    code = "import sys; import trainer.launch.local, trainer.surroundings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
