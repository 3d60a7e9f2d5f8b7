"""The seam between algorithms and the engine. An algorithm is a `Task`; the engine knows nothing else about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from trainer.config.optimizer import ParamRule
    from trainer.data.augment import Augmentation

Batch = dict[str, Any]
"""What the loader yields: tensors by name, `image` [N, C, H, W], `label` [N] …, and always `key` [N] int64, each
sample's own random key (a function of seed, epoch, sample index, occurrence), and `index` [N], its place in the dataset."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. `step` counts optimizer steps finished, so it is 0 during the first one."""

    step: int
    total: int  # optimizer steps of the whole run
    steps_per_epoch: float

    @property
    def fraction(self) -> float:
        return self.step / self.total

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch


@dataclass(frozen=True)
class DataInfo:
    """What a task is told about its data when it is built."""

    num_train: int
    num_val: int
    classes: Sequence[str]  # class names, index = label; empty where there are none
    channels: int
    steps_per_epoch: float
    total_steps: int


@dataclass(slots=True)
class StepOutput:
    loss: Tensor  # [] mean over `weight` items of this rank's micro-batch
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # [] each, detached means like the loss
    weight: Tensor | None = None  # [] how many items the loss is a mean over; None = the images of the micro-batch


class Evaluator(Protocol):
    """One validation pass. Made fresh for each pass, so there is nothing to reset. Sums and counts, never means."""

    def update(self, batch: Batch) -> None: ...
    def compute(self) -> dict[str, float]: ...  # collective: every rank calls it, every rank gets the answer


@runtime_checkable
class ComparesWithTraining(Protocol):
    """An evaluator that wants to see training images first, as nearest neighbours do: each once, without augmentation, in
    shares of the ranks, before the first `update`. Where the data can only be streamed it sees none."""

    def reference(self, batch: Batch) -> None: ...


@runtime_checkable
class Illustrates(Protocol):
    """An evaluator with pictures of what it saw: {name: uint8 [3, H, W]}, written to `previews/`.

    Asked on the main rank only, after `compute`, with the weights that were validated and in evaluation mode.
    """

    def pictures(self) -> Mapping[str, Tensor]: ...


class Task(nn.Module, ABC):
    """An algorithm: the networks it owns, its loss, its evaluation.

    The engine wraps the *task* in DDP, so `training_step` may call its networks in any order, any number of times.
    """

    find_unused_parameters = False
    main_metric = "val/loss"  # decides `best` unless loop.best_metric says otherwise
    higher_is_better = False

    @abstractmethod
    def training_step(self, batch: Batch, progress: Progress, /) -> StepOutput: ...

    @abstractmethod
    def evaluator(self) -> Evaluator: ...

    def augmentation(self, *, train: bool) -> Augmentation | None:
        """The task's own transform of a split, where it has one (multi-crop); None = the run's augmentation."""
        return None

    def never_trained(self) -> Sequence[str]:
        """Names of submodules that are rebuilt, not saved: teachers loaded from elsewhere."""
        return ()

    def network(self) -> nn.Module:
        """What is exported and what `load_model` returns: by convention the submodule `model`."""
        return self.get_submodule("model")

    def param_rules(self) -> Sequence[ParamRule]:
        """The task's own learning rates and weight decays by parameter name; the user's `optimizer.rules` come first."""
        return ()

    def compiled_parts(self) -> Sequence[nn.Module]:
        """What `loop.compile` compiles."""
        return [self.network()]

    def before_update(self, progress: Progress) -> None:
        """Gradients are final and unscaled; the optimizers have not stepped."""

    def after_update(self, progress: Progress) -> None:
        """The optimizers have stepped. EMA teachers move here."""

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        return self.training_step(batch, progress)
