"""The report over seeds: its figures, its formats, and what it says of runs that are missing, broken or strange."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from benchmarks.peers.many_runs import SEEDS, make_run, make_sweep, settings
from tests import wandb_offline_log as log
from trainer.errors import ConfigError
from trainer.identity import settings as settings_of
from trainer.launch.compose import compose_run
from trainer.rundir import RunDirectory
from trainer.sweep import configs
from trainer.sweep.arms import higher_is_better
from trainer.sweep.found import find
from trainer.sweep.report import main, write
from trainer.sweep.sync import unsent
from trainer.sweep.verdict import judge

ROOT = Path(__file__).resolve().parents[3]
ARMS = [{"optimizer.lr": lr} for lr in (3e-4, 1e-3, 3e-3)]


def report(*paths: Path, out: Path, **options) -> dict:
    """report.json of what lies at `paths`."""
    write(judge(find(paths), **options), out)
    return json.loads((out / "report.json").read_text())


def scores(home: Path, metric: str = "val/top1") -> dict[float, dict[int, float]]:
    """lr -> seed -> the best score, read without any of our code but the manifest's."""
    found: dict[float, dict[int, float]] = {}
    for job in json.loads((home / "manifest.json").read_text())["jobs"]:
        result = home.parents[3] / job["directory"] / "result.json"
        if result.exists():
            found.setdefault(job["group"]["optimizer.lr"], {})[job["seed"]] = json.loads(result.read_text())["best"][metric]
    return found


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_sweep(tmp_path, ARMS)


def run_of(home: Path, index: int) -> Path:
    return home.parents[3] / json.loads((home / "manifest.json").read_text())["jobs"][index]["directory"]


def test_every_figure_is_scipys(home: Path, tmp_path: Path) -> None:
    found = report(home, out=tmp_path)
    values = [list(by_seed.values()) for by_seed in scores(home).values()]
    base = values[0]
    raw = []
    for arm, own in zip(found["arms"], values, strict=True):
        told = arm["metrics"]["val/top1"]
        low, high = stats.t.interval(0.95, 2, loc=np.mean(own), scale=stats.sem(own))
        assert (told["mean"], told["std"], told["low"], told["high"]) == pytest.approx(
            (np.mean(own), np.std(own, ddof=1), low, high), rel=1e-12
        )
        if own is base:
            assert arm["is_reference"] and not arm["against_reference"]
            continue
        test, against = stats.ttest_rel(own, base), arm["against_reference"]["val/top1"]
        raw.append(against)
        assert (against["t"], against["p"]) == pytest.approx((test.statistic, test.pvalue), rel=1e-12)
        assert arm["improvement"] == pytest.approx(np.mean(own) / np.mean(base) - 1, rel=1e-9)
    assert [arm["rank"] for arm in found["arms"]] == stats.rankdata(-np.array(values), axis=0).mean(1).tolist()
    assert sorted(a["p_holm"] for a in raw) == pytest.approx(
        [2 * min(a["p"] for a in raw), max(2 * min(a["p"] for a in raw), max(a["p"] for a in raw))]
    )
    assert len(found["pairs"]) == 3
    best = [arm for arm in found["arms"] if arm["is_best"]]
    assert (
        [arm["label"] for arm in best] == [found["best"]] == [max(found["arms"], key=lambda a: a["metrics"]["val/top1"]["mean"])["label"]]
    )


def test_a_failed_and_a_missing_seed_are_named_everywhere(tmp_path: Path) -> None:
    home = make_sweep(tmp_path, ARMS, states={1: "failed", 5: "missing", 6: "queued"})
    assert main([str(home)]) == 0
    markdown, page = (home / "report.md").read_text(), (home / "report.html").read_text()
    for said in ("lr=0.0003: seed 195 failed: Diverged: the loss was not finite", "lr=0.001: seed 335 missing", "lr=0.003: seed 42 queued"):
        assert said in markdown and said in page
    assert "9 runs in 3 arms: 6 completed, 1 failed, 1 missing, 1 queued." in markdown
    arms = json.loads((home / "report.json").read_text())["arms"]
    assert [arm["metrics"]["val/top1"]["n"] for arm in arms] == [2, 2, 2]
    assert arms[0]["failed"].keys() == {"195"} and arms[1]["missing"] == [335] and arms[2]["unfinished"] == {"42": "queued"}
    rows = list(csv.DictReader((home / "report.csv").read_text().splitlines()))
    assert {row["arm"]: (row["failed"], row["missing"], row["unfinished"]) for row in rows}["lr=0.001"] == ("", "335", "")


