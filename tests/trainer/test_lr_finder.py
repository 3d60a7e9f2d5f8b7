"""The sweep: what it reads off a curve, what it trains with, and that nothing of it is left afterwards."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from tests.processes import finish, logs, start_ranks
from tests.test_exact import MODELS, SHORT, assert_same_run, last, run, stop_after
from trainer.errors import ConfigError, Stopped
from trainer.launch.compose import checked, compose
from trainer.launch.find_lr import main as find_lr
from trainer.lr_curve import Sweep, longest_descent

VIT = [*MODELS["vit"], "dataset.num_workers=0"]
RESNET = [*MODELS["batchnorm"], "dataset.num_workers=0"]
SWEEP = ["loop.lr_finder=true", "loop.lr_finder_steps=24"]
HARD = [
    "model.drop_rate=0.3",
    "augmentation.mixup=0.8",
    "augmentation.cutmix=1.0",
    "loop.ema_decay=0.9",
    "loop.accumulate=2",
    "precision=fp16",
]


def swept(loss_at, start: float = 1e-7, end: float = 10.0, steps: int = 100) -> Sweep:
    sweep = Sweep()
    for i in range(steps):
        rate = start * (end / start) ** (i / (steps - 1))
        if sweep.add(rate, loss_at(math.log10(rate))):
            break
    return sweep


def bowl(x: float) -> float:
    """Flat, a descent that is steepest at 1e-4, lowest near 1e-2.6, and up."""
    return 2.3 - 1 / (1 + math.exp(-4 * (x + 4))) + max(0.0, x + 2) ** 3 * 5


def test_the_suggestions_are_where_their_names_say():
    sweep = swept(bowl)
    rates = sweep.suggestions()
    bottom = min((bowl(x / 100), x / 100) for x in range(-700, 100))[1]
    assert math.log10(rates["steepest"]) == pytest.approx(-4, abs=0.15)
    assert math.log10(rates["minimum"]) == pytest.approx(bottom - 1, abs=0.6)
    assert -5.5 < math.log10(rates["valley"]) < -3.5
    assert sweep.rates[-1] < 10, "it stopped when the loss had quadrupled"


def test_noise_moves_them_little():
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0)).mul(0.05).tolist()
    step = iter(noise)
    rates = swept(lambda x: bowl(x) + next(step)).suggestions()
    assert math.log10(rates["steepest"]) == pytest.approx(-4, abs=0.6)


@pytest.mark.parametrize("loss_at", [lambda x: 2.3, lambda x: 2.3 + max(0.0, x), lambda x: math.nan], ids=["flat", "rising", "nan"])
def test_a_curve_that_does_not_fall_suggests_nothing(loss_at):
    assert swept(loss_at).suggestions() == {}


def test_the_longest_descent_skips_a_bump():
    assert longest_descent([5, 4, 3, 3.5, 2, 1, 6, 5.5]) == (1, 5)  # 5 4 3 2 1: five long, and it ends at the fifth
    assert longest_descent([1.0]) == (0, 0)


@pytest.mark.parametrize(("network", "more"), [(VIT, HARD), (RESNET, []), (VIT, ["optimizer=sgd", "loop.stages=[{epochs: 2, image_size: 8}, {epochs: 1}]"])],
                         ids=["everything", "batchnorm", "stages"])  # fmt: skip
def test_a_run_after_a_sweep_is_the_run_without_one(network, more, tmp_path: Path):
    run(tmp_path / "without", *network, *more)
    run(tmp_path / "with", *network, *more, *SWEEP)
    assert_same_run(tmp_path / "without", tmp_path / "with")
    with (tmp_path / "with" / "lr_finder.csv").open() as file:
        table = list(csv.DictReader(file))
    assert 10 <= len(table) <= 24 and float(table[0]["learning_rate"]) == pytest.approx(1e-7)
    assert (tmp_path / "with" / "lr_finder.png").read_bytes().startswith(b"\x89PNG")


def test_two_ranks_and_micro_batches_sweep_like_one(tmp_path: Path):
    """The losses are all-reduced, the updates are real: one curve, whoever computes it; and nothing of it is left on any rank."""
    common = [*SHORT, *VIT, "loop.lr_finder_end=1e-2", "loop.checkpoint_every_steps=3"]
    sweeps = {"one": [], "micro": ["loop.accumulate=2"]}
    curves: dict[str, list[float]] = {}
    for name, more in sweeps.items():
        run(tmp_path / name, *common, *SWEEP, *more)
    two = start_ranks(tmp_path / "two", [*common, *SWEEP], 2)
    plain = start_ranks(tmp_path / "plain", common, 2)
    assert finish([*two, *plain]) == [0] * 4, logs(tmp_path / "two")
    assert_same_run(tmp_path / "plain", tmp_path / "two")
    for name in (*sweeps, "two"):
        with (tmp_path / name / "lr_finder.csv").open() as file:
            curves[name] = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(curves["one"]) == 24
    # Adam divides small gradients by small numbers, so that rounding shows in the fifth digit after some steps.
    assert curves["micro"] == pytest.approx(curves["one"], rel=1e-3)
    assert curves["two"] == pytest.approx(curves["one"], rel=1e-3)


def test_the_rate_it_finds_is_used_and_survives_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    overrides = [
        *RESNET,
        "optimizer=sgd",
        "loop.lr_finder=true",
        "loop.lr_finder_steps=40",
        "loop.lr_finder_use=steepest",
        "scheduler=constant",
    ]
    run(tmp_path / "unbroken", *overrides)
    found = json.loads((tmp_path / "unbroken" / "lr_finder.json").read_text())["suggestions"]["steepest"]
    rates = {json.loads(line).get("train/lr") for line in (tmp_path / "unbroken" / "metrics.jsonl").read_text().splitlines()} - {None}
    assert list(rates) == pytest.approx([found]) and found != pytest.approx(0.1)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            run(tmp_path / "broken", *overrides)
    # The stop fell into the sweep, which has a fifth step too: nothing has begun, so the next start begins.
    assert not (tmp_path / "broken" / "checkpoints" / "last.pt").exists()
    monkeypatch.setattr("trainer.lr_finder.sweep", _no_more_than_once(monkeypatch))
    with pytest.raises(Stopped):
        run(tmp_path / "broken", *overrides)
    monkeypatch.undo()
    assert last(tmp_path / "broken")["step"] == 5
    (tmp_path / "broken" / "lr_finder.csv").unlink()
    run(tmp_path / "broken", *overrides)
    assert not (tmp_path / "broken" / "lr_finder.csv").exists(), "a run that goes on does not sweep again"
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def _no_more_than_once(monkeypatch: pytest.MonkeyPatch):
    """The sweep itself, after which the run is stopped in its fifth step."""
    from trainer import lr_finder

    original = lr_finder.sweep

    def sweep(*args, **kwargs):
        result = original(*args, **kwargs)
        stop_after(monkeypatch, 4)
        return result

    return sweep


def test_a_sweep_that_is_off_at_once_says_so(tmp_path: Path):
    off = [*VIT, "optimizer=sgd", *SWEEP, "loop.lr_finder_start=1e4", "loop.lr_finder_end=1e30"]
    with pytest.raises(ConfigError, match=r"(?s)lr_finder_start=10000.0: the loss is off after \d steps.*lr_finder_start=1e\+00"):
        run(tmp_path, *off)


def test_a_rate_that_is_not_there_cannot_be_used(tmp_path: Path):
    flat = [*VIT, *SWEEP, "loop.lr_finder_start=1e-12", "loop.lr_finder_end=1e-10"]
    run(tmp_path / "shown", *flat)
    with pytest.raises(ConfigError, match="loss fell nowhere"):
        run(tmp_path / "used", *flat, "loop.lr_finder_use=valley")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["loop.lr_finder_use=valley"], "loop.lr_finder_use"),
        (["loop.lr_finder=true", "loop.lr_finder_use=best"], "loop.lr_finder_use"),
        (["loop.lr_finder=true", "loop.lr_finder_start=1", "loop.lr_finder_end=0.1"], "loop.lr_finder_start"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides, key):
    from trainer.config.fields import field_problems

    made, problems = checked(compose(overrides))
    assert {p.key for p in [*problems, *(field_problems(made) if made else [])]} == {key}


def test_the_verb_leaves_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = [*VIT, "loop.lr_finder_steps=24", f"runs_dir={tmp_path / 'runs'}"]
    assert find_lr([*overrides, "--out", str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"lr_finder.csv", "lr_finder.json", "lr_finder.png"}
    assert not (tmp_path / "runs").exists() and "learning rates from 1e-07" in capsys.readouterr().out


def test_the_verb_starts_the_ranks_that_the_run_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As many as there are GPUs, here two, on the CPU; and their curve is that of one."""
    monkeypatch.setattr("trainer.surroundings.visible_gpus", lambda: 2)
    overrides = [*VIT, "loop.lr_finder_steps=20", "loop.lr_finder_end=1e-2", f"runs_dir={tmp_path / 'runs'}"]
    assert find_lr([*overrides, "--out", str(tmp_path / "two")]) == 0
    assert (tmp_path / "two" / "train.rank1.log").exists() and not (tmp_path / "runs").exists()
    assert find_lr([*overrides, "distributed.processes=1", "--out", str(tmp_path / "one")]) == 0
    curves = {}
    for name in ("one", "two"):
        with (tmp_path / name / "lr_finder.csv").open() as file:
            curves[name] = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(curves["one"]) == 20 and curves["two"] == pytest.approx(curves["one"], rel=1e-3)
