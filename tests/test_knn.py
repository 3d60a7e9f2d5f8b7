"""`python -m trainer knn`: the answer is scikit-learn's, on data of any classes, and the same on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from tests.layouts import LAYOUTS
from tests.ranks import run_ranks, torchrun_environments
from tests.test_exact import MODELS
from trainer import load_model
from trainer.errors import ConfigError
from trainer.launch import knn
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory

SHORT = [
    *MODELS["vit"],
    "loop.batch_size=64",
    "loop.steps=2",
    "loop.progress=none",
    "logger.plots=false",
    "dataset.num_workers=0",
    "loop.max_validation_batches=1",
]
KINDS = {
    "classification": [],
    "mim": ["loop.max_reference_images=64"],
    "dino": ["loop.max_reference_images=64", "scheduler.warmup_epochs=0", "task.out_dim=32", "task.hidden_dim=32", "task.bottleneck_dim=16", "augmentation.local_crops=1"],
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / request.param
    train(compose_run(f"task={request.param}", *SHORT, *KINDS[request.param]), RunDirectory(path))
    return path


def asked(directory: Path, *arguments: str) -> dict[str, Any]:
    assert knn.main([str(directory), *arguments]) == 0
    (out,) = sorted((directory / "evaluations").glob("knn-*"), key=lambda p: p.stat().st_mtime)[-1:]
    return json.loads((out / "scores.json").read_text())


def features(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Of every image of a split, by `load_model` alone."""
    model: Any = load_model(directory)
    source = RunDirectory(directory).read_config().dataset.build(split)
    labels = source.labels()
    assert labels is not None
    with torch.inference_mode():
        x = model.transform([source[i]["image"] for i in range(len(source))])
        tokens = model.forward_features(x)
        pooled = tokens[:, 1:].mean(1) if directory.name == "mim" else tokens[:, 0]
    return pooled.numpy(), labels


def test_it_is_what_scikit_learn_says(trained, capsys):
    found = asked(trained, "--neighbours", "5", "20")
    (bank, known), (queries, truth) = features(trained, "train"), features(trained, "val")
    assert (found["num_known"], found["num_samples"]) == (len(known), len(truth)), "all of them, whatever training has looked at"
    for k in (5, 20):
        by_likeness: Any = lambda distance: np.exp(-distance / 0.07)  # noqa: E731  (its stub knows names only)
        judge = KNeighborsClassifier(k, metric="cosine", weights=by_likeness)
        expected = judge.fit(bank, known).score(queries, truth)
        assert found[f"val/knn_top1_of_{k}"] == pytest.approx(expected, abs=1.5 / len(truth)), "a tie may fall either way"
    assert "359 images asked about" in capsys.readouterr().out


def ask(directory: str) -> int:
    import tasks  # noqa: F401

    return knn.main([directory, "--neighbours", "20"])


def test_two_ranks_say_the_same(trained, tmp_path):
    alone = asked(trained, "--neighbours", "20")
    outcomes = run_ranks(ask, torchrun_environments(2), tmp_path / "ranks", str(trained), timeout=120)
    assert [o.code for o in outcomes] == [0, 0], outcomes
    both = json.loads((trained / "evaluations" / "knn-best" / "scores.json").read_text())
    assert both["val/knn_top1_of_20"] == pytest.approx(alone["val/knn_top1_of_20"], abs=1.5 / 359)
    assert both["num_samples"] == 359


def test_other_classes_are_no_hindrance(trained, tmp_path):
    LAYOUTS["image_folder"](tmp_path / "data")
    found = asked(trained, "dataset=image_folder", f"dataset.path={tmp_path / 'data'}", "dataset.num_workers=0", "--neighbours", "1")
    assert 0 <= found["val/knn_top1_of_1"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset=digit_scenes"], r"label"),
        (["--neighbours", "0"], r"--neighbours=0: must be > 0"),
        (["model=resnet18"], r"the run's own"),
        (["checkpoint=epoch-0099"], r"epoch-0099"),
    ],
)
def test_what_cannot_be_asked(trained, arguments, message):
    with pytest.raises(ConfigError, match=message):
        knn.main([str(trained), *arguments])
