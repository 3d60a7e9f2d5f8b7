"""Steps of masked image modelling, DINO and distillation: ours, the same written by hand, and what each saves left undone."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.ours import prepare_task
from benchmarks.peers.workload import CLIP, EMA_WEIGHT, HORIZON, LOG_EVERY, PEAK_RATE, Stamped

IMAGE, BATCH, STEPS = 224, 4, 3  # pixels, images, steps of a block
Step = Callable[[dict[str, Any]], Tensor]  # a batch to its loss


def batches(size: int, count: int) -> Stamped:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "image": torch.randn(count, 3, size, size, generator=generator), "label": torch.arange(count) % 10,
            "key": torch.arange(count) + i * 7919, "index": torch.arange(count), "count": count,
        }
        for i in range(4)
    ]  # fmt: skip
    return stamped(rows)


def stamped(rows: list[dict[str, Any]]) -> Stamped:
    stream = Stamped(rows, STEPS)
    stream.warm = 1
    return stream


def engine(task: nn.Module, stream: Stamped, *overrides: str) -> Callable[[], float]:
    fit = prepare_task(task, list(overrides))

    def block() -> float:
        fit(stream, steps=len(stream))
        return stream.microseconds()

    return block


def by_hand(parts: nn.Module, loss_of: Step, stream: Stamped, after: Callable[[int], None] | None = None) -> Callable[[], float]:
    """A loop with the services that the engine has as well (`benchmarks.peers.loops.services`). What is called `after` each update
    takes the place of averaged weights."""
    parameters = [p for p in parts.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=0.0, fused=True)
    live = [p.detach() for p in parameters]
    averaged = [p.clone() for p in live]
    total, lines, step = torch.zeros(()), [], 0

    def block() -> float:
        nonlocal step
        parts.train()
        for batch in stream:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * 0.5 * (1 + math.cos(math.pi * step / HORIZON))
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            with torch.no_grad():
                after(step) if after else torch._foreach_lerp_(averaged, live, EMA_WEIGHT)
                total.add_(loss)
            step += 1
            if step % LOG_EVERY == 0:
                lines.append((step, total.item() / LOG_EVERY))
                total.zero_()
        return stream.microseconds()

    return block


# --- MAE -----------------------------------------------------------------------------------------------------------------


def mae(how: str) -> Callable[[], float]:
    """ViT-Ti/16 at 224 pixels, three quarters hidden. `how`: ours; all, every patch encoded; hand."""
    from tasks.mim.config import MimConfig
    from tasks.mim.mae import Mae

    class EncodesAll(Mae):
        """What is hidden goes through the encoder too, and is thrown away behind it."""

        def encode(self, images: Tensor, visible: Tensor) -> Tensor:
            everything = torch.arange(self.grid[0] * self.grid[1], device=images.device).expand(len(images), -1)
            tokens = super().encode(images, everything)
            return torch.cat([tokens[:, : self.prefix], tokens[:, self.prefix :].take_along_dim(visible.unsqueeze(2), 1)], 1)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    task = (EncodesAll if how == "all" else Mae)(model, MimConfig(), patch=16, image_size=IMAGE, channels=3)
    stream = batches(IMAGE, BATCH)
    return by_hand(task, lambda batch: mae_loss(task, batch["image"]), stream) if how == "hand" else engine(task, stream)


def mae_loss(task: Any, images: Tensor) -> Tensor:
    """MAE as a script would have it, with random masks of torch's and the decoder's positions added after shuffling back."""
    vit, decoder, p = task.model, task.decoder, 16
    x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
    count, length, width = x.shape
    keep = length // 4
    shuffle = torch.rand(count, length).argsort(1)
    x = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, width))
    x = vit.norm(vit.blocks(torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(count, -1, -1), x], 1)))
    x = decoder.embed(x)
    gaps = decoder.mask_token.expand(count, length - keep, -1)
    patches = torch.cat([x[:, 1:], gaps], 1).gather(1, shuffle.argsort(1)[:, :, None].expand(-1, -1, x.shape[2]))
    x = torch.cat([x[:, :1], patches], 1) + decoder.positions
    for block in decoder.blocks:
        x = block(x)
    predicted = decoder.predict(decoder.norm(x))[:, 1:]
    side = images.shape[2] // p
    target = images.view(count, 3, side, p, side, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    mask = torch.ones(count, length).scatter(1, shuffle[:, :keep], 0.0)
    return ((predicted - target).square().mean(2) * mask).sum() / mask.sum()


# --- DINO ----------------------------------------------------------------------------------------------------------------

LARGE, LOCAL, VIEWS = 64, 32, 8  # pixels of the two large views and of the small ones, and how many of those


def dino(how: str) -> Callable[[], float]:
    """A ViT-Ti on 2 views of 64 and 8 of 32 pixels of each of four images. `how`: ours; hand."""
    from tasks.dino.config import DinoConfig
    from tasks.dino.task import Dino
    from trainer.task import Progress

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=LARGE, patch_size=8, num_classes=0, dynamic_img_size=True)
    task = Dino(network, 192, DinoConfig(out_dim=4096, momentum=0.996, freeze_last_layer_epochs=0), num_classes=0, mean=(0.5,), std=(0.5,))
    rows = [{**row, "image": torch.randn(BATCH, 2, 3, LARGE, LARGE), "local": torch.randn(BATCH, VIEWS, 3, LOCAL, LOCAL)} for row in batches(1, BATCH).batches]  # fmt: skip
    stream = stamped(rows)
    if how == "ours":
        return engine(task, stream, "loop.ema_decay=null")
    script = DinoByHand(task.student, task.teacher, task.cfg)
    torch.testing.assert_close(script.loss(rows[0]), task(rows[0], Progress(0, HORIZON, HORIZON)).loss, atol=1e-5, rtol=1e-5)
    script.center.zero_()
    return by_hand(task.student, script.loss, stream, script.follow)


class DinoByHand:
    """DINO as a script has it: every pair of views in a loop, a running centre, a teacher that follows by a cosine."""

    def __init__(self, student: Any, teacher: Any, cfg: Any) -> None:
        self.student, self.teacher, self.cfg = student, teacher, cfg
        self.center = torch.zeros(cfg.out_dim)
        self.entropy = torch.zeros(())

    def loss(self, batch: dict[str, Any]) -> Tensor:
        cfg, sizes = self.cfg, [batch[name].transpose(0, 1).flatten(0, 1) for name in ("image", "local")]
        with torch.no_grad():
            said = self.teacher.head(self.teacher.backbone(sizes[0]))
            target = F.softmax((said - self.center) / cfg.warmup_teacher_temperature, dim=-1)
            self.entropy = -(target * (target + 1e-12).log()).sum(-1).mean()  # what tells a collapse
            self.center.lerp_(said.mean(0), 1 - cfg.center_momentum)
        scores = self.student.head(torch.cat([self.student.backbone(views) for views in sizes]))
        seen, taught = (scores / cfg.student_temperature).chunk(2 + VIEWS), target.chunk(2)
        pairs = [(t, s) for i, t in enumerate(taught) for j, s in enumerate(seen) if i != j]
        return sum(-(t * F.log_softmax(s, dim=-1)).sum(-1).mean() for t, s in pairs) / len(pairs)  # type: ignore[return-value]

    def follow(self, step: int) -> None:
        momentum = 1 - (1 - self.cfg.momentum) * (1 + math.cos(math.pi * step / HORIZON)) / 2
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)


# --- distillation --------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 8, "num_classes": 10}
CROWD = 16  # images in a batch


def kd(how: str, measure: str = "time") -> Callable[[], float]:
    """A ViT-Ti learns from a ViT-S at 64 pixels. `how`: ours; gradients, which flow through the teacher's logits too; hand."""
    from tasks.kd.config import KdConfig
    from tasks.kd.task import Kd
    from tasks.kd.teachers import Look, Teacher

    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, master = timm.create_model("vit_tiny_patch16_224", **SMALL), timm.create_model("vit_small_patch16_224", **SMALL).eval()
    stream = batches(64, CROWD)
    if how == "ours":
        look = Look(64, (0.5,), (0.5,))
        block = engine(
            Kd(student, KdConfig(), [Teacher(master, look, look, name="ViT-S", features=False)], [str(c) for c in range(10)]), stream
        )
    else:
        if how == "hand":
            master.requires_grad_(False)
        block = by_hand(student, lambda batch: kd_loss(student, master, batch, keeps_gradients=how == "gradients"), stream)
    return block if measure == "time" else lambda: grown(block)


def kd_loss(student: nn.Module, master: nn.Module, batch: dict[str, Any], *, keeps_gradients: bool) -> Tensor:
    logits = student(batch["image"])
    with torch.set_grad_enabled(keeps_gradients):
        taught = master(batch["image"])
    ours, theirs = (F.log_softmax(x / 5.0, dim=1) for x in (logits, taught))
    return 0.5 * F.cross_entropy(logits, batch["label"]) + 0.5 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * 25.0


def grown(block: Callable[[], float]) -> float:
    """By how much the process is at its largest, in MB, since before its first step."""
    status = Path("/proc/self/status").read_text().splitlines()
    before = int(next(line.split()[1] for line in status if line.startswith("VmRSS")))  # kB
    block()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
