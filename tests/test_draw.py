"""Random search: what is drawn lies where it was asked for, and a longer search begins with the shorter one."""

from __future__ import annotations

import math

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from scipy import stats

from tests.thresholds import CHANCE
from trainer.errors import ConfigError
from trainer.launch.draw import drawn
from trainer.launch.jobs import plan

RATE = "optimizer.lr=tag(log,interval(1e-4,1e-1))"


def rows(*lines: str) -> list[list[str]]:
    return drawn(lines, OverridesParser.create())[1]


def values(*lines: str) -> list[float]:
    return [float(row[0].partition("=")[2]) for row in rows(*lines)]


def test_values_are_spread_as_asked() -> None:
    """Kolmogorov and Smirnov find nothing wrong with 400 draws."""
    logs = [math.log10(v) for v in values("+sweep.random=400", RATE)]
    assert stats.kstest(logs, stats.uniform(-4, 3).cdf).pvalue > CHANCE
    flat = values("+sweep.random=400", "model.drop_rate=interval(0.0,0.5)")
    assert stats.kstest(flat, stats.uniform(0, 0.5).cdf).pvalue > CHANCE
    assert all(0.0 <= v <= 0.5 and len(repr(v)) <= 10 for v in flat)


def test_whole_numbers_stay_whole() -> None:
    assert sorted(rows("+sweep.random=5", "loop.epochs=int(interval(1,5))")) == [[f"loop.epochs={i}"] for i in range(1, 6)]
    assert all(row[0].split("=")[1].isdigit() for row in rows("+sweep.random=20", "loop.batch_size=int(tag(log,interval(1,1000)))"))


def test_choices_and_ranges() -> None:
    assert {row[0] for row in rows("+sweep.random=3", "optimizer=adamw,sgd,lamb")} == {"optimizer=adamw", "optimizer=sgd", "optimizer=lamb"}
    assert {row[0] for row in rows("+sweep.random=4", "loop.epochs=range(2,10,2)")} == {f"loop.epochs={i}" for i in (2, 4, 6, 8)}


def test_a_longer_search_begins_with_the_shorter() -> None:
    axes = [RATE, "model.drop_rate=0,0.1,0.2"]
    assert rows("+sweep.random=40", *axes)[:20] == rows("+sweep.random=20", *axes)
    assert [row[0] for row in rows("+sweep.random=20", *axes)] == [row[0] for row in rows("+sweep.random=20", RATE)], (
        "whatever else is drawn"
    )
    assert rows("+sweep.random=20", "+sweep.random_seed=1", *axes) != rows("+sweep.random=20", *axes)


def test_every_draw_has_every_seed() -> None:
    planned = plan(["+sweep.random=3", RATE, "model.drop_rate=0,0.1", "experiment=three_seeds"])
    assert planned is not None and len(planned.jobs) == 9
    assert [job.run.seed for job in planned.jobs] == [42, 195, 335] * 3
    groups = [job.group for job in planned.jobs]
    assert groups[0] == groups[1] == groups[2] != groups[3] and set(groups[0]) == {"optimizer.lr", "model.drop_rate"}
    assert [job.run.optimizer.lr for job in planned.jobs] == [group["optimizer.lr"] for group in groups]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["+sweep.random=3"], "has nothing to draw"),
        (["+sweep.random=many", RATE], "must be a whole number, >= 1"),
        (["+sweep.random=0", RATE], "must be a whole number, >= 1"),
        (["+sweep.random_seed=3", "seed=1,2"], r"is for sweep\.random, which is not there"),
        (["+sweep.random=3", "optimizer=adamw,sgd"], r"more than the 2 different jobs that there are\n.*\+sweep\.random=2"),
        (["+sweep.random=3", "optimizer.lr=interval(1e-1,1e-4)"], "the lower end comes first"),
        (["+sweep.random=3", "optimizer.lr=tag(log,interval(0.0,1.0))"], "both ends are positive"),
        (["+sweep.random=3", RATE, "+sweep.zip=[optimizer.lr,seed]"], r"cannot go with sweep\.random"),
        ([RATE], r"is a range to be searched: say how many jobs are to be drawn\n.*\+sweep\.random=20"),
        (["+sweep.random=3", "optimizer.lrr=interval(0.1,0.2)"], "there is no such key"),
    ],
)
def test_what_cannot_be_drawn(lines: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(lines)