def test_the_final_summary_has_a_line_for_each_run(tmp_path: Path) -> None:
    home = make_sweep(tmp_path, ARMS, seeds=[7], states={1: "failed"}, epochs=6)
    weights = run_of(home, 0) / "checkpoints" / "model.safetensors"
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(bytes(2_500_000))
    result = run_of(home, 2) / "result.json"
    best = json.loads(result.read_text())["best"]
    edit(result, best=best | {"val/seconds_per_image": 0.02})
    assert main([str(home)]) == 0
    told = json.loads((home / "final_summary.json").read_text())
    assert (told["total"], told["succeeded"], told["failed"], told["metric"]) == (3, 2, 1, "val/top1")
    first, second, third = told["runs"]
    rows = list(csv.DictReader((run_of(home, 0) / "epochs.csv").read_text().splitlines()))
    losses = [float(row["train/loss"]) for row in rows]
    assert first["epoch_losses"] == losses and first["best_train_loss"] == min(losses) and first["final_train_loss"] == losses[-1]
    assert first["epoch_seconds"] == pytest.approx([2.2] * 6) and first["seconds_per_epoch"] == pytest.approx(2.2)
    assert (first["parameters"], first["megabytes"], first["succeeded"]) == (4_927_618, 2.5, True)
    reached = json.loads((run_of(home, 0) / "result.json").read_text())
    assert (first["best_epoch"], first["val/top1"]) == (reached["best"]["epoch"], reached["best"]["val/top1"])
    assert told["total_seconds"] == pytest.approx(first["seconds"] + third["seconds"], abs=1e-3)
    assert second["state"] == "failed" and second["reason"].startswith("Diverged") and second["rank"] is None
    assert second["epoch_losses"], "what it had learned by then"
    assert (third["milliseconds_per_image"], third["images_per_second"]) == pytest.approx((20, 50))
    assert sorted([first["rank"], third["rank"]]) == [1, 2] and (first["rank"] == 1) == (first["val/top1"] > third["val/top1"])
    table = list(csv.DictReader((home / "final_summary.csv").read_text().splitlines()))
    assert [(row["run"], row["state"]) for row in table] == [(run["run"], run["state"]) for run in told["runs"]]
    markdown = (home / "final_summary.md").read_text()
    assert "2 of 3 runs succeeded." in markdown and "seed 7: Diverged" in markdown and "4.93 M" in markdown and "20.0 ms" in markdown


def test_a_folder_of_runs_says_the_same_as_its_sweep(home: Path, tmp_path: Path) -> None:
    of_sweep, of_folder = report(home, out=tmp_path / "a"), report(home.parents[1], out=tmp_path / "b")
    of_list = report(*(run_of(home, i) for i in range(9)), out=tmp_path / "c")
    by_label = [{arm["label"]: arm["metrics"] for arm in found["arms"]} for found in (of_sweep, of_folder, of_list)]
    assert by_label[0] == by_label[1] == by_label[2]
    assert report(home.parent, out=tmp_path / "d")["arms"] == of_sweep["arms"], "a folder of sweeps, too"


