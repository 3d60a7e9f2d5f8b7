"""Part discovery as this project computes it, and as it was published: the second stage on turned images, hidden tokens, whole blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALL = ["task=part_discovery", "dataset.num_train=64", "dataset.num_val=16", "model=timm", "model.name=vit_tiny_patch16_224"]


def _task(*overrides: str) -> Any:
    import tasks  # noqa: F401  (registers the tasks' schemas)
    from trainer.build import build_data, build_task
    from trainer.launch.compose import compose_run

    run = compose_run(*SMALL, *overrides)
    return build_task(run, build_data(run), torch.device("cpu"), 1)


def _batch(count: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, size, size, generator=generator)
    return {"image": images, "label": torch.arange(count) % 8, "key": torch.arange(count) * 977, "index": torch.arange(count)}


def _through_both_stages(task: Any) -> Callable[..., Tensor]:
    """The equivariance term as it was published: the whole model sees the turned images, and all but the maps is dropped."""
    from tasks.part_discovery import losses
    from tasks.part_discovery.maps import TURNED_NOISE
    from tasks.part_discovery.turning import draw_turn

    def equivariance(images: Tensor, keys: Tensor, maps: Tensor, step: int) -> Tensor:
        cfg = task.cfg
        turn = draw_turn(
            task.seed, step, task.image_size,
            rotation=cfg.equivariance_rotation, translation=cfg.equivariance_translation, zoom=cfg.equivariance_zoom,
        )  # fmt: skip
        found, _ = task.model.classify(turn.apply(images), keys, map_stream=TURNED_NOISE)
        return losses.equivariance(maps, turn.undo(found.maps))

    return equivariance


FORMS = {  # name: mask_gradient, whether as published
    "published": ("none", True),  # both stages on all tokens of all images, whole blocks
    "no gradient": ("none", False),
    "default": ("straight_through", False),
}


def _form(name: str) -> Any:
    """The task with hard masks, of which 40 % of each image is foreground."""
    from timm.models.vision_transformer import Block

    from tasks.part_discovery.maps import Mask

    gradient, published = FORMS[name]
    prune = "false" if published else "null"
    task = _task("dataset.image_size=224", f"task.mask_gradient={gradient}", f"task.prune={prune}").train()
    seen = (torch.rand(2, 196, generator=torch.Generator().manual_seed(1)).argsort(1).argsort(1) < 78).float().view(2, 14, 14)

    def mask(logits: Tensor, keys: Tensor | None) -> Mask:
        total = logits.softmax(1)[:, :-1].sum(1)
        return Mask(seen + (total - total.detach()) if gradient == "straight_through" else seen, seen)

    task.model.stage_1._mask = mask
    if published:
        task.equivariance = _through_both_stages(task)
        for block in task.model.stage_2.backbone.blocks:
            block.__class__ = type("WholeBlock", (Block,), {})  # of another kind, so it is not taken apart
    return task


def step(form: str) -> Callable[[], float]:
    """Seconds of processor time of a step, forward and backward; of one thread, so a busy machine does not count."""
    from trainer.task import Progress

    task, batch = _form(form), _batch(2, 224)

    def measure() -> float:
        started = time.process_time()
        task(batch, Progress(5, 10, 5.0)).loss.backward()
        return time.process_time() - started

    measure()
    return measure


def difference(form: str) -> Callable[[], float]:
    """How far the loss of a form is from the published one's."""
    from trainer.task import Progress

    def measure() -> float:
        batch = _batch(2, 224)
        with torch.no_grad():
            ours, theirs = (_form(name)(batch, Progress(5, 10, 5.0)).loss for name in (form, "published"))
        return float((ours - theirs).abs())

    return measure


def evaluation(prune: bool, whole: bool) -> Callable[[], float]:
    """Seconds of processor time to evaluate a batch of which 40 % is foreground; the second stage alone, or both."""
    from tasks.part_discovery.maps import Mask

    task, images = _task("dataset.image_size=224", f"task.prune={str(prune).lower()}").eval(), _batch(4, 224)["image"]
    seen = torch.rand(4, 14 * 14, generator=torch.Generator().manual_seed(1)).argsort(1).argsort(1) < round(0.4 * 196)
    mask = Mask(seen.float().view(4, 14, 14), seen.float().view(4, 14, 14))

    @torch.inference_mode()
    def measure() -> float:
        started = time.process_time()
        if whole:
            task.model.stage_1(images)
        task.model.stage_2(images, mask)
        return time.process_time() - started

    measure()
    return measure


def pictures(epochs: int) -> Callable[[], float]:
    """All processor time that a picture of 16 images takes, on whatever thread: to keep images and maps during validation, to draw, to
    encode and to write. As a fraction of the training of `epochs` epochs, each of 100 steps of two images, one of which has a picture."""
    import tempfile
    from pathlib import Path

    from trainer.log.gallery import Gallery

    task, batch = _task("dataset.image_size=224").eval(), _batch(16, 224)
    task.num_val = 16
    with torch.no_grad():
        maps = task.model.stage_1(batch["image"]).maps
    one_step = step("default")

    def measure() -> float:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            started = time.process_time()
            evaluator = task.evaluator()
            evaluator.keep(batch, maps)
            gallery = Gallery(Path(folder), lambda *_: None)
            gallery.add(0, {name: picture.permute(1, 2, 0).numpy() for name, picture in evaluator.pictures().items()})
            gallery.close()
            spent = time.process_time() - started
            assert len(evaluator.shown) == 16
            assert list(Path(folder).rglob("parts.png"))
        return spent / (epochs * 100 * one_step())

    measure()
    return measure
