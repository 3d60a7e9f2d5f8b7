"""Whole runs of DINO: exact resumption, ranks, what validation measures and draws, what the weights are good for afterwards, bad input."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tasks.dino.attention import attention_maps
from tasks.dino.task import Dino
from tests.processes import finish, logs, start, start_ranks
from tests.test_exact import assert_same_run, last, stop_after
from trainer import load_model
from trainer.build import build_data, build_task
from trainer.config import RunConfig
from trainer.errors import ConfigError, Stopped
from trainer.launch import predict
from trainer.launch.compose import checked, compose, compose_run
from trainer.run import train
from trainer.rundir import RunDirectory

SHORT = ["task=dino", "loop.batch_size=8", "loop.samples_per_epoch=24", "loop.epochs=2", "loop.log_every=1", "loop.progress=none", "logger.plots=false",
         "loop.max_validation_batches=2", "loop.max_reference_images=32", "dataset.num_workers=0", "scheduler.warmup_epochs=0",
         "task.out_dim=32", "task.hidden_dim=32", "task.bottleneck_dim=16", "augmentation.local_crops=2",
         "task.centering=mean"]  # the papers': as it comes, the task balances instead  # fmt: skip
VIT = ["model=timm", "model.name=test_vit", "model.patch_size=4", "dataset.image_size=16"]
CONVNET = ["model=timm", "model.name=test_resnet", "dataset.image_size=32", "augmentation.local_size=24"]
RUNS = {
    "vit": [*VIT, "model.drop_path_rate=0.2", "model.drop_rate=0.1"],
    "convnet": CONVNET,
    "micro-batches": [*VIT, "loop.accumulate=2", "precision=bf16"],
    "ibot": [*VIT, "task.method=ibot", "model.drop_path_rate=0.2"],
    "dinov2": [
        *VIT,
        "task.method=dinov2",
        "task.centering=sinkhorn",
        "optimizer.weight_decay_end=0.4",
        "loop.max_grad_norm=0.1",
        "loop.clip_mode=parameter",
    ],
}


def run(directory: Path, *overrides: str):
    return train(compose_run(*SHORT, *overrides), RunDirectory(directory))


def made(*overrides: str) -> RunConfig:
    """A run whose data are not there."""
    found, _ = checked(compose(overrides))
    assert found is not None
    return found


def make(*overrides: str) -> Dino:
    cfg = compose_run(*SHORT, *overrides)
    task = build_task(cfg, build_data(cfg), torch.device("cpu"), 1)
    assert isinstance(task, Dino)
    return task


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished run of a ViT."""
    directory = tmp_path_factory.mktemp("dino") / "done"
    run(directory, *RUNS["vit"])
    return directory


# --- the same numbers, however it comes about -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_ends_in_the_same_bits(name, tmp_path, monkeypatch, done):
    """Teacher, centres, prototypes that rest in the first epoch, masks and schedules included."""
    if name != "vit":
        run(tmp_path / "unbroken", *RUNS[name])
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            run(tmp_path / "broken", *RUNS[name])
    assert last(tmp_path / "broken")["step"] == 4
    run(tmp_path / "broken", *RUNS[name])
    assert_same_run(done if name == "vit" else tmp_path / "unbroken", tmp_path / "broken")
    task = last(tmp_path / "broken")["task"]
    assert task["center"].abs().max() > 0
    assert any(name.startswith("teacher.backbone.") for name in task)


