"""All ranks stop at the same boundary, soon, whoever is told and however fast the steps are."""

from __future__ import annotations

import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranks import run_ranks, steps, torchrun_environments
from tests.thresholds import STOP_SECONDS, VOTE_SECONDS_PER_STEP
from trainer import watchdog
from trainer.distributed import World
from trainer.errors import DistributedError
from trainer.vote import Ballot, StopVote
from trainer.watchdog import Pulse


class Table:
    """An all-reduce between threads."""

    def __init__(self, size: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(size)]
        self.barrier = threading.Barrier(size)

    def exchange(self, rank: int, row: list[int]) -> list[int]:
        self.rows[rank] = row
        self.barrier.wait(20)
        maxima = [max(column) for column in zip(*self.rows, strict=True)]
        self.barrier.wait(20)
        return maxima


class NoStore:
    """Nobody fails here."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        raise AssertionError(desired)

    def set(self, key: str, value: str, /) -> None:
        raise AssertionError(key)

    def check(self, keys: list[str], /) -> bool:
        return False

    def get(self, key: str, /) -> bytes:
        raise AssertionError(key)


def scenario(size: int, boundaries: int, told: dict[int, tuple[int, int]], pause: float, in_step: bool, seed: int):
    """Ranks as threads; rank r is told `told[r] = (boundary, reason)`. Returns where and why each stopped, and how far the foremost was."""
    table, collective = Table(size), threading.Barrier(size)
    ended: list[tuple[int, int]] = [(-1, -1)] * size
    here = [0] * size
    foremost: list[int] = []

    def rank(r: int) -> None:
        pulse = Pulse(lambda row: table.exchange(r, row), NoStore(), r, ["here"] * size, timeout=20)
        flag, draw = [0], random.Random(seed * size + r)
        vote = StopVote(World(r, size, pulse=pulse), lambda: flag[0])
        pulse.start()
        reason = 0
        for boundary in range(1, boundaries + 1):
            here[r] = boundary
            if pause:
                time.sleep(pause * draw.random())
            if in_step:
                collective.wait(20)
            if told.get(r, (0, 0))[0] == boundary:
                flag[0] = told[r][1]
                foremost.append(max(here))
            if reason := vote.poll(boundary):
                break
        ended[r] = (here[r], reason)
        pulse.leave()

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank waits for ever"
    return ended, min(foremost, default=0)


@settings(max_examples=60)
@given(
    data=st.data(), size=st.integers(1, 4), boundaries=st.integers(1, 400), pause=st.sampled_from([0, 1e-4, 1e-3]), in_step=st.booleans()
)
def test_every_rank_stops_at_the_same_boundary(data, size, boundaries, pause, in_step):
    who = data.draw(st.lists(st.integers(0, size - 1), unique=True))
    told = {r: (data.draw(st.integers(1, boundaries)), data.draw(st.integers(1, 5))) for r in who}
    patch = pytest.MonkeyPatch()
    patch.setattr(watchdog, "INTERVAL", 0.002)
    with patch.context():
        ended, foremost = scenario(size, boundaries, told, pause, in_step, seed=data.draw(st.integers(0, 99)))
    patch.undo()
    assert len(set(ended)) == 1, ended
    boundary, reason = ended[0]
    if reason == 0:
        assert boundary == boundaries  # nobody told, or too late to matter
    else:
        assert reason in [given for _, given in told.values()]
        assert boundary >= foremost  # not in the past of any rank


def test_a_rank_on_its_own_stops_where_it_is_told():
    flag = [0]
    vote = StopVote(World(), lambda: flag[0])
    assert [vote.poll(1), vote.poll(2)] == [0, 0]
    flag[0] = 4
    assert [vote.poll(3), vote.poll(4)] == [4, 4]


@pytest.mark.parametrize(("seconds", "count"), [(0.0, 1_000_000), (0.02, 1000), (0.5, 60)], ids=["as fast as they go", "20 ms", "0.5 s"])
def test_ranks_of_their_own_stop_together_in_time(seconds, count, tmp_path):
    at = 3 if seconds >= 0.5 else 50
    ranks = run_ranks(steps, torchrun_environments(3), tmp_path, count, seconds, "SIGUSR1", at)
    assert [r.code for r in ranks] == [0, 0, 0], ranks
    assert {r.value["reason"] for r in ranks} == {2}
    assert len({r.value["step"] for r in ranks}) == 1
    took = max(r.value["stopped"] for r in ranks) - ranks[1].value["told"]
    assert took < STOP_SECONDS, f"{took:.2f} s after the signal, at step {ranks[0].value['step']}"


def test_polling_costs_next_to_nothing():
    ballot = Ballot()
    best = min(_seconds(ballot) for _ in range(5))
    assert best < VOTE_SECONDS_PER_STEP


def _seconds(ballot: Ballot, count: int = 20_000) -> float:
    started = time.perf_counter()
    for _ in range(count):
        ballot.arrive()
    return (time.perf_counter() - started) / count


def test_a_rank_that_waits_for_the_others_gives_up_when_they_are_gone():
    ballot = Ballot()
    ballot.hear(reason=1, foremost=0, refused=0)
    threading.Timer(0.1, ballot.abandon, ["rank 1 is gone"]).start()
    with pytest.raises(DistributedError, match="rank 1 is gone"):
        ballot.arrive()
