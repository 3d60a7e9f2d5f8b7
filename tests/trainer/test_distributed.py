"""Ranks find one another however they were started, speak truly, and when one fails all end: with one code, and saying why."""

from __future__ import annotations

import math
import os
import re
import socket
import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import collectives, distributed, run_ranks, slurm_environments, steps, steps_beside_a_slow_rank, torchrun_environments
from tests.thresholds import FAILURE_SECONDS
from trainer.distributed import _Facts, _share_of_cores, is_communication, open_world
from trainer.errors import DistributedError
from trainer.surroundings import Surroundings, expand_nodelist, ranks_to_start, surroundings, tasks_per_node, usable_cores, visible_gpus

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_NTASKS": "6", "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu[08-10]", "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_around(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_")) or name in TORCHRUN:
            monkeypatch.delenv(name)


# What surrounds a process


def test_a_process_on_its_own():
    assert surroundings({}) == Surroundings()


def test_torchrun_tells_a_rank_its_place():
    here = surroundings(TORCHRUN)
    assert (here.launcher, here.rank, here.size, here.local_rank, here.local_size, here.address) == ("torchrun", 3, 4, 1, 2, "10.0.0.1")
    assert here.ports == () and not here.is_main


def test_a_slurm_step_tells_a_rank_its_place():
    here = surroundings(STEP)
    assert (here.launcher, here.rank, here.size, here.local_rank, here.local_size, here.address) == ("slurm", 5, 6, 1, 2, "gpu08")
    others = surroundings(STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"})
    assert (here.ports, here.job) == (others.ports, others.job) and len(set(here.ports)) == len(here.ports) > 1
    assert all(1024 < port < 32768 for port in here.ports)


@pytest.mark.parametrize("change", [{"SLURM_JOB_ID": "18"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}])
def test_another_job_step_or_attempt_meets_elsewhere(change):
    assert surroundings(STEP | change).job != surroundings(STEP).job
    assert surroundings(STEP | change).ports != surroundings(STEP).ports


def test_a_batch_script_is_one_process_whatever_the_job_has():
    """sbatch sets these for its script too, which runs once; only srun starts one process a task."""
    assert surroundings({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}).size == 1


def test_torchrun_inside_a_slurm_step_wins():
    assert surroundings(STEP | TORCHRUN).launcher == "torchrun"


def test_submitit_on_this_host():
    env = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_GLOBALID": "1",
        "SUBMITIT_LOCAL_LOCALID": "1",
        "SUBMITIT_LOCAL_JOB_ID": "99",
    }
    here = surroundings(env)
    assert (here.launcher, here.rank, here.size, here.local_rank, here.address) == ("submitit", 1, 2, 1, "127.0.0.1")


@pytest.mark.parametrize(
    ("change", "named"), [({"WORLD_SIZE": None}, "WORLD_SIZE"), ({"RANK": "x"}, "RANK='x'"), ({"RANK": "4"}, "RANK=4"), ({"MASTER_PORT": None}, "MASTER_PORT")]
)  # fmt: skip
def test_half_an_environment_is_named(change, named):
    env = {k: v for k, v in (TORCHRUN | change).items() if v is not None}
    with pytest.raises(DistributedError, match=named):
        surroundings(env)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [  # as `scontrol show hostnames` prints them
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-10,3],login", ["node08", "node09", "node10", "node3", "login"]),
        ("rack[1-2]n[1,3]", ["rack1n1", "rack1n3", "rack2n1", "rack2n3"]),
        ("a-b[1]-ib,c.d.e", ["a-b1-ib", "c.d.e"]),
    ],
)
def test_host_lists(text, hosts):
    assert expand_nodelist(text) == hosts


@given(st.lists(st.integers(0, 999), min_size=1, unique=True))
def test_a_range_of_hosts_holds_what_went_into_it(numbers):
    assert expand_nodelist(f"n[{','.join(f'{n:03d}' for n in numbers)}]") == [f"n{n:03d}" for n in numbers]


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]


def test_how_many_ranks_to_start(monkeypatch):
    cfg = distributed()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    visible_gpus.cache_clear()
    assert ranks_to_start(cfg) == 1
    cfg.processes = 3
    assert ranks_to_start(cfg) == 3
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert ranks_to_start(cfg) == 1  # this is one of them


@pytest.mark.parametrize(
    ("cpus", "granted", "share"),
    [
        ([[0, 1, 2, 3], [0, 1, 2, 3]], math.inf, 2),  # shared by all
        ([[0, 1], [2, 3]], 4, 2),  # bound, as srun does
        ([[0, 1, 2, 3], [2, 3]], math.inf, 3),  # half of two, and two alone
        ([[0]] * 3, 0.5, 1),  # never none
        ([list(range(64))] * 2, 8, 4),  # a container grants less than the affinity shows
    ],
)
def test_ranks_of_a_host_share_its_cores(cpus, granted, share):
    facts = [_Facts("here", c, granted, None) for c in cpus]
    assert _share_of_cores([*facts, _Facts("elsewhere", cpus[0], granted, None)], 0) == share


# Meeting and speaking