@pytest.mark.parametrize("method", ["dino", "ibot", "dinov2"])
def test_two_ranks_are_one(method, tmp_path):
    """No batch normalisation, no noise: weights, teacher and centres; DINOv2 balances and compares over all ranks."""
    overrides = [
        *SHORT,
        *VIT,
        f"task.method={method}",
        f"task.centering={'sinkhorn' if method == 'dinov2' else 'mean'}",
        "optimizer=sgd",
        "optimizer.lr=0.05",
        "loop.drop_last=false",
        "loop.samples_per_epoch=22",
    ]
    two = start_ranks(tmp_path / "two", overrides, 2)
    assert finish([start(tmp_path / "one", overrides), *two]) == [0, 0, 0], logs(tmp_path / "one") + logs(tmp_path / "two")
    one, other = last(tmp_path / "one")["task"], last(tmp_path / "two")["task"]
    for name, tensor in one.items():
        torch.testing.assert_close(
            other[name], tensor, atol=1e-5 if name.endswith("center") else 1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    rows = [[r["train/loss"] for r in lines(tmp_path / d) if "train/loss" in r] for d in ("one", "two")]
    torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), atol=1e-5, rtol=0)


def test_schedules_are_the_runs_whatever_stages_it_has(tmp_path):
    """The temperature warms up over the epochs of the run, which differ in length from stage to stage."""
    run(tmp_path, *VIT, "loop.epochs=3", "loop.stages=[{epochs: 1}, {epochs: 2, batch_size: 12}]", "task.teacher_temperature=0.04",
        "task.warmup_teacher_temperature=0.02", "task.warmup_teacher_temperature_epochs=3")  # fmt: skip
    heat = [row["train/teacher_temperature"] for row in lines(tmp_path) if "train/loss" in row]
    assert heat == pytest.approx([0.02] * 3 + [0.03] * 2 + [0.04] * 2)


def test_overfitting_one_batch_still_compares_views(tmp_path):
    run(tmp_path / "run", *VIT, "debug=overfit", "loop.epochs=2", "loop.samples_per_epoch=null")
    assert lines(tmp_path / "run")


# --- validation ------------------------------------------------------------------------------------------------------------


def test_validation_measures_features_and_signs_of_a_collapse(done):
    result = json.loads((done / "result.json").read_text())
    assert result["metric"] == "val/knn_top1" and result["mode"] == "max"
    assert result["last"].keys() >= {
        f"val/{n}" for n in ("knn_top1", "linear_top1", "feature_std", "teacher_entropy", "prototype_entropy", "center_norm")
    }
    rows = [row for row in lines(done) if "train/loss" in row]
    assert rows[-1].keys() >= {
        f"train/{n}" for n in ("teacher_entropy", "center_norm", "feature_std", "teacher_momentum", "teacher_temperature")
    }
    momenta = [row["train/teacher_momentum"] for row in rows]
    assert momenta == sorted(momenta) and momenta[0] < momenta[-1] < 1


def test_pictures_of_attention(done):
    (picture, *_) = sorted((done / "previews").glob("step-*/attention.png"))
    with Image.open(picture) as image:
        heads = timm.create_model("test_vit").blocks[-1].attn.num_heads  # type: ignore[index]
        assert image.size == ((heads + 2) * 16, 8 * 16)
        assert len(image.convert("L").getcolors() or ()) > 20


def test_attention_maps_are_the_networks_own():
    """The same weights as timm computes where it does not fuse them away."""
    vit = timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8).eval()
    attention = vit.blocks[-1].attn  # type: ignore[index]
    attention.fused_attn = False
    seen = []
    attention.attn_drop.register_forward_hook(lambda *a: seen.append(a[2]))
    images = torch.randn(3, 3, 32, 32)
    maps = attention_maps(vit, images)
    torch.testing.assert_close(maps.flatten(2), seen[0][:, :, 0, 1:])


def test_attention_of_class_tokens_alone_is_the_networks_own():
    xcit = timm.create_model("xcit_nano_12_p8_224", num_classes=0, embed_dim=32, depth=1, num_heads=4).eval()
    attention = xcit.cls_attn_blocks[-1].attn  # type: ignore[index]
    attention.fused_attn = False
    seen = []
    attention.attn_drop.register_forward_hook(lambda *a: seen.append(a[2]))
    images = torch.randn(3, 3, 32, 48)
    maps = attention_maps(xcit, images)
    assert maps.shape == (3, 4, 4, 6)
    torch.testing.assert_close(maps.flatten(2), seen[0][:, :, 0, 1:])


