"""Other people's engines with the same services as the loop written by hand: clipping, averaged weights, loss and
accuracy kept on the device, a cosine schedule, a log every 50 steps. Everything that could be switched off is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.workload import CLIP, EMA_WEIGHT, HORIZON, LOG_EVERY, PEAK_RATE, Stamped, loss_and_hits, workload


def cosine(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / HORIZON))


class Tally:
    """Loss and accuracy on the device, read every 50 steps; and the averaged weights, as cheaply as torch has it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.live = [p.detach() for p in model.parameters()]
        self.averaged = [p.clone() for p in self.live]
        self.loss, self.hits, self.step = torch.zeros(()), torch.zeros(()), 0
        self.lines: list[tuple[int, float, float]] = []

    def metrics(self, loss: Tensor, hits: Tensor) -> None:
        self.loss += loss.detach()
        self.hits += hits
        self.step += 1
        if self.step % LOG_EVERY == 0:
            self.lines.append((self.step, self.loss.item() / LOG_EVERY, self.hits.item() / LOG_EVERY))
            self.loss.zero_()
            self.hits.zero_()

    def average(self) -> None:
        torch._foreach_lerp_(self.averaged, self.live, EMA_WEIGHT)


def hf_accelerate(net: str) -> Callable[[], float]:
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

    work = workload(net)
    batches = Stamped(work.batches, work.steps)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(work.model.parameters(), lr=PEAK_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    model, optimizer, schedule = accelerator.prepare(work.model, optimizer, schedule)
    tally = Tally(work.model)

    def block() -> float:
        model.train()
        for x, y in batches:
            with accelerator.accumulate(model):
                loss, hits = loss_and_hits(model, x, y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            tally.average()
            tally.metrics(loss, hits)
        return batches.microseconds()

    return block


def pytorch_lightning(net: str) -> Callable[[], float]:
    import lightning  # pyright: ignore[reportMissingImports]

    work = workload(net)
    batches = Stamped(work.batches, work.steps)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.model
            self.tally = Tally(work.model)

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss, hits = loss_and_hits(self.model, *batch)
            self.tally.metrics(loss, hits)
            return loss

        def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
            self.tally.average()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEAK_RATE, fused=True)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Module()

    def block() -> float:
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, gradient_clip_val=CLIP, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=LOG_EVERY,
        )  # fmt: skip
        trainer.fit(module, batches)
        return batches.microseconds()

    return block


def mosaicml_composer(net: str) -> Callable[[], float]:
    import composer  # pyright: ignore[reportMissingImports]
    from composer.algorithms import GradientClipping  # pyright: ignore[reportMissingImports]

    work = workload(net)
    batches = Stamped(work.batches, work.steps)
    tally = Tally(work.model)

    class Model(composer.ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.model

        def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            loss, hits = loss_and_hits(self.model, *batch)
            tally.metrics(loss, hits)
            return loss, hits

        def loss(self, outputs: tuple[Tensor, Tensor], batch: object) -> Tensor:
            return outputs[0]

    class Average(composer.Callback):
        def batch_end(self, state: object, logger: object) -> None:
            tally.average()

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, fused=True)

    def block() -> float:
        trainer = composer.Trainer(
            model=model, optimizers=optimizer, schedulers=torch.optim.lr_scheduler.LambdaLR(optimizer, cosine), step_schedulers_every_batch=True,
            train_dataloader=batches, max_duration="1ep", device="cpu", algorithms=[GradientClipping("norm", CLIP)],
            callbacks=[Average()], progress_bar=False, log_to_console=False, loggers=[],
        )  # fmt: skip
        trainer.fit()
        return batches.microseconds()

    return block