def test_one_rank_has_no_group_and_no_thread():
    threads = threading.active_count()
    x = torch.ones(2)
    with open_world(distributed(), cuda=False) as world:
        assert not dist.is_initialized() and threading.active_count() == threads
        assert world.sum(x) is x and world.sums([x])[0] is x
        assert world.gather("a") == ["a"] and world.broadcast(7) == 7
        world.barrier()
    assert (world.rank, world.size, world.is_main, world.pulse) == (0, 1, True, None)


@pytest.mark.parametrize("environments", [torchrun_environments, slurm_environments])
def test_what_ranks_say_to_one_another(environments, tmp_path):
    ranks = run_ranks(collectives, environments(3), tmp_path)
    assert [r.code for r in ranks] == [0, 0, 0], ranks
    for i, facts in enumerate(r.value for r in ranks):
        assert facts["place"] == (i, 3, i, 3, i == 0, "cpu")
        assert facts["sum"] == [[3.0, 3.0], [3.0, 3.0]] and facts["kept"] == [[float(i)] * 2] * 2
        assert facts["sums"] == [[[3.0, 3.0], [3.0, 3.0]], [3 * 2**53 + 3], [6.0, 6.0], 3]
        assert facts["gather"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert facts["broadcast"] == "from 0"
        assert facts["threads"] == (max(1, usable_cores() // 3), 1)  # OMP_NUM_THREADS=1


def test_strangers_on_the_ports_of_a_slurm_step_do_no_harm(tmp_path):
    """One that says nothing, and one that answers nonsense."""
    environments = slurm_environments(2, job=4712)
    silent, rude = (socket.create_server(("127.0.0.1", port)) for port in surroundings(environments[0]).ports[:2])

    def answer() -> None:
        while True:
            try:
                connection, _ = rude.accept()
            except OSError:
                return
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

    threading.Thread(target=answer, daemon=True).start()
    with silent, rude:
        ranks = run_ranks(collectives, environments, tmp_path)
    assert [r.code for r in ranks] == [0, 0], ranks


def test_no_free_port_is_an_error_that_says_so(tmp_path):
    environments = slurm_environments(2, job=4713)
    taken = [socket.create_server(("", port)) for port in surroundings(environments[0]).ports]
    try:
        (rank,) = run_ranks(collectives, environments[:1], tmp_path)
    finally:
        for server in taken:
            server.close()
    assert rank.code == 6 and "ports" in rank.output and str(surroundings(environments[0]).ports[0]) in rank.output


def test_a_taken_master_port_is_an_error_that_says_so(tmp_path):
    with socket.create_server(("", 0)) as server:
        (rank,) = run_ranks(collectives, torchrun_environments(2, server.getsockname()[1])[:1], tmp_path)
    assert rank.code == 6 and "MASTER_PORT" in rank.output


def test_a_rank_that_never_comes_is_named(tmp_path):
    ranks = run_ranks(steps, torchrun_environments(3)[:2], tmp_path, 1, 0.0, "", 0, 2.0)
    assert [r.code for r in ranks] == [6, 6]
    assert all("for rank 2 to start" in r.output for r in ranks)


# Failing


@pytest.mark.parametrize(
    ("what", "codes", "words"),
    [
        ("raise", [3, 3, 3], "rank 1 of 3 failed: DataError: a picture of rank 1 is torn"),
        ("bug", [1, 1, 1], "rank 1 of 3 failed: ZeroDivisionError: 1/0 on rank 1"),
        ("SIGKILL", [6, -9, 6], "rank 1 on .* is gone without a word"),
        ("hang", [6, 6, 6], "rank 1 on .* has finished no step for 2 s"),
        ("SIGSTOP", [6, -9, 6], "rank 1 on .* has not answered for 2 s"),  # frozen: not even its watchdog lives. -9: the test's own broom
    ],
)
def test_when_one_rank_fails_all_end_with_its_code_and_say_why(what, codes, words, tmp_path):
    timeout = 2.0 if what in ("hang", "SIGSTOP") else 30.0
    ranks = run_ranks(
        steps,
        torchrun_environments(3),
        tmp_path,
        10_000,
        0.01,
        what,
        5,
        timeout,
        timeout=FAILURE_SECONDS,
        frozen=1 if what == "SIGSTOP" else None,
    )
    assert [r.code for r in ranks] == codes, ranks
    for rank, outcome in enumerate(ranks):
        if what == "SIGSTOP" and rank == 1:
            continue
        assert outcome.seconds < FAILURE_SECONDS
        if rank != 1:
            assert re.search(words, outcome.output), outcome.output
        if outcome.code == 6:
            assert "Stacks of process" in outcome.output and "most recent call first" in outcome.output
    if what == "hang":
        assert "in steps" in ranks[1].output  # where it hangs


def test_the_rank_that_holds_the_store_stays_until_the_others_know_why(tmp_path):
    ranks = run_ranks(steps_beside_a_slow_rank, torchrun_environments(3), tmp_path, 10_000, 0.01, "hang", 5, 2.0, timeout=FAILURE_SECONDS)
    assert [r.code for r in ranks] == [6, 6, 6], ranks
    assert "rank 1 on" in ranks[2].output and "has finished no step" in ranks[2].output, ranks[2].output


def test_only_errors_of_communication_are_taken_for_such():
    assert is_communication(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:6284"))
    assert is_communication(dist.DistNetworkError("The client socket has timed out"))
    assert not is_communication(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_communication(ValueError("gloo"))