COLLAPSES = {  # what happens: what is said of it, what is not, with which centering
    "alike": ("the teacher finds all prototypes alike", "the same", "mean", "task.teacher_temperature=0.01"),
    "one": ("the teacher says the same of nearly every image", "alike", "mean", "task.center_momentum=0.45"),
    "one, balanced": ("the teacher says the same of nearly every image", "center_momentum", "sinkhorn", "loop.batch_size"),
    "features": ("the features of all images point the same way", "center_momentum", "sinkhorn", "task.koleo_weight=0.1"),
}


@pytest.mark.parametrize("collapse", COLLAPSES)
def test_a_collapse_is_named_with_what_to_change(collapse, caplog):
    says, leaves_out, centering, helps = COLLAPSES[collapse]
    task = make(*VIT, "dataset=synthetic", "dataset.num_classes=3", f"task.centering={centering}").eval()
    with torch.no_grad():
        if collapse == "alike":
            for p in task.teacher.head.parameters():
                p.zero_()
            task.teacher.head.last_layer.weight_v.fill_(1.0)
        elif collapse == "features":
            task.teacher.backbone.norm.weight.fill_(1e-4)
            task.teacher.backbone.norm.bias.fill_(1.0)
        else:
            task.center[1:] = 10.0
    evaluator = task.evaluator()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        evaluator.update({"image": torch.randn(8, 3, 16, 16), "label": torch.zeros(8).long(), "index": torch.arange(8)})
        evaluator.compute()
    said = next(record.message for record in caplog.records if says in record.message)
    assert helps in said
    assert leaves_out not in said


def test_a_network_that_has_not_learned_yet_has_not_collapsed(caplog):
    task = make("model=xcit_micro").eval()
    evaluator = task.evaluator()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        evaluator.update({"image": torch.randn(8, 3, 32, 32), "label": torch.zeros(8).long(), "index": torch.arange(8)})
        scores = evaluator.compute()
    assert scores["feature_std"] < 0.05
    assert "point the same way" not in caplog.text


def test_without_labels_it_learns_and_watches_all_the_same(tmp_path):
    run(tmp_path / "run", *VIT, "dataset=digit_scenes", "loop.epochs=1")
    result = json.loads((tmp_path / "run" / "result.json").read_text())["last"]
    assert "val/feature_std" in result
    assert "val/knn_top1" not in result


# --- what the weights are good for ---------------------------------------------------------------------------------------


def test_the_teacher_fine_tunes_in_classification(done, tmp_path, capsys):
    overrides = ["task=classification", *VIT, *SHORT[1:11], f"init_from={done}"]
    train(compose_run(*overrides), RunDirectory(tmp_path / "tuned"))
    said = capsys.readouterr().out
    size = len(timm.create_model("test_vit").state_dict())
    assert f"{size - 2} of {size} tensors loaded" in said, said
    assert "in the source only" not in said


def test_the_exported_backbone_is_plain_timm(done):
    weights = done / "checkpoints" / "model.safetensors"
    plain = timm.create_model("test_vit", num_classes=0, img_size=16, patch_size=4, checkpoint_path=str(weights)).eval()
    model = load_model(done, "last")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(images), model(images))
    teacher = {n.removeprefix("teacher.backbone."): t for n, t in last(done)["task"].items() if n.startswith("teacher.backbone.")}
    assert all(torch.equal(plain.state_dict()[n], t) for n, t in teacher.items())


def test_predict_writes_the_teachers_features(done, tmp_path):
    paths = [tmp_path / "images" / name for name in ("b/1.png", "a.png", "c.png")]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (20 + i, 24, 3), generator=torch.Generator().manual_seed(i)).byte().numpy()).save(path)
    (tmp_path / "images" / "broken.png").write_bytes(b"not a picture")
    assert predict.main([str(done), str(tmp_path / "images"), "checkpoint=last", "--out", str(tmp_path / "out")]) == 0
    with np.load(tmp_path / "out" / "features.npz") as found:
        assert found["files"].tolist() == ["a.png", "b/1.png", "c.png"], "those that can be read"
        model = load_model(done, "last")
        expected = model(model.transform(sorted(paths)))  # type: ignore[operator]
        torch.testing.assert_close(torch.from_numpy(found["features"]), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"classes=1,2.*tells no classes apart(?s:.*)task=classification"):
        predict.main([str(done), str(tmp_path / "images"), "classes=1,2"])


