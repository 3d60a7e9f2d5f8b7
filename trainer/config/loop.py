"""How long a run is and what happens at every step, whatever is being learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from trainer.config.fields import setting
from trainer.errors import Problem


class Progressing(Enum):
    """How progress is shown."""

    auto = "auto"  # a bar on a terminal, lines otherwise
    bar = "bar"
    lines = "lines"
    none = "none"


@dataclass
class LoopConfig:
    """How long a run is, and what happens at every step."""

    epochs: int | None = setting(
        None, "length of the run in passes over the training data; null = loop.default_epochs, unless loop.steps is set", ge=1
    )
    steps: int | None = setting(None, "length of the run in optimizer steps, instead of loop.epochs", ge=1)
    default_epochs: int = setting(10, "epochs when neither loop.epochs nor loop.steps is set", ge=1)
    batch_size: int = setting(64, "images per optimizer step, over all ranks and micro-batches", ge=1)
    accumulate: int = setting(1, "micro-batches per optimizer step and rank; cuts the batch up, changes nothing else", ge=1, identity=False)
    drop_last: bool = setting(True, "drop an epoch's last short batch; false keeps and weights it")
    samples_per_epoch: int | None = setting(None, "images in a virtual epoch; null = the whole training set once", ge=1)

    max_grad_norm: float | None = setting(
        None, "clip gradients to this norm, of the kind that loop.clip_mode says; null = no clipping", gt=0
    )
    clip_mode: str = setting(
        "norm",
        "norm: all gradients together by their L2 norm; parameter: each parameter's by its own; value: every entry; agc: each unit's in "
        "proportion to its weights' norm (arXiv:2102.06171), all but the classifier's",
        choices=["norm", "parameter", "value", "agc"],
    )
    ema_decay: float | None = setting(
        None,
        "keep an exponential moving average of the weights with this decay per optimizer step (less in the first steps: (1 + step) / (10 + step)); validated and saved as the model",
        ge=0,
        lt=1,
    )
    max_bad_steps: int = setting(10, "give up (exit 4) after this many steps in a row with a non-finite gradient; each is skipped", ge=1)
    sync_batchnorm: bool = setting(False, "batch statistics over all ranks instead of each rank's own share")
    deterministic: bool = setting(False, "torch's deterministic algorithms: bit-identical on a GPU too, and slower")

    compile: bool = setting(False, "torch.compile the model; falls back to eager with one warning where that fails", identity=False)
    compile_mode: str = setting(
        "default",
        "mode of torch.compile",
        choices=["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        identity=False,
    )
    channels_last: bool = setting(False, "NHWC memory layout: faster convolutions on GPUs", identity=False)
    activation_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about a third slower", identity=False
    )

    log_every: int = setting(50, "optimizer steps between log lines", ge=1, identity=False)
    validate_every: int | None = setting(1, "epochs between validations; null = only at the end", ge=1)
    validate_every_steps: int | None = setting(None, "optimizer steps between validations, instead of epochs", ge=1)
    checkpoint_every: int | None = setting(1, "epochs between checkpoints; null = only at the end", ge=1, identity=False)
    checkpoint_every_steps: int | None = setting(None, "optimizer steps between checkpoints, as well as at epochs", ge=1, identity=False)
    keep_checkpoints: int = setting(
        1, "how many numbered checkpoints (epoch-0010.pt) to keep beside last and best; 0 = none", ge=0, identity=False
    )
    best_metric: str | None = setting(
        None,
        "validation metric that decides best.pt, as val/top1, or train/loss, the mean since the validation before; null = the task's own",
    )
    max_reference_images: int | None = setting(
        50_000, "training images that a validation by nearest neighbours or a linear probe compares with; null = all", ge=1
    )
    preview_every: int | None = setting(
        1, "validations between two sets of pictures in previews/, where the task has some; null = none", ge=1, identity=False
    )
    max_validation_batches: int | None = setting(None, "validate on this many batches at most; null = all", ge=1)
    max_hours: float | None = setting(
        None, "stop with a checkpoint (exit 75) after this many hours; null = no limit but SLURM's", gt=0, identity=False
    )
    progress: Progressing = setting(Progressing.auto, "how progress is shown", identity=False)

    def problems(self) -> Iterator[Problem]:
        if self.epochs is not None and self.steps is not None:
            yield Problem(
                "loop.steps",
                self.steps,
                f"loop.epochs={self.epochs} is set too: a run has one length",
                "loop.epochs=null or loop.steps=null",
            )
        if self.validate_every_steps is not None and self.validate_every not in (None, 1):
            yield Problem(
                "loop.validate_every_steps",
                self.validate_every_steps,
                f"loop.validate_every={self.validate_every} is set too",
                "loop.validate_every=null",
            )
