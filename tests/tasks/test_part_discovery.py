"""Part discovery as a task: exact evaluation, ranks, resuming, interventions, bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from tasks.part_discovery import losses
from tasks.part_discovery.config import PartDiscoveryConfig
from tasks.part_discovery.evaluation import PartScores
from tasks.part_discovery.task import PartDiscovery
from tests.layouts import LAYOUTS
from tests.processes import finish, logs, start, start_ranks
from tests.ranks import distributed, run_ranks, torchrun_environments
from tests.test_exact import assert_same_run, last, stop_after, stopped_and_resumed
from tests.thresholds import LEARNS, PARTS_NMI, PARTS_TOP1
from trainer.build import build_data, build_task
from trainer.cautions import warnings_of
from trainer.config import RunConfig
from trainer.errors import ConfigError, DataError, Stopped
from trainer.identity import identity
from trainer.launch import evaluate as evaluate_verb
from trainer.launch import predict as predict_verb
from trainer.launch.compose import CONF, checked, compose, compose_run
from trainer.run import loaders, train
from trainer.rundir import RunDirectory

TINY = [
    "task=part_discovery", "task.num_parts=4", "model=timm", "model.name=test_vit", "model.patch_size=8", "+model.args.depth=2", "dataset.image_size=32",
    "loop.batch_size=8", "loop.epochs=1", "loop.log_every=1", "loop.progress=none", "logger.plots=false", "dataset.num_workers=0",
]  # fmt: skip
FEW = ["dataset.num_train=48", "dataset.num_val=20"]


def made(*overrides: str) -> RunConfig:
    return compose_run(*TINY, *([] if any(o.startswith("dataset=") for o in overrides) else FEW), *overrides)


def run(directory: Path, *overrides: str) -> dict:
    return train(made(*overrides), RunDirectory(directory))


def evaluate(*overrides: str) -> dict[str, float]:
    """Scores of freshly drawn weights."""
    from trainer.distributed import open_world

    config = made(*overrides)
    with open_world(config.distributed) as world:
        data = build_data(config)
        task = build_task(config, data, world.device, 1)
        _, validation, reference = loaders(config, data, task, world, 0)
        assert validation is not None
        evaluator = task.eval().evaluator()
        with torch.no_grad():
            for batch in reference or ():
                evaluator.reference(batch)  # type: ignore[attr-defined]
            for batch in validation:
                evaluator.update(batch)
            return evaluator.compute()


EVERYTHING = {
    "loss", "loss_stage1", "top1", "top1_stage1", "auroc", "auroc_stage1", "fg_miou", "nmi", "ari", "keypoint_nmse", "seen_fraction",
}  # fmt: skip


def test_two_evaluations_are_equal_bit_for_bit():
    first, second = evaluate(), evaluate()
    assert first == second
    assert first.keys() == EVERYTHING
    noise = ("task.gumbel=true", "task.gumbel_at_eval=true")
    assert evaluate(*noise) == evaluate(*noise) != first


def test_the_size_of_a_batch_and_pruning_do_not_change_the_scores():
    whole = evaluate()
    for change in ("loop.batch_size=5", "task.prune=false"):
        other = evaluate(change)
        assert other.keys() == whole.keys()
        assert all(other[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6) for name in whole), change


def test_interventions_change_the_evaluation():
    whole = evaluate()
    less, loose, tight = (
        evaluate("task.remove_parts=[0,1]"),
        evaluate("task.threshold_quantile=0.01"),
        evaluate("task.threshold_quantile=0.9"),
    )
    assert less["seen_fraction"] < whole["seen_fraction"]
    assert tight["seen_fraction"] < loose["seen_fraction"]
    nothing = evaluate("task.part_thresholds=[1e9,1e9,1e9,1e9]")
    assert nothing["seen_fraction"] == 0
    assert np.isfinite(nothing["loss"])


def test_groups_are_scored_where_there_are_some(tmp_path):
    LAYOUTS["waterbirds"](tmp_path / "birds")
    scores = evaluate(*_on(tmp_path / "birds", "waterbirds"))
    assert {"worst_group_top1", "worst_group_top1_stage1"} <= scores.keys()
    assert scores["worst_group_top1"] <= scores["top1"]


def _on(path: Path, dataset: str) -> list[str]:
    """Overrides for a dataset on disk instead of the embedded one."""
    return [f"dataset={dataset}", f"dataset.path={path}"]


def test_resuming_ends_in_the_same_bits(tmp_path, monkeypatch):
    overrides = ["task.freeze_stage_1=true", "task.gumbel=true", "task.gumbel_at_eval=true", "optimizer.weight_decay_scaling=normalized"]
    stopped_and_resumed(run, tmp_path, monkeypatch, 2, *overrides)
    pictures = (tmp_path / "unbroken" / "previews").rglob("*.png")
    assert [p.relative_to(tmp_path / "unbroken" / "previews").as_posix() for p in pictures] == ["step-0000006/parts.png"]


def test_half_precision_learns_and_resumes_in_the_same_bits(tmp_path, monkeypatch):
    overrides = ["precision=bf16", "task.gumbel=true", "optimizer.lr=1e-3", "task.terms_warmup=0", "loop.validate_every=5", "loop.epochs=5"]
    stopped_and_resumed(run, tmp_path, monkeypatch, 2, *overrides)
    found = rows(tmp_path / "unbroken", "train/loss")
    assert np.mean(found[-5:]) < LEARNS * np.mean(found[:5])


def test_resuming_with_a_schedule_of_freezing_ends_in_the_same_bits(tmp_path, monkeypatch):
    """The first stage's network waits for an epoch. Stopped in the stage in which it is frozen, and in the one in which it is not."""
    overrides = ["loop.epochs=null", "loop.stages=[{epochs: 1, freeze_to: stage_1.backbone}, {epochs: 1}]", "dataset.num_train=24"]
    run(tmp_path / "unbroken", *overrides)
    for step in (1, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Stopped):
                run(tmp_path / "broken", *overrides)
    run(tmp_path / "broken", *overrides)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_one_rank_and_two_train_alike(tmp_path):
    """Noise and dropout are on: they come from each sample's key. Presence looks at the images of both ranks."""
    overrides = [*TINY, *FEW, "task.gumbel=true", "optimizer=sgd", "optimizer.lr=0.01", "loop.steps=3", "loop.epochs=null"]
    one, two = start(tmp_path / "one", overrides), start_ranks(tmp_path / "two", overrides, 2)
    assert finish([one, *two]) == [0, 0, 0], logs(tmp_path / "one") + logs(tmp_path / "two")
    left, right = last(tmp_path / "one")["task"], last(tmp_path / "two")["task"]
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    rows = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        for name, value in a.items():
            if name.startswith("train/") or (name.startswith("val/") and "seconds" not in name):
                assert b[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_but_for_presence_micro_batches_train_as_the_whole_batch(tmp_path):
    """What `whole_batch` names is all that cutting a batch up changes."""
    shared = ["optimizer=sgd", "optimizer.lr=0.01", "loop.steps=2", "loop.epochs=null", "loop.validate_every=null"]
    for name, overrides in (("whole", []), ("cut", ["loop.accumulate=2"])):
        run(tmp_path / name, *shared, *overrides, "task.presence_weight=0")
        run(tmp_path / f"{name}-presence", *shared, *overrides)
    whole, cut, *presence = (last(tmp_path / name)["task"] for name in ("whole", "cut", "whole-presence", "cut-presence"))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert max((presence[0][name] - presence[1][name]).abs().max() for name in whole) > 1e-5


def test_images_are_kept_for_a_picture_only_where_there_will_be_one(tmp_path, monkeypatch):
    kept: list[int] = []
    monkeypatch.setattr(
        PartScores, "keep", lambda self, batch, maps, keep=PartScores.keep: (kept.append(len(batch["image"])), keep(self, batch, maps))
    )
    shared = ["loop.epochs=3", "dataset.num_train=8", "dataset.num_val=20"]
    run(tmp_path / "some", *shared, "loop.preview_every=2")
    assert len(list((tmp_path / "some" / "previews").iterdir())) == 2, "of three validations the first and the last"
    assert sum(kept) == 2 * 20
    kept.clear()
    run(tmp_path / "none", *shared, "loop.preview_every=null")
    assert not kept


def test_the_result_says_that_the_best_was_chosen_on_test_images(tmp_path):
    LAYOUTS["cub"](tmp_path / "cub")
    for overrides, split in (([], "test"), (["dataset.val_fraction=0.3"], "train")):
        result = run(
            tmp_path / split,
            *_on(tmp_path / "cub", "cub"),
            *overrides,
            "loop.steps=1",
            "loop.epochs=null",
            "task.keypoint_regression=false",
        )
        assert result["validated_on"] == split


PRESENCES = [(kind, scope) for kind in ("original", "soft_constraint", "tanh", "soft_tanh") for scope in ("global", "rank")]


def shared_presence() -> dict[tuple[str, str], tuple[float, list[float]]]:
    """For each kind and scope the loss, and the gradient that DDP would make of both ranks', by images."""
    from trainer.distributed import open_world

    found = {}
    with open_world(distributed(), cuda=False) as world:
        for kind, scope in PRESENCES:
            mine = maps_of_four()[world.rank * 2 : world.rank * 2 + 2].requires_grad_()
            loss = losses.presence(mine, kind, across_ranks=scope == "global")
            loss.backward()
            assert mine.grad is not None
            whole = torch.zeros(4, *mine.shape[1:])
            whole[world.rank * 2 : world.rank * 2 + 2] = mine.grad / world.size
            dist.all_reduce(whole)
            found[kind, scope] = loss.item(), whole.sum((2, 3)).flatten().tolist()
    return found


def presence_of_parts(kind: str, sizes: list[int]) -> tuple[list[float], list[float]]:
    """In one process: the loss of each part of the four images, and the gradient of their mean."""
    maps = maps_of_four().requires_grad_()
    parts = [losses.presence(part, kind) for part in maps.split(sizes)]
    torch.stack(parts).mean().backward()
    assert maps.grad is not None
    return [part.item() for part in parts], maps.grad.sum((2, 3)).flatten().tolist()


def maps_of_four() -> torch.Tensor:
    return torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def test_presence_over_ranks_is_presence_over_the_whole_batch_or_over_each_ranks_share(tmp_path):
    for rank, outcome in enumerate(run_ranks(shared_presence, torchrun_environments(2), tmp_path)):
        assert outcome.code == 0, outcome.output
        for kind, scope in PRESENCES:
            values, gradient = presence_of_parts(kind, [4] if scope == "global" else [2, 2])
            loss, found = outcome.value[kind, scope]
            assert loss == pytest.approx(values[0 if scope == "global" else rank], abs=1e-6), (kind, scope)
            assert found == pytest.approx(gradient, abs=1e-6), (kind, scope)


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["task.num_parts=0"], "task.num_parts", ">= 2"),
        (["task.num_parts=1"], "task.num_parts", ">= 2"),
        (["dataset.image_size=36"], "dataset.image_size", "multiple of 8"),
        (["dataset.image_size=16"], "dataset.image_size", "3 x 3"),
        (["task.mask_gradient=soft", "task.prune=true"], "task.prune", "soft masks"),
        (["task.freeze_stage_1_tokens=true"], "task.freeze_stage_1_tokens", "task.freeze_stage_1"),
        (["task.stages=1", "task.freeze_stage_2=true"], "task.freeze_stage_2", "one stage"),
        (["task.stage_2_weight=0"], "task.stage_2_weight", "learn nothing"),
        (["task.stages=1", "task.stage_1_weight=0"], "task.stage_1_weight", "nothing else"),
        (["task.remove_parts=[4]"], "task.remove_parts", "0 to 3"),
        (["task.remove_parts=[0,1,2,3]"], "task.remove_parts", "no part"),
        (["task.remove_parts=[0,1,2]", "task.leave_one_out=true"], "task.leave_one_out", "one part is left"),
        (["task.part_thresholds=[1.0]"], "task.part_thresholds", "each of 4"),
        (["task.part_thresholds=[1.0,1,1,1]", "task.threshold_quantile=0.1"], "task.threshold_quantile", "already"),
        (["task.presence_type=sometimes"], "task.presence_type", "one of"),
        (["task.equivariance_zoom=[1.4,0.8]"], "task.equivariance_zoom", "smallest"),
        (["model=torchvision", "model.name=resnet18"], "model", "features"),
        (["model=small_resnet", "task.stages=1"], "model", "pyramid"),
    ],
)
def test_what_cannot_work_is_refused(overrides, key, reason):
    base = [o for o in TINY if not (overrides[0].startswith("model=") and o.startswith(("model", "+model")))]
    _, problems = checked(compose([*base, *overrides]))
    assert [p.key for p in problems] == [key]
    assert reason in str(problems[0])


