"""Distillation against timm's losses and against the formulas; teachers of every kind, and what must never happen to them."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.task import FeatureDistillationTask, LogitDistillationTask
from timm.task.token_distillation import TokenDistillationTask
from torch import nn

from tasks.kd.build import build
from tasks.kd.config import KdConfig
from tasks.kd.task import Kd
from tasks.kd.teachers import Look, Teacher
from tests.processes import finish, logs, start, start_ranks
from tests.test_exact import assert_close_runs, assert_same_run, last, stop_after
from trainer import load_model
from trainer.build import build_data, build_task
from trainer.errors import ConfigError, Stopped
from trainer.launch.compose import checked, compose, compose_run
from trainer.run import train
from trainer.rundir import RunDirectory, run_directory
from trainer.task import DataInfo, Progress

START = Progress(0, 1, 1)
IMAGENET = Look(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLASSES = tuple("0123456789")
INFO = DataInfo(num_train=8, num_val=8, classes=CLASSES, channels=3, steps_per_epoch=1, total_steps=1)
SHORT = ["loop.batch_size=16", "loop.samples_per_epoch=48", "loop.epochs=2", "loop.log_every=1", "loop.progress=none", "logger.plots=false",
         "loop.max_validation_batches=2", "dataset.num_workers=0", "scheduler.warmup_epochs=0"]  # fmt: skip
STUDENT = ["task=kd", "model=timm", "model.name=test_vit", "model.patch_size=8", "dataset.image_size=32", *SHORT]


def network(name: str, seed: int = 0, **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=10, **arguments)


def vit(seed: int = 0, name: str = "test_vit") -> nn.Module:
    return network(name, seed, img_size=32, patch_size=8)


def batch(count: int = 6, size: int = 32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(count, 3, size, size, generator=generator)
    return {"image": images, "label": torch.randint(10, (count,), generator=generator), "index": torch.arange(count)}


def teacher(seed: int = 1, *, look: Look = IMAGENET, features: bool = False, name: str = "test_resnet") -> Teacher:
    made = Teacher(network(name, seed).eval(), look, IMAGENET, name="t", features=features)
    answer = made(torch.zeros(2, 3, 32, 32))
    assert answer.logits is not None
    made.num_classes, made.width = answer.logits.shape[1], 0 if answer.features is None else answer.features.shape[1]
    return made


def task(student: nn.Module, cfg: KdConfig, *teachers: Teacher) -> Kd:
    return Kd(student, cfg, teachers, CLASSES, student_width=int(student.num_features))  # type: ignore[arg-type]


# --- against timm and the formulas ---------------------------------------------------------------------------------------


def assert_equal_to(ours: Kd, theirs: nn.Module, pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Loss and gradients on one batch."""
    for mine, other in pairs:
        other.load_state_dict(mine.state_dict())
    data = batch()
    mine, other = ours.training_step(data, START).loss, theirs(data["image"], data["label"])["loss"]
    mine.backward()
    other.backward()
    assert mine.item() == pytest.approx(other.item(), abs=1e-6)
    for module, twin in pairs:
        for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
            assert p.grad is not None, name
            assert q.grad is not None, name
            assert torch.allclose(p.grad, q.grad, atol=1e-6), name


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.3, 0.5])
def test_soft_is_timms(temperature, weight):
    master, student, twin = teacher(), vit(), vit()
    theirs = LogitDistillationTask(
        twin, master.network, nn.CrossEntropyLoss(), task_loss_weight=1 - weight, temperature=temperature, verbose=False
    )
    assert_equal_to(task(student, KdConfig(weight=weight, temperature=temperature), master), theirs, [(student, twin)])