def test_tables_are_well_formed(tmp_path: Path) -> None:
    home = make_sweep(tmp_path, [{"model.name": "a|b_c&d"}, {"model.name": "50%"}])
    main([str(home), "--metric", "top1", "--metric", "val/loss"])
    table = [line for line in (home / "report.md").read_text().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {12}
    tex = (home / "report.tex").read_text()
    assert r"name=a|b\_c\&d & 3 &" in tex and r"name=50\% & 3 &" in tex and tex.count(r"\\") == 3
    assert r"top1~$\uparrow$" in tex and r"loss~$\downarrow$" in tex and tex.count(r"\textbf") == 2
    rows = list(csv.DictReader((home / "report.csv").read_text().splitlines()))
    assert len(rows) == 2 and float(rows[0]["val/top1:mean"]) < 1 and rows[0]["seeds"] == "42 195 335"


def test_ranks_and_improvement_over_several_metrics(home: Path, tmp_path: Path) -> None:
    found = report(home, out=tmp_path, chosen=["val/top1", "val/loss"])
    up, down = (np.array([list(by_seed.values()) for by_seed in scores(home, name).values()]) for name in ("val/top1", "val/loss"))
    ranks = (stats.rankdata(-up, axis=0) + stats.rankdata(down, axis=0)).mean(1) / 2
    assert [arm["rank"] for arm in found["arms"]] == pytest.approx(ranks.tolist())
    gains = (up.mean(1) / up[0].mean() - 1 + 1 - down.mean(1) / down[0].mean()) / 2
    assert [arm["improvement"] for arm in found["arms"][1:]] == pytest.approx(gains[1:].tolist())


def test_the_reference_is_chosen_by_number_or_words(home: Path, tmp_path: Path) -> None:
    for asked in ("2", "lr=0.003", "optimizer.lr=0.003"):
        assert report(home, out=tmp_path, reference=asked)["reference"] == "lr=0.003"
    with pytest.raises(ConfigError, match=r"--reference=lr=0.1: is none of the arms: lr=0.0003; lr=0.001; lr=0.003"):
        judge(find([home]), reference="lr=0.1")


@pytest.mark.parametrize("at", ["best", "last"])
def test_best_or_last_validation(home: Path, tmp_path: Path, at: str) -> None:
    result = json.loads((run_of(home, 0) / "result.json").read_text())
    assert report(home, out=tmp_path, at=at)["arms"][0]["metrics"]["val/top1"]["values"]["42"] == result[at]["val/top1"]


def test_bootstrap_is_an_option(home: Path, tmp_path: Path) -> None:
    own = list(scores(home)[3e-4].values())
    theirs = stats.bootstrap((own,), np.mean, n_resamples=9_999, rng=np.random.default_rng(0)).confidence_interval
    told = report(home, out=tmp_path, interval="bootstrap")["arms"][0]["metrics"]["val/top1"]
    assert (told["low"], told["high"]) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_a_lucky_single_seed_is_not_the_best(tmp_path: Path) -> None:
    home = make_sweep(tmp_path, ARMS, states={0: "failed", 1: "failed"})
    path = run_of(home, 2) / "result.json"
    best = json.loads(path.read_text())["best"] | {"val/top1": 0.9999}
    edit(path, best=best)
    assert report(home, out=tmp_path)["best"] != "lr=0.0003"


# Bad input


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: is not there") as caught:
        find([tmp_path / "nowhere", tmp_path])
    assert len(caught.value.problems) == 2, "all at once"


def test_nothing_completed_yet(tmp_path: Path) -> None:
    home = make_sweep(tmp_path, ARMS[:1], states={0: "failed", 1: "queued", 2: "missing"})
    with pytest.raises(ConfigError, match=r"no run is completed yet, of 3; 1 failed, the first with: Diverged"):
        judge(find([home]))


def test_a_best_that_was_chosen_on_test_images_is_named(home: Path, tmp_path: Path) -> None:
    edit(run_of(home, 0) / "result.json", validated_on="full_test_set")
    edit(run_of(home, 1) / "result.json", validated_on="val")
    named = [text for text in report(home, out=tmp_path)["remarks"] if "chosen on test images" in text]
    assert len(named) == 1
    assert named[0].startswith("lr=0.0003: ")
    assert "(full_test_set)" in named[0]
    assert not [text for text in report(home, out=tmp_path, at="last")["remarks"] if "chosen on test images" in text]


@pytest.mark.parametrize("keep", [0, 1, 200, -3])
def test_a_half_written_manifest(home: Path, keep: int) -> None:
    text = (home / "manifest.json").read_text()
    (home / "manifest.json").write_text(text[:keep])
    with pytest.raises(ConfigError, match="cannot be read"):
        find([home])
    assert len(find([home.parents[1]]).runs) == 9, "the runs themselves can still be read"


def test_an_edited_manifest(home: Path) -> None:
    content = json.loads((home / "manifest.json").read_text())
    content["jobs"][3]["seed"] = "many"
    (home / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"jobs\[3\].seed is 'many'"):
        find([home])


def test_a_metric_that_is_not_a_number(home: Path, tmp_path: Path) -> None:
    path = run_of(home, 0) / "result.json"
    edit(path, best=json.loads(path.read_text())["best"] | {"val/top1": None, "val/loss": None})
    found = report(home, out=tmp_path)
    assert found["arms"][0]["metrics"]["val/top1"]["n"] == 2
    assert "lr=0.0003: val/top1 is not a number for seed 42, which is left out" in found["remarks"]
    assert found["seeds_of_all"] == [195, 335]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"best": 3, "last": {}}', "null"])
