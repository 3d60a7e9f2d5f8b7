"""Backbones that learned without labels, in runs of ours, under a detector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer import load_model
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory

SHORT = ["loop.batch_size=8", "loop.samples_per_epoch=16", "loop.epochs=1", "loop.progress=none", "logger.plots=false",
         "loop.max_validation_batches=1", "dataset.num_workers=0", "scheduler.warmup_epochs=0"]  # fmt: skip
VIT, RESNET = ["model=timm", "model.name=test_vit", "model.patch_size=8"], ["model=timm", "model.name=test_resnet"]
DINO = ["task=dino", "dataset.image_size=32", "augmentation.local_size=24", "augmentation.local_crops=2", "task.out_dim=32",
        "task.hidden_dim=32", "task.bottleneck_dim=16", "loop.max_reference_images=16"]  # fmt: skip
LEARNED: dict[str, tuple[list[str], list[str]]] = {  # network, and how it learns
    "dino": (RESNET, DINO),
    "dino-vit": (VIT, DINO),
    "mae": (VIT, ["task=mim", "task.method=mae", "dataset.image_size=32", "loop.max_reference_images=16"]),
}
BODY = "model.detector.backbone.body.net."
DETECTION = ["task=detection", "dataset.image_size=64", "dataset.num_train=8", "dataset.num_val=4", "task.width=32", "task.roi_samples=8",
             "+task.args.rpn_post_nms_top_n_train=32", "+task.args.rpn_post_nms_top_n_test=32", "optimizer.lr=1e-12"]  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_a_run_without_labels_becomes_a_backbone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    network, learning = LEARNED[name]
    train(compose_run(*SHORT, *network, *learning), RunDirectory(tmp_path / "learned"))
    learned = load_model(tmp_path / "learned").state_dict()
    capsys.readouterr()
    done = train(compose_run(*SHORT, *network, *DETECTION, f"init_from={tmp_path / 'learned'}"), RunDirectory(tmp_path / "run"))
    assert "val/map" in done["last"]
    after = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["task"]
    body = {n.removeprefix(BODY): w for n, w in after.items() if n.startswith(BODY)}
    said = capsys.readouterr().out
    assert f"{len(body)} of {len(after)} tensors loaded" in said, said
    fixed = {n: w for n, w in body.items() if w.is_floating_point() and "running" not in n and w.shape == learned[n].shape}
    assert len(fixed) >= sum(n.endswith("weight") for n in body)
    for n, weights in fixed.items():
        torch.testing.assert_close(weights, learned[n], atol=1e-6, rtol=0)
    if "vit" in "".join(network):  # at another size: positions are resampled
        assert body["pos_embed"].shape != learned["pos_embed"].shape and "pos_embed 1×" in said
