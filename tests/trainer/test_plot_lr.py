"""The drawing of a schedule shows the run's own numbers, and needs no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tasks  # noqa: F401  (importing registers the tasks' schemas)
from trainer.launch.compose import compose_run
from trainer.launch.plot_lr import length, main, moments, table


def test_writes_a_picture_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "lr.png"
    assert main(["scheduler=onecycle", "loop.epochs=3", "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert str(picture) in printed
    assert "first step" in printed
    assert "last step" in printed


@pytest.mark.parametrize("scheduler", ["cosine", "onecycle", "multistep"])
def test_the_table_holds_the_schedules_own_numbers(scheduler: str) -> None:
    run = compose_run(
        f"scheduler={scheduler}", "scheduler.warmup_epochs=1", "optimizer.lr=0.01", "optimizer.lr_scaling=linear", "optimizer.base_batch_size=128",
        "loop.batch_size=64", "loop.epochs=30",
    )  # fmt: skip
    total, per_epoch = length(run)
    schedule = run.scheduler.build(total, per_epoch)
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.e+-]+) +([\d.]+)", table(run, schedule, per_epoch), re.MULTILINE)
    steps = [int(step) for step, *_ in rows]
    assert steps == sorted(set(steps))
    assert {0, per_epoch, total - 1} <= set(steps)  # the ends and the end of the warm-up
    assert len(steps) < 16
    for step, epoch, rate, momentum in rows:
        assert float(rate) == pytest.approx(0.005 * schedule.factor(int(step)), rel=1e-4)
        assert float(epoch) == pytest.approx(int(step) / per_epoch, abs=0.01)
        assert float(momentum) == pytest.approx(schedule.momentum(int(step)) or 0.9, abs=1e-4)


def test_length_is_in_steps_where_the_run_is() -> None:
    run = compose_run("loop.steps=17", "loop.batch_size=64")
    assert length(run) == (17, 1438 // 64)


def test_a_run_shorter_than_an_epoch_is_shown_whole() -> None:
    run = compose_run("loop.steps=2", "scheduler=constant")
    assert [step for step, _ in moments(run.scheduler.build(2, 22), 22)] == [0, 1]


def test_needs_no_torch_and_a_bad_schedule_ends_with_2(tmp_path: Path) -> None:
    code = (
        "import sys; from trainer.__main__ import main\n"
        f"assert main(['plot-lr', 'loop.epochs=2', '--out', {str(tmp_path / 'a.png')!r}]) == 0\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(main(['plot-lr', 'loop.epochs=2', 'scheduler.warmup_epochs=3']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "scheduler.warmup_epochs" in done.stderr + done.stdout