# --- bad input ----------------------------------------------------------------------------------------------------------------

BAD = {
    "patches": (["dataset.image_size=18"], "dataset.image_size", "must be a multiple of 4"),
    "local patches": (["augmentation.local_size=10"], "augmentation.local_size", "patches of 4"),
    "local larger": (["augmentation.local_size=32"], "augmentation.local_size", "larger than the large ones"),
    "batch of one": (["loop.batch_size=1"], "loop.batch_size", "nothing is left"),
    "micro-batch of one": (["task.method=dinov2", "loop.accumulate=8"], "loop.accumulate", "loop.accumulate=4"),
    "one image": (["dataset=synthetic", "dataset.num_train=1", "loop.samples_per_epoch=null"], "dataset", "told apart"),
    "augmentation": (["augmentation=basic"], "augmentation", "augmentation=dino"),
    "average": (["loop.ema_decay=0.9"], "loop.ema_decay", "task.momentum"),
    "warm-up": (["task.warmup_teacher_temperature_epochs=3"], "task.warmup_teacher_temperature_epochs", "ends after 2 epochs"),
    "warm-up of stages": (
        ["task.warmup_teacher_temperature_epochs=3", "loop.epochs=null", "loop.stages=[{epochs: 1}, {epochs: 1}]"],
        "task.warmup_teacher_temperature_epochs",
        "ends after 2 epochs",
    ),
    "mask ratio": (["task.method=ibot", "task.mask_ratio=[0.5,0.1]"], "task.mask_ratio", "task.mask_ratio=[0.1,0.5]"),
    "convnet for ibot": (["task.method=ibot", "model=resnet18"], "model.name", "task.method=dino"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_way_out(case):
    overrides, key, says = BAD[case]
    local = [o for o in SHORT if not (case == "augmentation" and o.startswith("augmentation."))]
    network = [] if "model=resnet18" in overrides else VIT
    _, problems = checked(compose([*local, *network, *overrides]))
    (problem,) = [p for p in problems if p.key == key]
    assert says in str(problem)
    assert problem.fix


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model=timm", "model.name=swin_tiny_patch4_window7_224", "dataset.image_size=224", "task.method=ibot"], "it takes a ViT"),
        (["model=timm", "model.name=mixer_s16_224", "dataset.image_size=224"], "cannot take views of 96 beside 224"),
    ],
)
def test_what_only_the_network_knows_is_refused_before_the_first_step(overrides, says):
    with pytest.raises(ConfigError, match=says):
        make(*overrides)


# --- what is chosen for it ----------------------------------------------------------------------------------------------------


def test_views_fit_the_images_and_the_network():
    digits = compose_run("task=dino").augmentation
    photos = made("task=dino", "dataset=image_folder", "model=vit_s").augmentation
    assert (digits.hflip, photos.hflip) == (0, 0.5), "a mirrored digit is another one"
    assert (digits.local_size, photos.local_size) == (16, 96)  # type: ignore[attr-defined]
    assert photos.local_scale == [0.05, 0.4]  # type: ignore[attr-defined]
    assert compose_run("task=dino", "augmentation.hflip=0.3").augmentation.hflip == 0.3


@pytest.mark.parametrize("recipe", ["dino_vit_s16", "dino_vit_s16_300", "ibot_vit_s16", "dino_cifar10"])
def test_recipes_are_whole(recipe):
    _, problems = checked(compose([f"experiment={recipe}"]))
    assert {p.key for p in problems} <= {"dataset.path"}, "only where the data lie is left to say"
