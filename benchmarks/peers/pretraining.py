"""Steps of masked image modelling and of distillation: ours, the same written by hand, and what each saves left undone."""

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
    stamped = Stamped(rows, STEPS)
    stamped.warm = 1
    return stamped


def engine(task: nn.Module, stream: Stamped) -> Callable[[], float]:
    fit = prepare_task(task)

    def block() -> float:
        fit(stream, steps=len(stream))
        return stream.microseconds()

    return block


def by_hand(parts: nn.Module, loss_of: Step, stream: Stamped) -> Callable[[], float]:
    """A loop with the services that the engine has as well (`benchmarks.peers.loops.services`)."""
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
                torch._foreach_lerp_(averaged, live, EMA_WEIGHT)
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