GUIDE = """
model_arch pretrained_start_weights data_path batch_size wandb epochs dataset save_every_n_epochs num_workers image_sub_path_train image_sub_path_test
train_split eval_mode wandb_entity wandb_project wandb_mode job_type group snapshot_dir lr optimizer_type scheduler_type scratch_lr_factor
modulation_lr_factor finer_lr_factor stage_two_lr_factor drop_path_stage_1 drop_path_stage_2 smoothing augmentations_to_use num_parts weight_decay
freeze_backbone freeze_params_stage_1 freeze_second_stage freeze_params_stage_2 total_variation_loss concentration_loss enforced_presence_loss
enforced_presence_loss_type pixel_wise_entropy_loss gumbel_softmax softmax_temperature presence_loss_type grad_norm_clip wandb_resume_id resume_training
log_interval image_size mask_sub_path use_hf_transformers part_dropout part_dropout_stage_2 use_soft_masks output_stride amap_saving_prob
scheduler_gamma scheduler_step_size nnodes nproc_per_node
"""
"""Every flag of the training guide that this task follows."""


def guide_rows() -> list[tuple[str, str]]:
    """(flags, ours) of the guide's table in docs/from-other-tools.md."""
    section = (CONF.parent / "docs" / "from-other-tools.md").read_text().split("## iFAM", 1)[1].split("\n## ", 1)[0]
    return [(cells[1], cells[2]) for line in section.splitlines() if line.startswith("| `") and (cells := line.split("|"))]


