"""The benchmarks' harness: fair turns, honest verdicts. What is measured is not tested here, but that it would be told."""

from __future__ import annotations

import json
import statistics
import sys

import pytest

import benchmarks.rows
from benchmarks import table
from benchmarks.__main__ import main
from benchmarks.measure import Command, Race, Worker, race
from benchmarks.table import Effort, Line, at_least, at_most, limit

HERE = "tests.benchmarks.contenders"


def constant(name: str, value: float, **options: object) -> Worker:
    return Worker(name, f"{HERE}:constant", {"value": value, **options})


def test_each_contender_has_a_process_and_every_turn_in_every_round(tmp_path):
    journal = tmp_path / "journal"
    found = race([constant(name, value, journal=str(journal)) for name, value in (("a", 1), ("b", 2), ("c", 3))], rounds=6)
    assert found.times == {"a": [1.0] * 6, "b": [2.0] * 6, "c": [3.0] * 6}
    turns = [line.split() for line in journal.read_text().splitlines()]
    assert len({pid for _, pid in turns}) == 3
    assert len({value + pid for value, pid in turns}) == 3
    rounds = ["".join(value for value, _ in turns[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["123", "231", "312"] * 2  # nobody is always first


def test_a_ratio_is_taken_within_each_round():
    """The machine gets slower for both: a ratio of medians would hide which of them is faster."""
    found = Race({"a": [1.0, 3.0, 30.0], "b": [2.0, 2.0, 60.0]}, {})
    ratio = found.ratio("a", "b")
    assert (ratio.median, ratio.low, ratio.high) == (0.5, 0.5, 1.5)
    assert statistics.median(found.times["a"]) / statistics.median(found.times["b"]) == 1.5


def test_verdicts():
    found = Race({"a": [1.0, 1.0], "b": [2.0, 2.0]}, {"c": "no such package"})
    assert at_most(found, "a", "b", 0.5).passed is True
    assert at_most(found, "a", "b", 0.49).passed is False
    assert at_least(found, "a", "b", 0.5).passed is True
    assert at_least(found, "a", "b", 0.51).passed is False
    assert at_most(found, "a", "b", None).passed is None
    assert limit(found, "a", 1.0).passed is True
    assert limit(found, "a", 0.9).passed is False


@pytest.mark.parametrize(("function", "said"), [("missing", "a_package_that_nobody_has"), ("broken", "something gave way")])
def test_who_does_not_run_never_passes(function, said):
    found = race([constant("here", 1.0), Worker("gone", f"{HERE}:{function}")], rounds=2)
    for line in (at_most(found, "here", "gone", 9.0), at_least(found, "gone", "here", 0.0), limit(found, "gone", 9.0)):
        assert line.passed is False
        assert "absent" in line.note
        assert said in line.note
    assert found.times["here"] == [1.0, 1.0]  # the others are measured all the same


def test_peers_cannot_change_each_other_s_process():
    """Lightning sets this variable; it costs every optimizer step of its process 95 us."""
    found = race([Worker("x", f"{HERE}:environment", {"name": name}) for name in ("PYTORCH_NVML_BASED_CUDA_CHECK",)], rounds=1)
    assert found.times["x"] == [0.0]


def test_commands_are_judged_by_their_exit_code():
    fails, works = [sys.executable, "-c", "import sys; sys.exit('no such option')"], [sys.executable, "-c", ""]
    found = race([Command("fails", fails), Command("fails as it should", fails, exit_code=1), Command("works", works)], rounds=1)
    assert found.absent.keys() == {"fails"}
    assert "no such option" in found.absent["fails"]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict:
    benchmarks.rows.load()  # or `main` would be the first to, and the rows end in what is undone after the test
    monkeypatch.setattr(table, "ROWS", {})
    monkeypatch.setattr("benchmarks.__main__.ROWS", table.ROWS)
    return table.ROWS


def test_a_missed_target_fails_the_command_after_a_second_longer_look(rows, tmp_path, capsys):
    efforts = []

    @table.row("slow", "always too slow")
    def slow(effort: Effort):
        efforts.append(effort)
        yield at_most(Race({"a": [2.0], "b": [1.0]}, {}), "a", "b", 1.0)

    @table.row("lucky", "too slow only at first")
    def lucky(effort: Effort):
        yield at_most(Race({"a": [2.0 / effort.factor], "b": [1.0]}, {}), "a", "b", 1.0)

    assert main(["lucky"]) == 0
    assert main(["slow", "lucky", "--quick", "--json", str(tmp_path / "out.json")]) == 1
    assert [(e.quick, e.factor, e.rounds(full=10, quick=4)) for e in efforts] == [(True, 1, 4), (True, 3, 12)]
    printed = capsys.readouterr().out
    assert "1 of 2 targets met" in printed
    assert "MISSED slow: a against b, 2.000" in printed
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["rows"]["slow"][0]["ratio"]["median"] == 2.0
    assert saved["machine"]["packages"]["torch"]


def test_an_absent_peer_fails_the_command(rows):
    @table.row("alone", "nobody to compare with")
    def alone(effort: Effort):
        yield at_most(Race({"a": [1.0]}, {"b": "not installed"}), "a", "b", 1.0)

    assert main(["alone"]) == 1


def test_a_line_that_promises_nothing_is_not_counted(rows, capsys):
    @table.row("shown", "for information")
    def shown(effort: Effort):
        yield Line("a figure", "a peer")

    assert main([]) == 0
    assert "0 of 0 targets met" in capsys.readouterr().out