def test_features_are_timms():
    master, student, twin = teacher(features=True), vit(), vit()
    theirs = FeatureDistillationTask(twin, master.network, nn.CrossEntropyLoss(), task_loss_weight=0.5, verbose=False)
    ours = task(student, KdConfig(method="embedding", normalize_features=False), master)
    whole: Any = theirs.trainable_module
    projection = whole.projection
    assert isinstance(projection, nn.Linear)
    assert_equal_to(ours, theirs, [(student, twin), (ours.projections[0], projection)])


def test_deit_is_timms():
    master, name = teacher(), "deit_tiny_distilled_patch16_224"
    student, twin = (network(name, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2) for _ in range(2))
    colours: Any = (student.pretrained_cfg, master.network.pretrained_cfg)
    master.students, master.look = (Look(32, cfg["mean"], cfg["std"]) for cfg in colours)
    assert master.students != master.look, "they know different colours, which timm sees to as well"
    theirs = TokenDistillationTask(twin, master.network, nn.CrossEntropyLoss(), distill_type="hard", task_loss_weight=0.5, verbose=False)
    ours = task(student, KdConfig(method="deit"), master)
    assert_equal_to(ours, theirs, [(student, twin)])
    scores = ours.eval()._scores(batch())
    averaged = student.eval()(batch()["image"])
    assert torch.allclose(scores["loss"], F.cross_entropy(averaged, batch()["label"], reduction="none")), "both heads, averaged"


def by_hand(student: nn.Module, cfg: KdConfig, masters: list[Teacher], data: dict[str, Any], projections: list[nn.Module]) -> torch.Tensor:
    """The loss of arXiv:1503.02531 and its kin, written out."""
    logits, features = student(data["image"]), student.forward_head(student.forward_features(data["image"]), pre_logits=True)  # type: ignore[operator]
    total = (1 - cfg.weight) * F.cross_entropy(logits, data.get("target", data["label"]))
    for master, projection in zip(masters, projections, strict=True):
        t, f = master.network(data["image"]), master.network.forward_head(master.network.forward_features(data["image"]), pre_logits=True)  # type: ignore[operator]
        p, q = (t / cfg.temperature).softmax(1), (logits / cfg.temperature).softmax(1)
        direction = F.normalize(projection(features), dim=1) - F.normalize(f, dim=1)
        apart = direction.square().sum() / direction.numel()
        part = {
            "soft": (p * (p.log() - q.log())).sum(1).mean() * cfg.temperature**2,
            "hard": -logits.log_softmax(1).gather(1, t.argmax(1, keepdim=True)).mean(),
            "embedding": apart,
        }[cfg.method]
        total = total + (cfg.weight * part + cfg.feature_weight * apart) / len(masters)
    return total


@pytest.mark.parametrize("method", ["soft", "hard", "embedding"])
@pytest.mark.parametrize("feature_weight", [0.0, 2.0])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_every_method_is_its_formula(method, feature_weight, count, mixed):
    cfg = KdConfig(method=method, feature_weight=feature_weight, weight=0.7, temperature=3.0)
    masters = [teacher(seed, features=True) for seed in range(1, 1 + count)]
    ours, data = task(vit(), cfg, *masters), batch()
    if mixed:
        data["target"] = torch.rand(6, 10).softmax(1)
    projections = list(ours.projections) or [nn.Linear(64, m.width) for m in masters]
    expected = by_hand(ours.model, cfg, masters, data, projections)
    assert ours.training_step(data, START).loss.item() == pytest.approx(expected.item(), rel=1e-5)


# --- what must not happen to a teacher -----------------------------------------------------------------------------------


def test_a_teacher_is_never_trained_saved_or_synchronised():
    master = teacher(features=True)
    ours = task(vit(), KdConfig(feature_weight=1.0), master)
    before = {name: value.clone() for name, value in master.network.state_dict().items()}
    ours.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert master(batch()["image"]).logits.dtype == torch.bfloat16  # type: ignore[union-attr]
        ours.training_step(batch(), START).loss.backward()
    assert not master.network.training
    assert all(p.grad is None and not p.requires_grad for p in master.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in master.network.state_dict().items()), "batch statistics included"
    theirs = {id(t) for t in (*master.network.parameters(), *master.network.buffers())}
    assert not theirs & {id(t) for t in (*ours.parameters(), *ours.buffers())}, "DDP, the average and the checkpoint see these alone"
    assert {name.split(".")[0] for name in ours.state_dict()} == {"model", "projections"}


