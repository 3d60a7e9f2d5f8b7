"""How long a run is and what happens at every step, whatever is being learned."""

from __future__ import annotations

import re
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
class StageConfig:
    """A stretch of a run. What it does not say is as in the rest of the run."""

    epochs: int = setting(help="its length in passes over its training data", ge=1)
    image_size: int | None = setting(None, "side in pixels of the images, in training and validation; null = dataset.image_size", ge=1)
    batch_size: int | None = setting(None, "images per optimizer step; null = loop.batch_size", ge=1)
    accumulate: int | None = setting(None, "micro-batches per optimizer step and rank; null = loop.accumulate", ge=1, identity=False)
    lr_scale: float = setting(1.0, "times the learning rate", gt=0)
    mixup: float | None = setting(None, "mixup alpha; 0 = off; null = augmentation.mixup", ge=0)
    cutmix: float | None = setting(None, "cutmix alpha; 0 = off; null = augmentation.cutmix", ge=0)
    data_fraction: float = setting(
        1.0, "use this fraction of the training samples; those of a smaller fraction are among those of a larger", gt=0, le=1
    )
    freeze_to: str | None = setting(None, "what does not train, as in loop.freeze_to; null = loop.freeze_to")


@dataclass
class LoopConfig:
    """How long a run is, and what happens at every step."""

    epochs: int | None = setting(
        None, "length of the run in passes over the training data; null = loop.default_epochs, unless loop.steps is set", ge=1
    )
    steps: int | None = setting(None, "length of the run in optimizer steps, instead of loop.epochs", ge=1)
    default_epochs: int = setting(10, "epochs when neither loop.epochs nor loop.steps is set", ge=1)
    batch_size: int = setting(64, "images per optimizer step, over all ranks and micro-batches", ge=1)
    accumulate: int = setting(
        1,
        "micro-batches per optimizer step and rank; cuts the batch up and changes nothing but what looks at a whole batch (a warning names it)",
        ge=1,
        identity=False,
    )
    drop_last: bool = setting(True, "drop an epoch's last short batch; false keeps and weights it")
    samples_per_epoch: int | None = setting(None, "images in a virtual epoch; null = the whole training set once", ge=1)

    stages: list[StageConfig] = setting(
        [],
        "the run in stages, one after the other, each with a schedule of its own: [{epochs: 10, image_size: 128, batch_size: 512, lr_scale: 1.0, mixup: 0.2, data_fraction: 1.0, freeze_to: layer2}, …]",
    )
    stage_schedule: str = setting(
        "each",
        "each: the learning rate's schedule begins anew in every stage, with a fresh optimizer; whole: one schedule over all stages, and the optimizer goes on",
        choices=["each", "whole"],
    )

    lr_finder: bool = setting(
        False,
        "before the run, sweep the learning rate and write lr_finder.csv, .json and .png with three suggestions; then everything is put back",
        identity=False,
    )
    lr_finder_use: str | None = setting(
        None,
        "train with this suggestion as the peak learning rate instead of optimizer.lr; null = only show them. steepest: where the loss falls fastest; minimum: a tenth of where it is lowest; valley: the middle of its longest descent",
        choices=["steepest", "minimum", "valley"],
    )
    lr_finder_start: float = setting(1e-7, "learning rate the sweep begins with", gt=0)
    lr_finder_end: float = setting(10.0, "learning rate the sweep ends with, unless the loss has quadrupled before", gt=0)
    lr_finder_steps: int = setting(100, "optimizer steps of the sweep", ge=20)

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
    ema_every: int = setting(1, "optimizer steps from one update of the average to the next", ge=1)
    ema_rescale: bool = setting(
        False,
        "read ema_decay as torchvision's and birder's training scripts do: the average keeps 1 - (1 - ema_decay) * batch_size * ema_every / epochs at each update, so that it is over the same share of a run of any length and batch",
    )
    swa_start: float | None = setting(
        None,
        "stochastic weight averaging (arXiv:1803.05407): from this fraction of the run on, average the weights equally, once an epoch; validated and saved as the model. Best with a learning rate that does not end at zero",
        ge=0,
        lt=1,
    )
    swa_every: int | None = setting(None, "optimizer steps between the weights that are averaged; null = an epoch", ge=1)
    max_bad_steps: int = setting(10, "give up (exit 4) after this many steps in a row with a non-finite gradient; each is skipped", ge=1)
    sync_batchnorm: bool = setting(False, "batch statistics over all ranks instead of each rank's own share")
    deterministic: bool = setting(False, "torch's deterministic algorithms: bit-identical on a GPU too, and slower")

    freeze_to: str | None = setting(
        None,
        "what does not train: the network up to and including this part of it, as layer2 or blocks.5; this many stages from its input; or backbone, all but the head. Under a detector, parts and stages are the backbone's. Frozen parts stay in evaluation mode",
    )
    freeze: list[str] = setting([], "regular expressions of further parameters that do not train, searched in their dotted names")
    freeze_batchnorm: bool = setting(False, "batch normalisation keeps the statistics and scales it has, everywhere")

    compile: bool = setting(False, "torch.compile the model; falls back to eager with one warning where that fails", identity=False)
    compile_mode: str = setting(
        "default",
        "mode of torch.compile",
        choices=["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        identity=False,
    )
    compile_regions: bool = setting(
        False, "compile each of the network's repeated blocks instead of the whole: one compilation for all alike, in a fraction of the time", identity=False
    )  # fmt: skip
    compile_fullgraph: bool = setting(
        False, "an error, instead of falling back or compiling in pieces, where the model is no single graph", identity=False
    )
    cudnn_benchmark: bool = setting(
        True, "on GPUs, try cuDNN's algorithms for each new shape and keep the fastest (not with loop.deterministic)", identity=False
    )
    batch_finder: bool = setting(
        False,
        "before each stage, find the fewest micro-batches that fit into memory, from loop.accumulate on; the batch over all ranks stays",
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
    loss_in_name: bool = setting(
        False, "numbered checkpoints carry the epoch's mean training loss in their name: epoch-0010-loss-0.1234.pt", identity=False
    )
    best_metric: str | None = setting(
        None,
        "validation metric that decides best.pt, as val/top1, or train/loss, the mean since the validation before; null = the task's own",
    )
    best_mode: str | None = setting(
        None,
        "which end of loop.best_metric is better; null = the task's own, or by its name: less of a loss or an error",
        choices=["max", "min"],
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

    @property
    def num_epochs(self) -> int:
        """The length in epochs, where it is not given in steps."""
        return sum(stage.epochs for stage in self.stages) or self.epochs or self.default_epochs

    def problems(self) -> Iterator[Problem]:
        yield from self._averages()
        yield from self._finder()
        yield from self._compilation()
        for i, pattern in enumerate(self.freeze):
            try:
                re.compile(pattern)
            except re.error as error:
                yield Problem(f"loop.freeze[{i}]", pattern, f"is not a regular expression: {error}")
        if self.freeze_to is not None and not re.fullmatch(r"[1-9]\d*|[A-Za-z_][\w.]*", self.freeze_to):
            reason = "is neither the name of a part, nor a number of stages, nor backbone"
            yield Problem("loop.freeze_to", self.freeze_to, reason, "loop.freeze_to=backbone")
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

    def _compilation(self) -> Iterator[Problem]:
        for key in ("compile_regions", "compile_fullgraph"):
            if getattr(self, key) and not self.compile:
                yield Problem(f"loop.{key}", True, "has no effect without loop.compile", "loop.compile=true")

    def _finder(self) -> Iterator[Problem]:
        if self.lr_finder_use is not None and not self.lr_finder:
            yield Problem("loop.lr_finder_use", self.lr_finder_use, "has no effect without a sweep", "loop.lr_finder=true")
        if self.lr_finder_start >= self.lr_finder_end:
            reason = f"must be less than loop.lr_finder_end={self.lr_finder_end:g}: the rate rises"
            yield Problem("loop.lr_finder_start", self.lr_finder_start, reason, f"loop.lr_finder_start={self.lr_finder_end / 1e8:g}")

    def _averages(self) -> Iterator[Problem]:
        """A run keeps one average of its weights, and what says how is only there with it."""
        if self.ema_decay is not None and self.swa_start is not None:
            reason = f"loop.ema_decay={self.ema_decay} is set too, and a run keeps one average of its weights"
            yield Problem("loop.swa_start", self.swa_start, reason, "loop.ema_decay=null or loop.swa_start=null")
        for key, needs, default in (
            ("ema_every", "ema_decay", 1),
            ("ema_rescale", "ema_decay", False),
            ("swa_every", "swa_start", None),
        ):
            value = getattr(self, key)
            if value != default and getattr(self, needs) is None:
                example = "0.9999" if needs == "ema_decay" else "0.75"
                yield Problem(f"loop.{key}", value, f"has no effect without loop.{needs}", f"loop.{needs}={example}")