def test_every_flag_of_the_guide_has_a_row():
    named = " ".join(flags for flags, _ in guide_rows())
    assert [flag for flag in GUIDE.split() if not re.search(rf"--{flag}(?!\w)", named)] == []


def test_what_the_guides_table_says_can_be_typed():
    """Rows that choose something are composed one by one, those that set something all at once: each takes half a second."""
    settings: list[str] = ["task=part_discovery"]
    spans = [re.findall(r"`([^`]+)`", ours) for _, ours in guide_rows()]
    for words in (shlex.split(span) for row in spans for span in row):
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        if all("." in word.split("=")[0] or word in ("task=part_discovery", "resume=auto") for word in overrides):
            settings += overrides[1:] if overrides[0] == "task=part_discovery" else overrides
        else:
            assert_no_problem(overrides)
    assert_no_problem(settings)


def assert_no_problem(overrides: list[str]) -> None:
    _, problems = checked(compose(overrides))
    assert [p for p in problems if p.key != "dataset.path"] == [], overrides


def rows(directory: Path, name: str) -> list[float]:
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in found if name in row]


def test_it_learns(tmp_path):
    """A shrunk proof: every part of the loss that is on pulls in one direction within thirty steps."""
    run(tmp_path, "loop.epochs=5", "loop.validate_every=5", "optimizer.lr=1e-3", "task.terms_warmup=0")
    losses = rows(tmp_path, "train/loss")
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < LEARNS * np.mean(losses[:5])