def test_a_damaged_result_counts_as_missing_and_is_named(home: Path, tmp_path: Path, content: str) -> None:
    (run_of(home, 4) / "result.json").write_text(content)
    found = report(home, out=tmp_path)
    assert found["arms"][1]["missing"] == [195]
    assert [text for text in found["remarks"] if "result.json is damaged" in text and run_of(home, 4).name in text]


def test_one_seed_only(tmp_path: Path) -> None:
    found = report(make_sweep(tmp_path, ARMS, seeds=[42]), out=tmp_path)
    for arm in found["arms"]:
        assert arm["metrics"]["val/top1"]["std"] is None and arm["metrics"]["val/top1"]["low"] is None
    assert [arm["against_reference"]["val/top1"]["p"] for arm in found["arms"][1:]] == [None, None]
    assert found["best"], "the best of what is there"


def test_one_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {}, 42)
    found = report(tmp_path / "run", out=tmp_path)
    assert [arm["label"] for arm in found["arms"]] == ["the run as it is"]
    assert found["best"] is None and found["arms"][0]["rank"] is None


def test_arms_with_different_metrics(home: Path, tmp_path: Path) -> None:
    for index in (0, 1, 2):
        path = run_of(home, index) / "result.json"
        row = {"step": 1, "epoch": 1.0, "val/map": 0.5}
        edit(path, metric="val/map", best=row, last=row, history=[row])
    found = report(home, out=tmp_path)
    assert [metric["name"] for metric in found["metrics"]][0] == "val/top1", "what most runs were judged by"
    assert found["reference"] == "lr=0.001", "the first arm that has it"
    assert "lr=0.0003: has no val/top1; it was judged by val/map" in found["remarks"]
    assert report(home, out=tmp_path, chosen=["map"])["arms"][0]["metrics"]["val/map"]["mean"] == 0.5
    with pytest.raises(ConfigError, match=r"--metric=val/topp1: no run has it.*\n.*try: --metric val/top1"):
        judge(find([home]), ["val/topp1"])


def test_a_seed_that_was_run_twice(tmp_path: Path) -> None:
    first = make_run(tmp_path / "runs" / "a" / "s1-x", {}, 1)
    make_run(tmp_path / "runs" / "a" / "s1-x-2", {"optimizer.eps": 1e-8}, 1)
    edit(first.status_path, heartbeat=1.0)
    found = report(tmp_path / "runs", out=tmp_path)
    assert len(found["arms"]) == 1 and found["arms"][0]["metrics"]["val/top1"]["n"] == 1
    assert "completed 2 times" in found["remarks"][0] and "s1-x-2, the newest, counts" in found["remarks"][0]


def test_seeds_of_different_code_are_remarked(home: Path, tmp_path: Path) -> None:
    edit(run_of(home, 1) / "environment.json", git={"commit": "0" * 40, "dirty": False, "code": "feedfacefeedface", "diff": ""})
    assert [text for text in report(home, out=tmp_path)["remarks"] if "lr=0.0003: its seeds ran 2 different states of the code" in text]


