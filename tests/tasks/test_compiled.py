"""`loop.compile` in tasks that do not just call their network: what is compiled is what a training step calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tasks.dino.attention import attention_maps
from tests.tasks.test_kd import script
from tests.tasks.test_mim import CONVNEXT, SWIN, VIT
from trainer.build import build_data, build_task
from trainer.config import RunConfig
from trainer.launch.compose import compose_run
from trainer.task import Progress, Task

KD = ["task=kd", *VIT, "dataset.image_size=32"]
DINO = [
    "task=dino",
    *VIT,
    "task.out_dim=16",
    "task.hidden_dim=16",
    "task.bottleneck_dim=8",
    "augmentation.local_crops=1",
    "augmentation.local_size=8",
]
CASES = {
    "kd": KD,
    "kd features": [*KD, "task.method=embedding"],
    "kd both": [*KD, "task.feature_weight=1.0"],
    "mae": ["task=mim", *VIT],
    "crossmae": ["task=mim", *VIT, "task.method=crossmae"],
    "simmim": ["task=mim", *SWIN, "task.method=simmim"],
    "fcmae": ["task=mim", *CONVNEXT],
    "dino": DINO,
    "ibot": [*DINO, "task.method=ibot"],
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[nn.Module, int]:
    """How often each part that `loop.compile` compiles has been called."""
    counted: dict[nn.Module, int] = {}

    def compile(self: Any, **arguments: Any) -> None:
        def call(*a: Any, **k: Any) -> Any:
            counted[self] += 1
            return self._call_impl(*a, **k)

        counted[self], self._compiled_call_impl = 0, call

    monkeypatch.setattr(nn.Module, "compile", compile)
    return counted


def teacher(path: Path) -> str:
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    return f"task.teacher=timm:test_resnet@{path}"


def made(run: RunConfig) -> Task:
    return build_task(run, build_data(run), torch.device("cpu"), 1)


def step(run: RunConfig) -> None:
    task, size = made(run), run.dataset.image_size
    place = torch.arange(4)
    batch = {"image": torch.randn(4, 3, size, size), "label": place, "key": place, "index": place}
    if run.task.views:
        large, small = torch.randn(4, 2, 3, size, size), torch.randn(4, 1, 3, 8, 8)
        batch |= {"image": large, "local": small, "mask": torch.rand(4, 2, 4, 4) < 0.5}
    task.train()(batch, Progress(0, 1, 1)).loss.backward()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_step_calls_every_part_that_is_compiled(case, blocks, calls, tmp_path):
    known = [teacher(tmp_path / "teacher.pt")] if "kd" in case else []
    step(compose_run(*CASES[case], *known, "loop.compile=true", f"loop.compile_regions={blocks}"))
    assert calls
    assert all(calls.values()), [type(part).__name__ for part, count in calls.items() if not count]
    if "kd" in case:
        assert len(calls) == (6 + 1 if blocks else 2), "the student's blocks and the teacher, which repeats none"


def test_a_teacher_of_torchscript_is_left_as_it_is(tmp_path):
    script(timm.create_model("test_resnet", num_classes=10).eval(), tmp_path / "teacher.pt")
    task = made(compose_run(*KD, f"task.teacher={tmp_path / 'teacher.pt'}", "loop.compile=true"))
    (student,) = task.compiled_parts()
    assert student is task.network() and student._compiled_call_impl is not None


def test_attention_is_seen_through_compiled_blocks():
    vit: Any = timm.create_model("test_vit", num_classes=0, img_size=16, patch_size=4).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = attention_maps(vit, images)
    for block in vit.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        vit(images)
    torch.testing.assert_close(attention_maps(vit, images), expected)
