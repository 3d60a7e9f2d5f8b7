"""One step of DINO on 2 + 8 views of two images: views of one size together, or each by itself. The same networks, the same loss."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

IMAGES = 2


def grouped(model: str) -> Callable[[], float]:
    """Milliseconds of CPU time of a step of ours."""
    task, batch, progress = _prepared(model)
    return _timed(task, lambda: task(batch, progress).loss)


def one_by_one(model: str) -> Callable[[], float]:
    """A forward for each view, backbone and head, as one writes it down first."""
    from tasks.dino.loss import sharpened, view_loss

    task, batch, progress = _prepared(model)

    def loss() -> Tensor:
        large, small = batch["image"].unbind(1), batch["local"].unbind(1)
        with torch.no_grad():
            said = torch.stack([task.teacher.head(task.teacher.backbone(view)) for view in large])
        seen = torch.stack([task.student.head(task.student.backbone(view)) for view in (*large, *small)])
        return view_loss(seen, sharpened(said, task.center, task.temperature(progress)), task.cfg.student_temperature)

    torch.testing.assert_close(loss(), task(batch, progress).loss, atol=1e-5, rtol=1e-5)  # or the comparison says nothing
    return _timed(task, loss)


def _prepared(model: str):
    import tasks  # noqa: F401  (registers the tasks' schemas)
    from tasks.dino.build import build
    from trainer.launch.compose import compose_run
    from trainer.task import DataInfo, Progress

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = ("dataset.image_size=224", "augmentation.local_size=96", "augmentation.local_crops=8")
    run = compose_run("task=dino", f"model={model}", "task.centering=mean", *sizes)
    task = build(run.task, run, DataInfo(2, 0, (), 3, 1, 1)).train()  # type: ignore[arg-type]
    views = {"image": torch.randn(IMAGES, 2, 3, 224, 224), "local": torch.randn(IMAGES, 8, 3, 96, 96)}
    return task, views, Progress(0, 1, 1)


def _timed(task: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    def block() -> float:
        task.sums.clear()  # type: ignore[operator, union-attr]  # what the step's update would take up
        started = time.process_time()
        loss().backward()
        task.zero_grad(set_to_none=True)
        return (time.process_time() - started) * 1e3

    block()  # the first one allocates
    return block
