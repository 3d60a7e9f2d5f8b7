"""The curves: which pictures a record gives, what is in them, and that drawing never disturbs the run."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from trainer.config import LoggerConfig, RunConfig
from trainer.log import course, draw, open_journal
from trainer.log.journal import Journal
from trainer.log.plots import Plotter

RUN = RunConfig(name="demo", version="s0", logger=LoggerConfig())


def write(directory: Path, steps: int, **more: float) -> None:
    with Journal(directory, csv=False) as journal:
        for step in range(1, steps + 1):
            scalars = {"train/loss": 100 / step**2, "train/top1": 1 - 1 / step, "train/lr": 1e-3 / step} | more
            journal.write(step, step / 10, step, {name.replace("__", "/"): value for name, value in scalars.items()})
            if step % 10 == 0:
                journal.write(step, step / 10, step, {"val/loss": 120 / step**2, "val/top1": 1 - 2 / step, "val/seconds": 0.1})


def curves_of(axis: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {str(line.get_label()): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axis.get_lines()}


def test_the_files(tmp_path: Path) -> None:
    write(tmp_path, 50)
    assert [path.name for path in draw.draw(tmp_path)] == ["loss.png", "metrics.png", "learning_rate.png", "time.png"]
    write(tmp_path, 50, train__momentum=0.9)
    assert {path.name for path in draw.draw(tmp_path)} == {path.name for path in (tmp_path / "plots").iterdir()} > {"momentum.png"}
    for path in (tmp_path / "plots").iterdir():
        with Image.open(path) as image:
            image.load()
            colors = image.convert("RGB").getcolors(1 << 24) or []
        assert image.size[0] > 600 and len(colors) > 20, f"{path.name} is empty"


def test_the_curves_are_the_record(tmp_path: Path) -> None:
    write(tmp_path, 50)
    curves, steps_per_epoch = draw.read_curves(tmp_path / "metrics.jsonl")
    assert steps_per_epoch == 10
    figure = draw.losses(curves)
    assert figure is not None
    (axis,) = figure.axes
    drawn = curves_of(axis)
    np.testing.assert_array_equal(drawn["training"][1], [100 / step**2 for step in range(1, 51)])
    np.testing.assert_array_equal(drawn["validation"][0], [10, 20, 30, 40, 50])
    assert axis.get_yscale() == "log", "from 100 to 0.04 on a linear axis is a line along the floor"
    figure = draw.metrics(curves)
    assert figure is not None
    (axis,) = figure.axes
    assert "best 96.00 %" in curves_of(axis)


def test_terms_of_the_loss_have_a_panel_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, 20, train__loss_box=1.0, train__loss_class=2.0)
    curves, _ = draw.read_curves(tmp_path / "metrics.jsonl")
    figure = draw.losses(curves)
    assert figure is not None
    assert list(curves_of(figure.axes[1])) == ["box", "class"]


def test_a_long_record_is_thinned_to_means(tmp_path: Path) -> None:
    steps = np.arange(1, 60_001, dtype=np.float64)
    values = np.sin(steps / 5000) + np.where(steps % 2 == 0, 0.5, -0.5)
    values[100] = math.nan
    figure = draw.losses({"train/loss": (steps, values)})
    assert figure is not None
    x, y = curves_of(figure.axes[0])["training"]
    assert len(x) == draw.POINTS
    np.testing.assert_allclose(y, np.sin(x / 5000), atol=0.01)


@pytest.mark.parametrize("rows", [0, 1])
def test_little_to_draw(tmp_path: Path, rows: int) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    write(tmp_path, rows)
    assert len(draw.draw(tmp_path)) == (3 if rows else 0)


def test_numbers_that_are_none_leave_gaps(tmp_path: Path) -> None:
    write(tmp_path, 20, train__loss=math.nan)
    assert len(draw.draw(tmp_path)) == 4


def test_a_run_ends_with_its_pictures(tmp_path: Path) -> None:
    with open_journal(tmp_path, RUN, True) as journal:
        journal.rewind(0)
        journal.write(1, 1, 1, {"train/loss": 1.0})
        journal.write(2, 2, 2, {"train/loss": 0.5})
    assert (tmp_path / "plots" / "loss.png").is_file()


def test_drawing_that_fails_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.log.plots.FLOOR", 0.05)
    (tmp_path / "plots").write_text("a file stands where the directory should be")
    with caplog.at_level(logging.WARNING), open_journal(tmp_path, RUN, True) as journal:
        journal.rewind(0)
        journal.write(1, 1, 1, {"train/loss": 1.0})
    (record,) = caplog.records
    assert "plots are not drawn" in record.message and "python -m trainer.log.draw" in record.message


def test_drawing_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path, 3)
    code = "import sys; from trainer.log.draw import draw; from pathlib import Path; draw(Path(sys.argv[1])); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"


def test_speed_time_and_stages(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write(tmp_path / "one", 30, system__images_per_second=100.0, system__gpu_memory_gb=3.0)
    curves, steps_per_epoch = draw.read_curves(tmp_path / "one" / "metrics.jsonl")
    assert steps_per_epoch == 10 and course.stages(curves) is None
    figure = course.speed(curves)
    assert figure is not None and [axis.get_title() for axis in figure.axes] == ["images per second", "GPU memory, GB"]
    figure = course.over_time(curves)
    assert figure is not None and [axis.get_title() for axis in figure.axes] == ["loss", "top1"]
    at, seconds = curves[draw.SECONDS]
    np.testing.assert_allclose(curves_of(figure.axes[0])["training"][0], np.interp(np.arange(1, 31), at, seconds) / 60)

    with Journal(tmp_path, csv=False) as journal:
        for step in range(1, 21):
            stage = 1 + (step > 8)
            row = {"train/loss": 1 / step, "train/stage": stage, "train/image_size": 16 * stage, "train/batch_size": 64 // stage}
            journal.write(step, step / 10, step, row)
    names = {path.name for path in draw.draw(tmp_path)}
    assert "stages.png" in names
    curves, steps_per_epoch = draw.read_curves(tmp_path / "metrics.jsonl")
    assert steps_per_epoch == 0, "epochs of two lengths have no scale"
    figure = course.stages(curves)
    assert figure is not None
    course.mark_stages(figure, curves)
    assert all(8 in np.asarray(line.get_xdata()) for axis in figure.axes for line in axis.get_lines()[-1:])


def test_an_epoch_is_drawn_when_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.log.plots.FLOOR", 0.01)
    drawn: list[int] = []
    monkeypatch.setattr("trainer.log.plots.Plotter._draw", lambda self: drawn.append(1) or 0.0)
    plotter = Plotter(tmp_path)
    for count in (1, 2, 3):
        assert len(drawn) == count - 1, "nothing is drawn while nothing is over"
        plotter.epoch()
        deadline = time.monotonic() + 10
        while len(drawn) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(drawn) == count
    plotter.finish()
    plotter.join(time.monotonic() + 10)
    assert len(drawn) == 4


def test_every_epoch_is_drawn_though_drawing_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawing of 0.05 s and epochs of 0.3 s."""
    monkeypatch.setattr("trainer.log.plots.FLOOR", 0.1)
    drawn: list[int] = []
    monkeypatch.setattr("trainer.log.plots.Plotter._draw", lambda self: time.sleep(0.05) or drawn.append(1) or 0.05)
    plotter = Plotter(tmp_path)
    began = time.monotonic()
    for count in range(1, 6):
        time.sleep(0.3)
        plotter.epoch()
        while len(drawn) < count and time.monotonic() < began + 10:
            time.sleep(0.01)
        assert len(drawn) == count
    assert time.monotonic() - began < 7
    plotter.finish()
    plotter.join(time.monotonic() + 10)


def test_training_does_not_wait_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.log.plots.FLOOR", 0.01)
    begun, may_end = threading.Event(), threading.Event()
    monkeypatch.setattr("trainer.log.plots.Plotter._draw", lambda self: begun.set() or may_end.wait(20) or 0.0)
    plotter = Plotter(tmp_path)
    plotter.epoch()
    assert begun.wait(10)
    for _ in range(100):
        plotter.epoch()
    plotter.finish()
    assert plotter.thread.is_alive(), "all that while the first is being drawn"
    may_end.set()
    plotter.join(time.monotonic() + 10)


def test_epochs_that_end_faster_than_they_are_drawn_share_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.log.plots.FLOOR", 0.01)
    busy: list[float] = []
    monkeypatch.setattr("trainer.log.plots.Plotter._draw", lambda self: time.sleep(0.05) or busy.append(0.05) or 0.05)
    plotter = Plotter(tmp_path)
    began = time.monotonic()
    while time.monotonic() - began < 1.0:
        plotter.epoch()
        time.sleep(0.002)
    assert busy and sum(busy) < 0.3 * (time.monotonic() - began) + 0.05
    plotter.finish()
    plotter.join(time.monotonic() + 10)