def test_moved_runs_are_found(home: Path, tmp_path: Path) -> None:
    shutil.move(home.parents[3] / "runs", tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / home.relative_to(home.parents[2])
    assert report(tmp_path / "elsewhere" / "digits", out=tmp_path / "out")["arms"], moved


def test_which_way_is_better() -> None:
    for name in ("val/top1", "val/map_50", "val/worst_group_top1", "val/auroc", "val/nmi"):
        assert higher_is_better(name), name
    for name in ("val/loss", "val/keypoint_nmse", "val/loss_cls", "val/nll", "val/ece", "val/abs_rel"):
        assert not higher_is_better(name), name


# Settings


@pytest.mark.parametrize(
    "overrides", [[], ["optimizer=sgd", "augmentation=randaugment"], ["dataset=synthetic", "scheduler=onecycle", "logger.wandb.tags=[a,b]"]]
)
def test_settings_read_from_yaml_are_those_of_the_config(overrides: list[str], tmp_path: Path) -> None:
    run = compose_run(*overrides)
    RunDirectory(tmp_path).write_config(run)
    content = configs.read_plain(tmp_path / "config.yaml")
    assert content == yaml.safe_load((tmp_path / "config.yaml").read_text())
    ours, theirs = configs.settings(content), dict(settings_of(run))
    assert {key: value for key, value in ours.items() if not isinstance(value, list)} == {
        key: value for key, value in theirs.items() if not isinstance(value, list) and key in ours
    }
    assert {key for key, value in theirs.items() if not isinstance(value, dict)} <= set(ours)
    assert "logger.csv" not in ours and "name" not in ours and "dataset.num_workers" not in ours


@pytest.mark.parametrize("text", ["a: &x 1\nb: *x\n", "  a: 1\n", "a: 1\nlist:\n- 1\n- b: 2\n", "# nothing\na: {b: 1}\n"])
def test_yaml_that_our_own_hand_would_not_write(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert configs.read_plain(tmp_path / "config.yaml") == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [\n", "\t"])
def test_yaml_that_is_no_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        configs.read_plain(tmp_path / "config.yaml")


def test_a_broken_config_is_remarked(home: Path, tmp_path: Path) -> None:
    (run_of(home, 0) / "config.yaml").write_text("a: [")
    found = report(home.parents[1], out=tmp_path)
    assert len(found["arms"]) == 4
    assert [text for text in found["remarks"] if "config.yaml cannot be read" in text]


def test_nothing_heavy_is_imported(home: Path) -> None:
    script = (
        "import sys; from trainer.__main__ import main; code = main(sys.argv[1:])\n"
        "print('heavy:', {'torch', 'numpy', 'scipy', 'rich', 'wandb', 'matplotlib'} & set(sys.modules)); sys.exit(code)"
    )
    for verb in (["report", str(home)], ["status", str(home)], ["diff", str(run_of(home, 0)), str(run_of(home, 3))]):
        done = subprocess.run([sys.executable, "-c", script, *verb], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("heavy: set()\n"), verb


def test_many_arms() -> None:
    arms = settings(200)
    assert len({json.dumps(arm) for arm in arms}) == 200 and SEEDS == (42, 195, 335)


def test_the_table_in_wandb(tmp_path: Path) -> None:
    """Offline, and uploaded later like a run's own log; the real client writes it, and its file is read back."""
    home = make_sweep(tmp_path, [{"model.drop_rate": 0}, {"model.drop_rate": 0.1}], states={1: "failed"})
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env |= {"HOME": str(tmp_path), "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "trainer", "report", str(home), "--wandb", "birds"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"python -m trainer sync {home}" in done.stdout, done.stderr
    (start,) = unsent(home, every=False)
    (file,) = start.glob("*.wandb")
    run = next(record.run for record in log.records(file) if record.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group, run.job_type) == ("birds", "2026-11-26_09-00-00", "report")
    (logged,) = log.history(file)
    content = json.loads((start / "files" / logged["report/path"]).read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    told = {arm["label"]: arm for arm in json.loads((home / "report.json").read_text())["arms"]}
    assert len(rows) == 2 and rows[0]["best"]
    for row in rows:
        assert row["val/top1 mean"] == pytest.approx(told[row["arm"]]["metrics"]["val/top1"]["mean"])
    assert [row["missing"] for row in rows if "195" in row["missing"]]
