"""experiment=linear_probe from runs that learned without labels: MAE's protocol, its normalisation included."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tasks.classification.head import NormalizedLinear, normalize_input
from tests.test_exact import MODELS, last
from trainer.errors import ConfigError
from trainer.launch import evaluate, export
from trainer.launch.compose import checked, compose, compose_run
from trainer.run import train
from trainer.rundir import RunDirectory

SHORT = [*MODELS["vit"], "loop.batch_size=16", "loop.samples_per_epoch=48", "loop.epochs=2", "loop.progress=none", "logger.plots=false",
         "loop.max_validation_batches=2", "dataset.num_workers=0", "scheduler.warmup_epochs=0"]  # fmt: skip
BEFORE = {
    "mim": ["task=mim", "loop.max_reference_images=32"],
    "dino": ["task=dino", "loop.max_reference_images=32", "task.out_dim=32", "task.hidden_dim=32", "task.bottleneck_dim=16",
             "augmentation.local_crops=1"],
}  # fmt: skip


@pytest.mark.parametrize("before", BEFORE)
def test_from_a_run_without_labels(before, tmp_path):
    """The backbone stays as it was; the head and the statistics of what it is given are trained, saved, measured and exported."""
    train(compose_run(*BEFORE[before], *SHORT), RunDirectory(tmp_path / "before"))
    probe = ["experiment=linear_probe", *SHORT, f"init_from={tmp_path / 'before' / 'checkpoints' / 'last.pt'}"]
    scores = train(compose_run(*probe), RunDirectory(tmp_path / "probe"))["last"]
    learned, found = last(tmp_path / "before")["task"], last(tmp_path / "probe")["task"]
    prefix = {"mim": "model.", "dino": "teacher.backbone."}[before]
    backbone = {name.removeprefix("model."): tensor for name, tensor in found.items() if not name.startswith("model.head.")}
    assert all(torch.equal(learned[prefix + name], tensor) for name, tensor in backbone.items())
    assert int(found["model.head.norm.num_batches_tracked"]) == 6 and found["model.head.norm.running_mean"].abs().max() > 0
    assert evaluate.main([str(tmp_path / "probe"), "checkpoint=last", "loop.max_validation_batches=2", "--name", "again"]) == 0
    again = json.loads((tmp_path / "probe" / "evaluations" / "again" / "scores.json").read_text())
    assert again["val/loss"] == pytest.approx(scores["val/loss"], rel=1e-6)
    assert export.main([str(tmp_path / "probe"), "checkpoint=last"]) == 0, "with the outputs of the original"


def test_it_is_maes_head():
    torch.manual_seed(0)
    network: Any = timm.create_model("test_vit", num_classes=10)
    theirs = nn.Sequential(
        nn.BatchNorm1d(64, affine=False, eps=1e-6), nn.Linear(64, 10)
    )  # github.com/facebookresearch/mae, main_linprobe.py
    theirs[1].load_state_dict(network.head.state_dict())
    normalize_input(network, "test_vit")
    assert network.get_classifier() is network.head and isinstance(network.head, NormalizedLinear)
    features = torch.randn(8, 64) * 3 + 1
    for _ in range(3):
        torch.testing.assert_close(network.head(features), theirs(features))
    torch.testing.assert_close(network.eval().head(features), theirs.eval()(features))


def test_what_has_no_such_head_is_refused():
    with pytest.raises(ConfigError, match="head_batch_norm=false"):
        normalize_input(nn.Sequential(nn.Conv2d(3, 10, 1), nn.Flatten()), "squeezenet1_0")
    _, problems = checked(compose(["task.head_batch_norm=true", "loop.freeze_batchnorm=true"]))
    assert [p.key for p in problems] == ["task.head_batch_norm"]
