"""Everything a run must remember to carry on after a kill, and nothing else.

What is not here follows from (seed, rank, step): data order, augmentation, noise, learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from trainer.ema import Ema
from trainer.errors import ConfigError, Problem
from trainer.task import DataInfo, Task

FORMAT = 1  # of the checkpoint; raised when a reader of today could not read it


@dataclass
class TrainState:
    task: Task
    optimizers: Sequence[Optimizer]
    scaler: GradScaler | None  # fp16 only
    ema: Ema | None
    step: int = 0  # optimizer steps finished
    samples: int = 0  # images consumed, over all ranks: the position in the data
    seconds: float = 0.0  # spent training, over all starts
    skipped: int = 0  # steps left out for a gradient that was not finite
    best: dict[str, Any] | None = None  # {"step", "epoch", metric: value, ...} of the best validation
    validated: int = 0  # step of the last validation
    accumulate: int | None = None  # micro-batches of a step, where they were found and not given
    lr_factor: float = 1.0  # on the config's learning rates, where a sweep has found another
    history: list[dict[str, Any]] = field(default_factory=list)  # one row per validation, for result.json

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors only, so that it loads with `weights_only=True`."""
        hidden = tuple(f"{name}." for name in self.task.never_trained())
        return {
            "format": FORMAT,
            "task": {k: v for k, v in self.task.state_dict().items() if not k.startswith(hidden)}
            if hidden
            else dict(self.task.state_dict()),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema": self.ema.state_dict() if self.ema else None,
            "network": network_name(self.task),
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "best": self.best,
            "validated": self.validated,
            "history": list(self.history),
            "accumulate": self.accumulate,
            "lr_factor": self.lr_factor,
        }

    def scale_rates(self, factor: float) -> None:
        """Multiply every peak learning rate. Before the engine is made, which takes them as they are."""
        self.lr_factor *= factor
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] *= factor

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        hidden = tuple(f"{name}." for name in self.task.never_trained())
        load_strictly(self.task, saved["task"], hidden)
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            peaks = [{k: group[k] for k in ("lr", "weight_decay") if k in group} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            # The saved rates and decays are those of one moment of the schedule; what they are a fraction of comes from the config.
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group.update(peak)
        if self.scaler and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema and saved["ema"]:
            self.ema.load_state_dict(saved["ema"])
        self.step, self.samples, self.seconds = saved["step"], saved["samples"], saved["seconds"]
        self.skipped, self.best, self.validated = saved["skipped"], saved["best"], saved["validated"]
        self.history = list(saved["history"])
        self.accumulate = saved.get("accumulate")
        self.scale_rates(saved.get("lr_factor", 1.0))


def network_name(task: Task) -> str | None:
    """The dotted name of the exported network inside its task; None where it is not one of its submodules."""
    try:
        network = task.network()
    except AttributeError:  # a task that exports nothing
        return None
    return next((name for name, module in task.named_modules() if module is network), None)


def load_strictly(task: Task, weights: Mapping[str, Tensor], hidden: tuple[str, ...]) -> None:
    """Load every weight. Those under `hidden` prefixes are rebuilt, not saved: they may be missing, and saved ones are left out."""
    own = task.state_dict()
    if hidden:
        weights = {name: weight for name, weight in weights.items() if not name.startswith(hidden)}
    missing = [name for name in own if name not in weights and not (hidden and name.startswith(hidden))]
    unknown = [name for name in weights if name not in own]
    shapes = [
        f"{name} {tuple(w.shape)} here {tuple(own[name].shape)}"
        for name, w in weights.items()
        if name in own and w.shape != own[name].shape
    ]
    if missing or unknown or shapes:
        found = "; ".join(
            f"{what}: {', '.join(names[:3])} …"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
            if names
        )
        raise ConfigError(
            Problem(
                "resume",
                "auto",
                f"the checkpoint in this run directory is of another model ({found})",
                "resume=never starts a new run beside it",
            )
        )
    task.load_state_dict(weights, strict=not hidden)


def portrait(config: Mapping[str, Any], info: DataInfo) -> dict[str, Any]:
    """What a lone checkpoint file needs beside its weights to rebuild the model."""
    return {
        "config": dict(config),
        "classes": list(info.classes),
        "channels": info.channels,
        "data": {
            "num_train": info.num_train,
            "num_val": info.num_val,
            "steps_per_epoch": info.steps_per_epoch,
            "total_steps": info.total_steps,
        },
    }