def test_the_recipe_of_ten_birds_learns_from_real_photographs(shared_data, tmp_path):
    """Two epochs of experiment=parts_cub10, to the picture and the scores of all test images."""
    shrunk = [
        "loop.epochs=2",
        "loop.validate_every=2",
        "loop.log_every=1",
        "loop.progress=none",
        "logger.plots=false",
        "dataset.num_workers=0",
    ]
    config = compose_run("experiment=parts_cub10", f"dataset.path={shared_data / 'cub10'}", *shrunk)
    result = train(config, RunDirectory(tmp_path))
    found = rows(tmp_path, "train/loss")
    assert len(found) == result["steps"] == 2 * (205 // 16)
    assert np.mean(found[-5:]) < LEARNS * np.mean(found[:5])
    assert {"val/top1", "val/top1_stage1", "val/seen_fraction"} <= result["last"].keys()
    assert result["validated_on"] == "test"
    assert [picture.name for picture in (tmp_path / "previews").rglob("*.png")] == ["parts.png"]


def test_evaluate_and_predict_tell_the_class_and_the_parts_of_every_image(tmp_path):
    done, images = tmp_path / "run", tmp_path / "images"
    run(done, "loop.validate_every=1")
    assert evaluate_verb.main([str(done), "checkpoint=last", "--name", "last"]) == 0
    out = done / "evaluations" / "last"
    scores = json.loads((out / "scores.json").read_text())
    with open(out / "predictions.csv") as file:
        told = list(csv.DictReader(file))
    assert len(told) == 20
    assert np.mean([row["correct"] == "True" for row in told]) == pytest.approx(scores["val/top1"])
    assert (out / "confusion.csv").exists()
    images.mkdir()
    source = made().dataset.build("val")
    for i in range(20):
        source[i]["image"].save(images / f"{i:02}.png")
    assert predict_verb.main([str(done), str(images), "checkpoint=last", "--out", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "predictions.csv") as file:
        found = list(csv.DictReader(file))
    assert [row["predicted"] for row in found] == [row["predicted"] for row in told]
    places = [sum(int(part.split(": ")[1]) for part in row["parts"].split("; ") if part) for row in found]
    assert 0 < max(places) <= 16
    two = ",".join(source.classes[:2])
    assert predict_verb.main([str(done), str(images), "checkpoint=last", f"classes={two}", "--out", str(tmp_path / "two")]) == 0
    with open(tmp_path / "two" / "predictions.csv") as file:
        assert {row["predicted"] for row in csv.DictReader(file)} <= set(source.classes[:2])


def test_parts_are_left_out_by_the_command_line(tmp_path):
    """`python -m trainer evaluate RUN_DIR task.remove_parts=[3]`, as it is typed; and each part in turn, whose rows say the same."""
    done = tmp_path / "run"
    run(done, "task.part_dropout_stage_2=0", "loop.steps=3", "loop.epochs=null")
    asked = {
        "whole": [],
        "less": ["task.remove_parts=[3]"],
        "each": ["task.leave_one_out=true"],
        "rest": ["task.leave_one_out=true", "task.remove_parts=[0]"],
    }
    for name, overrides in asked.items():
        arguments = [str(done), *overrides, "checkpoint=last", "--name", name]
        if name == "less":
            command = [sys.executable, "-m", "trainer", "evaluate", *arguments]
            subprocess.run(command, cwd=CONF.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        else:
            assert evaluate_verb.main(arguments) == 0
    found = {name: json.loads((done / "evaluations" / name / "scores.json").read_text()) for name in asked}
    assert found["less"]["val/seen_fraction"] < found["whole"]["val/seen_fraction"]
    tables = {}
    for name in ("each", "rest"):
        with open(done / "evaluations" / name / "leave_one_out.csv") as file:
            tables[name] = {row.pop("without"): {f"val/{key}": float(value) for key, value in row.items()} for row in csv.DictReader(file)}
    assert list(tables["each"]) == ["none", "0", "1", "2", "3"]
    assert list(tables["rest"]) == ["none", "1", "2", "3"]
    for row, scores in ((tables["each"]["none"], found["whole"]), (tables["each"]["3"], found["less"])):
        assert row.keys() == {"val/top1", "val/top1_stage1", "val/loss", "val/seen_fraction"}
        assert row == pytest.approx({name: scores[name] for name in row}, rel=1e-5)
    assert tables["rest"]["none"] == pytest.approx(tables["each"]["0"], rel=1e-5)
    assert not (done / "evaluations" / "whole" / "leave_one_out.csv").exists()


PAPER = {  # ../shared/spec/systems.md, sec. 2.2 and 2.3, and the guide's advice on batch and learning rate
    "task.stages": 2, "task.num_parts": 8, "task.gumbel": True, "task.temperature": 1.0, "task.pool": "mean", "task.modulation": "layer_norm",
    "task.part_dropout": 0.3, "task.part_dropout_stage_2": 0.3, "task.mask_gradient": "straight_through", "task.bounded_mask_gradient": False,
    "task.orthogonality_axis": "parts", "task.gumbel_at_eval": False, "task.presence_scope": "global", "task.presence_type": "original",
    "task.stage_1_weight": 1, "task.stage_2_weight": 1, "task.orthogonality_weight": 1, "task.equivariance_weight": 1, "task.presence_weight": 1,
    "task.enforced_presence_weight": 2, "task.enforced_presence_type": "enforced_presence", "task.total_variation_weight": 1, "task.entropy_weight": 1,
    "task.concentration_weight": 0, "task.equivariance_rotation": 90, "task.equivariance_translation": 0.11, "task.terms_warmup": 0,
    "task.freeze_stage_1": True, "task.freeze_stage_1_tokens": False, "task.freeze_stage_2": False, "task.stage_1_blocks": None,
    "task.scratch_lr_factor": 1e4, "task.modulation_lr_factor": 1e4, "task.finer_lr_factor": 1e3, "task.stage_two_lr_factor": 1,
    "optimizer.lr": 1e-6, "optimizer.base_batch_size": 16, "optimizer.weight_decay": 0.05, "optimizer.weight_decay_scaling": "normalized",
    "loop.batch_size": 128, "loop.max_grad_norm": 2.0, "loop.num_epochs": 90, "dataset.image_size": 518,
}  # fmt: skip


def test_defaults_are_the_papers_and_the_recipe_adds_the_weights():
    places = {name: attrgetter(name) for name in PAPER}
    for overrides in (["task=part_discovery", "dataset=cub", "model=dinov2_vit_b"], ["experiment=ifam_cub"]):
        run, _ = checked(compose([*overrides, "dataset.path=/data/CUB_200_2011"]))
        assert run is not None
        assert {name: place(run) for name, place in places.items()} == PAPER
        assert run.optimizer.scaled_lr(128) == pytest.approx(2.828e-6, rel=1e-3)
        assert run.optimizer.scaled_weight_decay(0.05, 46 * 90) == pytest.approx(7.77e-4, rel=1e-3)
        assert run.model.pretrained == (overrides[0] == "experiment=ifam_cub")


def test_the_default_run_is_what_it_was():
    """Small weights of a small network, on the embedded figures: the run directory that it has always had."""
    run = compose_run("task=part_discovery")
    assert identity(run) == "705ef83e"
    assert run.task == dataclasses.replace(  # type: ignore[type-var]
        PartDiscoveryConfig(num_parts=6, scratch_lr_factor=1.0, modulation_lr_factor=1.0, finer_lr_factor=1.0),
        gumbel=False, pool="masked_mean", part_dropout_stage_2=0.1, bounded_mask_gradient=True, equivariance_rotation=30.0,
        enforced_presence_type="linear", enforced_presence_weight=0.2, total_variation_weight=0.1, entropy_weight=0.1, concentration_weight=20.0,
        terms_warmup=0.15,
    )  # fmt: skip
    assert (run.loop.num_epochs, run.loop.batch_size, run.loop.max_reference_images, run.optimizer.lr) == (14, 32, 400, 2e-3)


@pytest.mark.parametrize(
    ("overrides", "told", "fix"),
    [
        (["task=part_discovery", "dataset=waterbirds"], "model.pretrained=false", ["model.pretrained=true"]),
        (["experiment=parts_cub10", "dataset.val_fraction=0.1"], None, []),
        (["experiment=ifam_waterbirds"], None, []),
        (["experiment=ifam_waterbirds", "precision=fp16"], "precision.autocast=float16", ["precision=bf16"]),
        (["experiment=ifam_waterbirds", "precision=fp16", "task.mask_gradient=none"], None, []),
        (["experiment=ifam_waterbirds", "precision=bf16"], None, []),
        (["task=part_discovery"], None, []),
    ],
)
def test_what_works_but_not_as_hoped_is_told_before_the_run(overrides, told, fix):
    for way_out in ([], fix):
        run, _ = checked(compose([*overrides, *way_out]))
        assert run is not None
        warned = told is not None and way_out == []
        found = list(warnings_of(run, here=False))
        assert [text.split(":")[0] for text in found] == ([told] if warned else [])


@pytest.mark.slow
def test_the_default_run_finds_parts(tmp_path):
    result = train(compose_run("task=part_discovery", "loop.progress=none"), RunDirectory(tmp_path))
    assert result["best"]["val/top1"] >= PARTS_TOP1
    assert result["best"]["val/nmi"] >= PARTS_NMI


def test_freezing_everything_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing would be trained"):
        run(tmp_path, "optimizer.rules=[{pattern: '.', lr_factor: 0}]")


def test_an_empty_validation_split_is_refused(tmp_path):
    LAYOUTS["cub"](tmp_path / "cub")
    split = tmp_path / "cub" / "train_test_split.txt"
    split.write_text("".join(f"{line.split()[0]} 1\n" for line in split.read_text().splitlines()))
    _, problems = checked(compose([*TINY, *_on(tmp_path / "cub", "cub")]))
    assert any("val split" in str(p) for p in problems), problems


def test_metadata_with_missing_rows_is_refused(tmp_path):
    LAYOUTS["cub"](tmp_path / "cub")
    labels = tmp_path / "cub" / "image_class_labels.txt"
    labels.write_text("".join(labels.read_text().splitlines(keepends=True)[:-3]))
    _, problems = checked(compose([*TINY, *_on(tmp_path / "cub", "cub")]))
    assert any("image_class_labels.txt" in str(p) and "no line for image" in str(p) for p in problems), problems


def test_masks_of_another_size_are_bad_data(tmp_path):
    LAYOUTS["cub"](tmp_path / "cub")
    for image in (tmp_path / "cub" / "images").rglob("*.jpg"):
        mask = tmp_path / "cub" / "segmentations" / image.relative_to(tmp_path / "cub" / "images").with_suffix(".png")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((7, 9), 255, np.uint8)).save(mask)
    shutil.rmtree(tmp_path / "cub" / ".trainyard", ignore_errors=True)
    with pytest.raises(DataError, match=r"9 x 7 pixels, its photograph 40 x 40"):
        run(tmp_path / "run", *_on(tmp_path / "cub", "cub"), "dataset.max_bad_samples=2")


def test_a_task_is_built_of_the_same_weights_every_time():
    config = made()
    one, two = (build_task(config, build_data(config), torch.device("cpu"), 1) for _ in range(2))
    assert isinstance(one, PartDiscovery)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
