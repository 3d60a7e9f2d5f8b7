"""What a person sees: lines, a bar on a terminal, the log file, the table at the end."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from tests.thresholds import DISPLAY_SECONDS_PER_STEP
from trainer.config.loop import Progressing
from trainer.errors import Stopped
from trainer.log import Display, open_display, open_log, show_facts, show_result
from trainer.log.display import Bar, Lines, Pace
from trainer.log.readable import duration, is_rate, show

ROOT = Path(__file__).resolve().parents[3]
SCALARS = {"train/loss": 0.4321, "train/top1": 0.9125, "train/grad_norm": 3.0, "train/lr": 1e-3, "system/images_per_second": 1234.5}
SCORES = {"val/loss": 0.5, "val/top1": 0.9306, "val/seconds": 0.2}


def show_a_run(display: Display) -> None:
    for step in range(1, 41):
        display.advance(step)
        if step % 10 == 0:
            display.logged(step, step / 20, SCALARS)
        if step % 20 == 0:
            display.validated(step, step / 20, SCORES, is_best=step == 20)


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with open_display(Progressing.auto, True, 40, 20) as display:  # pytest's stdout is no terminal
        assert isinstance(display, Lines)
        show_a_run(display)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6
    assert re.fullmatch(r"step 10/40  epoch 0\.5/2  loss 0\.4321  top1 91\.25 %  1,234 images/s  lr 1\.00e-03  \d+\.\d s left", said[0]), (
        said[0]
    )
    assert said[2] == "epoch 1/2  validation  loss 0.5000  top1 93.06 %  (best)"
    assert said[5] == "epoch 2/2  validation  loss 0.5000  top1 93.06 %"
    assert "left" not in said[4]


@pytest.mark.parametrize(("progress", "is_main"), [(Progressing.none, True), (Progressing.lines, False), (Progressing.bar, False)])
def test_nothing(progress: Progressing, is_main: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with open_display(progress, is_main, 40, 20) as display:
        show_a_run(display)
    assert capsys.readouterr().out == ""


def on_a_terminal(code: str) -> str:
    """What `code` prints on a terminal of 100 columns."""
    leader, follower = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", code], stdin=follower, stdout=follower, stderr=follower, cwd=ROOT, env=env) as process:
        os.close(follower)
        said = b""
        while True:
            try:
                said += os.read(leader, 65536)
            except OSError:  # nobody holds the other end any more
                break
    os.close(leader)
    assert process.returncode == 0, said.decode()
    return said.decode()


def test_a_bar_with_lines_above_it(tmp_path: Path) -> None:
    said = on_a_terminal(
        "import logging, time; from pathlib import Path; from trainer.config.loop import Progressing\n"
        "from tests.trainer.log.test_display import SCALARS, SCORES; from trainer.log import open_display, open_log, show_result\n"
        f"with open_log(Path({str(tmp_path)!r})), open_display(Progressing.auto, True, 40, 20) as display:\n"
        "    for step in range(1, 41):\n"
        "        display.advance(step); time.sleep(0.02)\n"
        "        if step % 10 == 0: display.logged(step, step / 20, SCALARS)\n"
        "        if step % 20 == 0: display.validated(step, step / 20, SCORES)\n"
        "        if step == 15: logging.getLogger('trainer.somewhere').warning('something odd'); print('of the user')\n"
        "    show_result({'metric': 'val/top1', 'best': SCORES, 'last': SCORES}, Path('runs/x'))\n"
    )
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said).replace("\r", "\n").splitlines()
    lines = [line.rstrip() for line in shown]
    bars = [line for line in lines if "━" in line]
    assert len(bars) >= 3 and bars[0].startswith("epoch 1/2") and any("top1 91.25 %" in bar and "images/s" in bar for bar in bars)
    assert max(map(len, lines)) <= 100
    for line in ("epoch 1/2  validation  loss 0.5000  top1 93.06 %", "warning: something odd", "of the user", "runs/x"):
        assert lines.count(line) == 1, f"{line!r} in {lines}"
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l"), "the cursor is back"
    table = next(i for i, line in enumerate(lines) if line.startswith(" metric"))
    assert not any("━" in line for line in lines[table:]), "the bar is gone before the table comes"
    text = (tmp_path / "train.log").read_text()
    assert "step 10/40" in text and "validation" in text and "something odd" in text and "\x1b" not in text


def test_the_bar_costs_next_to_nothing_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.live.Live.start", lambda self: None)
    bar = Bar(100_000, 1000)
    times = []
    for start in range(0, 10_000, 1000):
        began = time.perf_counter()
        for step in range(start, start + 1000):
            bar.advance(step)
        times.append((time.perf_counter() - began) / 1000)
    assert min(times) < DISPLAY_SECONDS_PER_STEP


def test_a_worker_forked_under_a_bar_prints_to_the_real_stdout(tmp_path: Path) -> None:
    said = on_a_terminal(
        "import os, sys; from trainer.config.loop import Progressing; from trainer.log import open_display\n"
        "real = sys.stdout\n"
        "with open_display(Progressing.bar, True, 40, 20) as display:\n"
        "    assert sys.stdout is not real\n"
        "    if (child := os.fork()) == 0: os._exit(sys.stdout is not real)\n"
        "    print('child', os.waitpid(child, 0)[1])\n"
    )
    assert "child 0" in said


def test_the_pace_forgets_a_slow_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.log.display.time.monotonic", lambda: now[0])
    pace = Pace()
    for step, seconds in [(0, 1000.0), *((10 * i, 1.0) for i in range(1, 40))]:
        now[0] += seconds
        pace.note(step)
    assert pace.left(1390) == pytest.approx(100.0)


def test_the_log_file_and_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hushed = logging.getLogger("trainer.hushed_by_hydra")
    hushed.disabled = True
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with open_log(tmp_path):
            hushed.info("going on at step 7")
            logging.getLogger("elsewhere").info("chatter of another package")
            for _ in range(2):
                logging.getLogger("elsewhere").warning("a warning of another package")
            warnings.warn("odd numbers", UserWarning, stacklevel=1)
        hushed.info("after the end")
    said = capsys.readouterr()
    assert said.err.splitlines() == ["going on at step 7", "warning: a warning of another package", "warning: UserWarning: odd numbers"]
    text = (tmp_path / "train.log").read_text()
    assert "INFO    trainer.hushed_by_hydra: going on at step 7" in text and text.count("a warning of another package") == 2
    assert "test_display.py" in text and "chatter" not in text and "after the end" not in text


def test_other_ranks_have_a_file_of_their_own_and_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path, rank=2):
        pass
    assert not list(tmp_path.iterdir()), "no file for nothing"
    with open_log(tmp_path, rank=2):
        logging.getLogger("trainer").warning("rank 2 here")
    assert "rank 2 here" in (tmp_path / "train.rank2.log").read_text() and capsys.readouterr().err == ""


def test_an_error_is_in_the_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), open_log(tmp_path):
        _ = 1 / 0
    text = (tmp_path / "train.log").read_text()
    assert "ZeroDivisionError" in text and "Traceback" in text
    with pytest.raises(Stopped), open_log(tmp_path):
        raise Stopped("told to stop; the same command resumes")
    assert (tmp_path / "train.log").read_text().splitlines()[-1].endswith("trainer: told to stop; the same command resumes")
    assert capsys.readouterr().err == "", "the caller shows it"


def test_the_table_of_results(capsys: pytest.CaptureFixture[str]) -> None:
    best = {"step": 198, "epoch": 9.0, "val/loss": 0.0512, "val/top1": 0.9861, "val/top5": 1.0, "val/seconds": 1.0}
    last = {"step": 220, "epoch": 10.0, "val/loss": 0.0498, "val/top1": 0.9833}
    numbers = {"parameters": 11_172_810, "seconds": 252.2, "images_per_second": 1532.4}
    show_result({"metric": "val/top1", "mode": "max", "best": best, "last": last, **numbers}, Path("runs/demo/s0-1234"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert rows[0] == ["metric", "best", "(epoch", "9)", "last", "(epoch", "10)"]
    assert rows[2:5] == [["top1", "98.61", "%", "98.33", "%"], ["loss", "0.0512", "0.0498"], ["top5", "100.00", "%", "-"]]
    assert " ".join(rows[5]) == "11,172,810 parameters, 4 min 12 s, 1,532 images/s"
    assert rows[6] == ["runs/demo/s0-1234"]


def test_a_result_without_validation(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"step": 5, "epoch": 0.5}
    show_result({"metric": "val/top1", "best": row, "last": row, "seconds": 1.0, "images_per_second": 5.0}, Path("runs/x"))
    assert capsys.readouterr().out.splitlines() == ["1.0 s, 5 images/s", "runs/x"]


def test_facts_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    show_facts({"run": "runs/x", "length": "10 epochs"})
    assert capsys.readouterr().out == "run     runs/x\nlength  10 epochs\n\n"


@pytest.mark.parametrize(
    ("name", "rate"),
    [("val/top1", True), ("val/worst_group_top1", True), ("val/top1_stage1", True), ("val/map_50", True), ("val/knn_top1", True),
     ("val/fg_miou", True), ("val/auroc", True), ("train/loss", False), ("val/keypoint_nmse", False), ("train/grad_norm", False)],
)  # fmt: skip
def test_which_metrics_are_shown_in_per_cent(name: str, rate: bool) -> None:
    assert is_rate(name) == rate
    assert show(name, 0.5).endswith("%") == rate


def test_numbers_and_durations_for_people() -> None:
    shown = [show("train/loss", value) for value in (0.12345, 12, 1e-7, 123456.7, float("nan"), None)]
    assert shown == ["0.1235", "12", "1.000e-07", "1.235e+05", "nan", "-"]
    spans = [duration(seconds) for seconds in (0.04, 9.96, 59.6, 61, 3599.7, 7260, 172_800, float("inf"))]
    assert spans == ["0.0 s", "10.0 s", "1 min 00 s", "1 min 01 s", "1 h 00 min", "2 h 01 min", "2 d 00 h", "?"]
