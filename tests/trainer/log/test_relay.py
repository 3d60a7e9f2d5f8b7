"""A sink may raise, hang or be too slow: it is reported once, and training neither waits nor stops."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from trainer.log.journal import Journal
from trainer.log.relay import Relay


class Memory:
    """A sink that remembers, and does what it is told at a step."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.hang = threading.Event()  # set it to let go
        self.raise_at = self.hang_at = -1
        self.abandoned = False

    def write(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self.raise_at:
            raise ConnectionError("the server said no\nand more")
        if row["step"] == self.hang_at:
            self.hang.wait(30)
        self.calls.append(row["step"])

    def images(self, step: int, paths: Sequence[Path]) -> None:
        self.calls.append([path.name for path in paths])

    def best(self, row: Mapping[str, Any]) -> None:
        self.calls.append(("best", row["step"]))

    def failed(self, why: str) -> None:
        self.calls.append(("failed", why))

    def close(self, state: str) -> None:
        self.calls.append(state)

    def abandon(self) -> None:
        self.abandoned = True
        self.hang.set()


def journal_with(directory: Path, *sinks: Memory, patience: float = 10, limit: int = 1000) -> Journal:
    relays = [
        Relay(f"sink {i}", lambda sink=sink: sink, f"advice {i}", patience=patience, abandon=sink.abandon, limit=limit)
        for i, sink in enumerate(sinks)
    ]
    return Journal(directory, relays=relays)


def write(journal: Journal, step: int) -> None:
    journal.write(step, step, step, {"train/loss": 1.0})


@pytest.mark.parametrize("csv", [True, False])
def test_sinks_get_everything_in_order(tmp_path: Path, csv: bool) -> None:
    first, second = Memory(), Memory()
    with journal_with(tmp_path, first, second) as journal:
        if not csv:
            journal.batches = journal.epochs = None
        journal.rewind(0)
        write(journal, 1)
        journal.epoch({"epoch": 1, "step": 1, "is_best": True})
        journal.images(1, [tmp_path / "a.png"])
        write(journal, 2)
    assert first.calls == second.calls == [1, ("best", 1), ["a.png"], 2, "completed"]


def test_a_sink_that_raises_is_reported_once_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Memory(), Memory()
    bad.raise_at = 2
    with caplog.at_level(logging.WARNING), journal_with(tmp_path, bad, good) as journal:
        for step in range(1, 6):
            write(journal, step)
    assert good.calls == [1, 2, 3, 4, 5, "completed"] and bad.calls == [1]
    (record,) = caplog.records
    assert "sink 0" in record.message and "the server said no" in record.message and "advice 0" in record.message


@pytest.mark.parametrize("kind", [ImportError, SystemExit])
def test_a_sink_that_cannot_be_opened_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[BaseException]) -> None:
    def fail() -> Memory:
        raise kind("No module named 'wandb'")

    with caplog.at_level(logging.WARNING), Journal(tmp_path, relays=[Relay("W&B", fail, "install it", patience=10)]) as journal:
        journal.rewind(0)
        write(journal, 1)
    assert [record.message for record in caplog.records] == [
        f"W&B failed ({kind.__name__}: No module named 'wandb'). The run goes on without it; install it"
    ]


def test_a_sink_that_hangs_holds_up_neither_training_nor_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = Memory()
    sink.hang_at = 1
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), journal_with(tmp_path, sink, patience=0.3) as journal:
        for step in range(1, 100):
            write(journal, step)
        assert time.monotonic() - began < 5
    assert time.monotonic() - began < 5 and sink.abandoned
    assert [record.message for record in caplog.records] == ["sink 0 did not finish within 0.3 s. The run goes on without it; advice 0"]


def test_a_sink_that_does_not_keep_up_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = Memory()
    sink.hang_at = 1
    with caplog.at_level(logging.WARNING), journal_with(tmp_path, sink, limit=50) as journal:
        for step in range(1, 200):
            write(journal, step)
        assert journal.relays[0].queue.qsize() <= 50
        sink.hang.set()
    (record,) = caplog.records
    assert "does not keep up" in record.message and sink.calls == [1, "completed"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 199


def test_a_slow_server_does_not_hold_up_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.log.journal.HEAD_START", 0.2)
    opens = threading.Event()

    def open_slowly() -> Memory:
        opens.wait(30)
        return sink

    sink = Memory()
    with Journal(tmp_path, relays=[Relay("slow", open_slowly, "", patience=10)]) as journal:
        began = time.monotonic()
        journal.rewind(0)
        write(journal, 1)
        assert time.monotonic() - began < 10
        opens.set()
    assert sink.calls == [1, "completed"]
