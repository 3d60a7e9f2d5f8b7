"""Optimizers, and which parameters get which learning rate and weight decay: rules as data."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from trainer.config.fields import setting
from trainer.config.schemas import schema
from trainer.errors import Problem

if TYPE_CHECKING:
    from torch.optim import Optimizer


class LrScaling(Enum):
    """How the learning rate follows the batch size."""

    none = "none"
    linear = "linear"  # lr * batch_size / base_batch_size (arXiv:1706.02677)
    sqrt = "sqrt"  # lr * sqrt(batch_size / base_batch_size)


@dataclass
class ParamRule:
    """What the parameters whose name matches `pattern` get instead of the usual. The first rule that matches wins."""

    pattern: str = setting(help="regular expression, searched in the parameter's dotted name")
    lr_factor: float = setting(1.0, "times the learning rate; 0 freezes", ge=0)
    weight_decay: float | None = setting(None, "weight decay instead of optimizer.weight_decay; null = the usual", ge=0)


@dataclass
class OptimizerConfig:
    """What every optimizer has: a peak learning rate, weight decay, and rules for who gets how much of them."""

    lr: float = setting(help="peak learning rate, at optimizer.base_batch_size where lr_scaling is on", gt=0)
    weight_decay: float = setting(help="weight decay", ge=0)
    weight_decay_end: float | None = setting(
        None, "weight decay at the end of the run, reached along half a cosine (arXiv:2104.14294, app. E); null = it stays", ge=0
    )
    weight_decay_scaling: str = setting(
        "none",
        "none: weight_decay as given; normalized: times 1 / sqrt(optimizer steps of the run), so that one value fits any length (arXiv:1711.05101, sec. 3)",
        choices=["none", "normalized"],
    )
    lr_scaling: LrScaling = setting(
        LrScaling.none, "none: lr as given; linear, sqrt: scaled by loop.batch_size / optimizer.base_batch_size"
    )
    base_batch_size: int = setting(256, "the batch size that lr is meant for (only with lr_scaling)", ge=1)
    layer_decay: float | None = setting(
        None, "learning rate falls by this factor per layer from the head down (arXiv:2106.08254); null = off", gt=0, le=1
    )
    backbone_lr: float | None = setting(
        None, "peak learning rate of all but the network's head (under a detector: of its backbone), instead of lr; null = lr", gt=0
    )
    no_decay: list[str] = setting(
        [r"(^|[._])bias(es)?$", r"tokens?_?\d*$", r"pos(ition)?_?emb(ed|edding)?s?(_\w+)?$", r"rel(ative)?_pos\w*$"],
        "regular expressions of parameters spared from weight decay, besides norms, everything with fewer than two dimensions and what the network itself spares",
    )
    rules: list[ParamRule] = setting([], "per-parameter exceptions: [{pattern: 'head', lr_factor: 10, weight_decay: 0}]")
    fused: bool = setting(True, "one kernel for the whole update, where the optimizer has one", identity=False)

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer over groups of {params, lr, weight_decay}."""

    def scaled_lr(self, batch_size: int) -> float:
        """The peak learning rate at this batch size."""
        ratio = batch_size / self.base_batch_size
        return self.lr * {LrScaling.none: 1.0, LrScaling.linear: ratio, LrScaling.sqrt: ratio**0.5}[self.lr_scaling]

    def scaled_weight_decay(self, weight_decay: float, total_steps: int) -> float:
        """A weight decay in a run of this many optimizer steps: `w sqrt(b / (B T))` is w over the root of the number of updates."""
        return weight_decay / total_steps**0.5 if self.weight_decay_scaling == "normalized" else weight_decay

    def decay_factor(self, fraction: float) -> float:
        """What the weight decay is multiplied with when `fraction` of the run is over."""
        if self.weight_decay_end is None:
            return 1.0
        end = self.weight_decay_end / self.weight_decay
        return end + (1 - end) * (1 + math.cos(math.pi * fraction)) / 2

    def problems(self) -> Iterator[Problem]:
        import re

        if self.weight_decay_end is not None and self.weight_decay == 0:
            reason = "optimizer.weight_decay=0, and nothing grows out of zero by a factor"
            yield Problem("optimizer.weight_decay_end", self.weight_decay_end, reason, "optimizer.weight_decay=1e-4")

        for i, pattern in enumerate([*self.no_decay, *(r.pattern for r in self.rules)]):
            key = f"optimizer.no_decay[{i}]" if i < len(self.no_decay) else f"optimizer.rules[{i - len(self.no_decay)}].pattern"
            try:
                re.compile(pattern)
            except re.error as error:
                yield Problem(key, pattern, f"is not a regular expression: {error}")


@schema("optimizer", "adamw")
@dataclass
class AdamW(OptimizerConfig):
    """AdamW (arXiv:1711.05101)."""

    betas: list[float] = setting([0.9, 0.999], "decay of the running means of gradient and squared gradient", ge=0, lt=1, length=2)
    eps: float = setting(1e-8, "added to the denominator", gt=0)

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        from trainer.optim import build_adamw

        return build_adamw(self, groups)


@schema("optimizer", "sgd")
@dataclass
class Sgd(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    momentum: float = setting(0.9, "momentum", ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov's momentum")

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        from trainer.optim import build_sgd

        return build_sgd(self, groups)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.nesterov and self.momentum == 0:
            yield Problem("optimizer.nesterov", self.nesterov, "needs a momentum", "optimizer.momentum=0.9")


@schema("optimizer", "timm")
@dataclass
class TimmOptimizer(OptimizerConfig):
    """Any optimizer of timm, by the name timm.optim.list_optimizers() prints."""

    name: str = setting(help="timm's name of the optimizer, for example lamb, lars, muon, adopt")
    momentum: float | None = setting(None, "momentum; null = timm's 0.9 where the optimizer has one", ge=0, lt=1)
    betas: list[float] | None = setting(None, "decay of the running means; null = the optimizer's own", ge=0, lt=1)
    eps: float | None = setting(None, "added to the denominator; null = the optimizer's own", gt=0)
    args: dict[str, Any] = setting({}, "further keyword arguments of the optimizer")

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        from trainer.optim import build_timm

        return build_timm(self, groups)