def test_a_teacher_sees_images_as_it_knows_them():
    known = Look(48, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    master, images = teacher(look=known), torch.rand(3, 3, 32, 32)
    normalise = lambda look, x: (x - torch.tensor(look.mean).view(-1, 1, 1)) / torch.tensor(look.std).view(-1, 1, 1)  # noqa: E731
    larger = F.interpolate(images, size=(48, 48), mode="bilinear", antialias=True, align_corners=False)
    answer = master(normalise(IMAGENET, images)).logits
    assert answer is not None
    assert torch.allclose(answer, master.network(normalise(known, larger)), atol=1e-4)


# --- where teachers come from --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of a small classifier of 24 pixels."""
    path = tmp_path_factory.mktemp("teacher") / "run"
    train(compose_run("model=timm", "model.name=test_resnet", "dataset.image_size=24", *SHORT), RunDirectory(path))
    return path


def script(model: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(model, torch.zeros(2, 3, 32, 32))
        traced.save(str(path))


def open_task(*overrides: str) -> Kd:
    run = compose_run(*STUDENT, *overrides)
    assert isinstance(run.task, KdConfig)
    return build(run.task, run, INFO)


def test_a_run_and_its_checkpoint_are_teachers(trained):
    for source in (trained, trained / "checkpoints" / "best.pt"):
        (master,) = open_task(f"task.teacher={source}").teachers
        assert master.look.size == 24
        model = load_model(trained)
        images = torch.rand(2, 3, 32, 32)
        small = F.interpolate(images, size=(24, 24), mode="bilinear", antialias=True, align_corners=False)
        answer = master(images).logits
        assert answer is not None
        assert torch.allclose(answer, model(small), atol=1e-5)


def test_files_of_every_kind_are_teachers(tmp_path):
    plain = network("test_resnet", 3).eval()
    example = torch.zeros(2, 3, 32, 32)
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in plain.state_dict().items()}}, tmp_path / "weights.pth")
    script(plain, tmp_path / "traced.pt")
    exported = torch.export.export(plain, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(exported, tmp_path / "program.pt2")
    sources = [f"timm:test_resnet@{tmp_path / name}" for name in ("weights.safetensors", "weights.pth")]
    sources += [str(tmp_path / name) for name in ("traced.pt", "program.pt2")]
    several = "task.teacher=[" + ",".join(f"'{s}'" for s in sources) + "]"
    ours = open_task(several, "task.teacher_size=32", "task.teacher_mean=[0.305]", "task.teacher_std=[0.376]")
    images = torch.rand(5, 3, 32, 32)
    for master in ours.teachers:
        answer = master(images).logits
        assert answer is not None
        assert torch.allclose(answer, plain(images), atol=1e-5), master.name
    ours.training_step(batch(), START).loss.backward()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.teacher={trained}", "dataset=synthetic"], "classes"),
        (["task.teacher=timm:test_vit@{weights}"], "another network than test_vit"),
        (["task.teacher=timm:test_resnet@{other}"], "7 classes"),
        (["task.teacher=timm:test_resnett@{weights}"], "timm:test_resnet"),
        (["task.teacher={bare}"], "timm:<name>@"),
        (["task.teacher={script}", "task.feature_weight=1"], "features"),
        (["task.teacher={garbage}"], "task.teacher"),
        (["task.teacher=timm:test_resnet"], "task.teacher"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_with_the_way_out(overrides, message, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plain = network("test_resnet").eval()
    files = {name: tmp_path / f"{name}.pt" for name in ("weights", "other", "bare", "script", "garbage")}
    torch.save(plain.state_dict(), files["weights"])
    torch.save(plain.state_dict(), files["bare"])
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), files["other"])
    script(plain, files["script"])
    files["garbage"].write_bytes(b"no network")
    filled = [o.format(trained=trained, **files) for o in overrides]
    run = compose_run(*STUDENT, *filled)
    assert isinstance(run.task, KdConfig)
    info = dataclasses.replace(INFO, classes=tuple("abcdefghij")) if "dataset=synthetic" in overrides else INFO
    with pytest.raises(ConfigError, match=message) as caught:
        build(run.task, run, info)
    assert "try: " in str(caught.value)


def problems(*overrides: str) -> dict[str, str]:
    _, found = checked(compose(["task=kd", *overrides]))
    return {p.key: str(p) for p in found}


@pytest.mark.parametrize(
    ("overrides", "key", "fix"),
    [
        (["task.method=deit"], "model.name", "deit_tiny_distilled"),
        (["task.teacher=runs/not/there"], "task.teacher", "task.teacher="),
        (["task.teacher=3"], "task.teacher", "a text"),
        (["task.teacher=[]"], "task.teacher", "runs/"),
        (["task.teacher=docs"], "task.teacher", "null"),
        (["task.weight=1.5"], "task.weight", "0.5"),
        (["task.temperature=0"], "task.temperature", "5"),
        (["dataset=digit_scenes"], "dataset", "digits"),
        (["dataset=digit_scenes", "task.weight=1"], "task.num_classes", "10"),
        (["dataset=digit_scenes", "task.weight=1", "task.num_classes=10"], "task.teacher", "run directory"),
        (["task.weight=1", "task.label_smoothing=2"], "task.label_smoothing", "0"),
    ],
)
def test_what_cannot_work_is_said_before_torch_is_imported(overrides, key, fix):
    found = problems(*overrides)
    assert key in found, found
    assert fix in found[key]


# --- runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["task.method=embedding", "precision=bf16", "loop.ema_decay=0.9"],
        ["task.method=deit", "model.name=deit_tiny_distilled_patch16_224", "+model.args.embed_dim=32", "+model.args.depth=2", "+model.args.num_heads=2",
         "augmentation.mixup=0.3", "loop.accumulate=2"],
    ],
)  # fmt: skip
def test_a_stopped_run_ends_in_the_same_bits_and_needs_no_teacher_to_be_used(overrides, trained, tmp_path, monkeypatch):
    teacher_copy = tmp_path / "teacher.pt"
    teacher_copy.write_bytes((trained / "checkpoints" / "best.pt").read_bytes())
    arguments = [*STUDENT, *overrides, f"task.teacher={teacher_copy}"]
    train(compose_run(*arguments), RunDirectory(tmp_path / "unbroken"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            train(compose_run(*arguments), RunDirectory(tmp_path / "broken"))
    train(compose_run(*arguments), RunDirectory(tmp_path / "broken"))
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")
    saved = last(tmp_path / "broken")["task"]
    assert {name.split(".")[0] for name in saved} == ({"model", "projections"} if "embedding" in overrides[0] else {"model"})
    teacher_copy.unlink()
    model = load_model(tmp_path / "broken")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


DEIT = ["task.method=deit", "model.name=deit_tiny_distilled_patch16_224", "+model.args={embed_dim: 32, depth: 2, num_heads: 2}"]


@pytest.mark.parametrize(
    ("overrides", "unused"),
    [
        (["task.method=soft", "task.feature_weight=1.0", "loop.samples_per_epoch=46", "loop.drop_last=false"], False),
        (["task.method=embedding", "task.weight=1"], True),
        ([*DEIT, "task.weight=1"], True),
    ],
)
def test_two_ranks_train_what_one_does(overrides, unused, trained, tmp_path):
    """Losses and weights, the projection of features too; parts that no gradient reaches are no hindrance."""
    arguments = [*STUDENT, *overrides, f"task.teacher={trained}", "optimizer=sgd", "optimizer.lr=0.05", "loop.max_validation_batches=1"]
    assert open_task(*arguments).find_unused_parameters == unused
    both = start_ranks(tmp_path / "two", arguments, 2)
    assert finish([start(tmp_path / "one", arguments), *both]) == [0, 0, 0], logs(tmp_path / "one") + logs(tmp_path / "two")
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_without_a_teacher_one_is_trained_and_kept(tmp_path, monkeypatch):
    arguments = [*STUDENT, "task.teacher_model=test_resnet", f"runs_dir={tmp_path}"]
    run = compose_run(*arguments)
    (needed,) = run.task.prerequisites(run)
    place = run_directory(needed)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)  # of the teacher
        with pytest.raises(Stopped):
            train(run)
    assert last(place)["step"] == 3
    train(run)
    assert RunDirectory(place).is_finished()
    assert run_directory(run) != place
    written = (place / "checkpoints" / "last.pt").stat().st_mtime_ns
    other = train(compose_run(*arguments, "seed=5"))
    assert other["last"]["val/top1"] >= 0
    assert (place / "checkpoints" / "last.pt").stat().st_mtime_ns == written, "another seed's student learns from the same"


def test_a_teacher_of_its_own_is_not_frozen_as_the_student_is(tmp_path):
    """The same run as for a student that trains whole, where all of it trains."""
    frozen = ["loop.freeze_to=blocks.2", "loop.freeze=[patch_embed]", "loop.stages=[{epochs: 1, freeze_to: blocks.4}, {epochs: 1}]",
              "optimizer.backbone_lr=1e-5"]  # fmt: skip
    arguments = [*STUDENT, "task.teacher_model=test_resnet", f"runs_dir={tmp_path}"]
    plain, run = compose_run(*arguments, "loop.stages=[{epochs: 1}, {epochs: 1}]"), compose_run(*arguments, *frozen)
    (needed,) = run.task.prerequisites(run)
    assert run_directory(needed) == run_directory(plain.task.prerequisites(plain)[0])
    assert run.loop.stages[0].freeze_to == "blocks.4", "the student's stay"
    task = build_task(needed, build_data(needed), torch.device("cpu"), 1)
    assert all(p.requires_grad for p in task.parameters())


def test_runs_that_need_the_same_teacher_wait_for_whoever_trains_it(tmp_path):
    """A run on two ranks and another one, begun at the same time."""
    overrides = [*STUDENT, "task.teacher_model=test_resnet", f"runs_dir={tmp_path / 'runs'}"]
    both = [*start_ranks(tmp_path / "two", overrides, 2), start(tmp_path / "one", [*overrides, "seed=5"])]
    assert finish(both) == [0, 0, 0], logs(tmp_path / "two") + logs(tmp_path / "one")
    (place,) = (tmp_path / "runs").glob("teacher-*/*")
    assert RunDirectory(place).is_finished()
    assert len(RunDirectory(place).read_environment().get("previous", [])) == 0, "it was begun once"
    assert RunDirectory(tmp_path / "one").is_finished() and RunDirectory(tmp_path / "two").is_finished()


def test_unlabelled_images_are_enough(trained, tmp_path):
    """Whole scenes, without a word about what is on them."""
    result = train(
        compose_run(
            *STUDENT, "dataset=digit_scenes", "dataset.image_size=32", f"task.teacher={trained}", "task.weight=1", "task.num_classes=10"
        ),
        RunDirectory(tmp_path),
    )
    assert result["metric"] == "val/loss"
    assert set(result["last"]) == {"step", "epoch", "train/loss", "val/loss", "val/seconds"}
    first, last = (result["history"][i]["val/loss"] for i in (0, -1))
    assert last < first, "it comes closer to its teacher"
