"""The seam between algorithms and the engine. An algorithm is a `Task`; the engine knows nothing else about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from torch import Tensor, nn

from trainer.probe import pooled_features

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
    steps_per_epoch: float  # of this stage of the run
    stage_start: int = 0  # the step at which the stage began
    epochs_before: float = 0.0  # that were finished by then

    @property
    def fraction(self) -> float:
        return self.step / self.total

    @property
    def epoch(self) -> float:
        return self.epochs_before + (self.step - self.stage_start) / self.steps_per_epoch


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


@dataclass(frozen=True)
class Report:
    """What an evaluator knows beside its scores; `python -m trainer evaluate` prints it and writes it down.

    samples: one row for each sample, with its `index` in the dataset. tables: rows by the name of the table. matrices: by
    name, (names of rows and columns, counts or values [C][C], true class by predicted class).
    """

    samples: Sequence[Mapping[str, Any]] = ()
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    matrices: Mapping[str, tuple[Sequence[str], Sequence[Sequence[float]]]] = field(default_factory=dict)


@runtime_checkable
class Reports(Protocol):
    """An evaluator that has a report: asked for on the main rank, after `compute()`; not collective."""

    def report(self) -> Report: ...


class Evaluator(Protocol):
    """One validation pass. Made fresh for each pass, so there is nothing to reset. Sums and counts, never means.

    It may be one of `Reports` too.
    """

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


@runtime_checkable
class Keeps(Protocol):
    """An evaluator that keeps images for its pictures: it is told before the first `update` whether anybody will ask for them."""

    keeps: bool


class Task(nn.Module, ABC):
    """An algorithm: the networks it owns, its loss, its evaluation.

    The engine wraps the *task* in DDP, so `training_step` may call its networks in any order, any number of times.
    """

    find_unused_parameters = False
    main_metric = "val/loss"  # decides `best` unless loop.best_metric says otherwise
    higher_is_better = False
    held: Sequence[nn.Module] = ()  # frozen parts, which stay in evaluation mode while the rest trains
    backbone_name: str | None = None  # dotted, of the submodule below a task's own layers; None = the network, whose library tells its head

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

    def features(self, images: Tensor) -> Tensor:
        """What nearest neighbours and linear classifiers judge the network by, [N, D]."""
        return pooled_features(self.network(), images)

    def param_rules(self) -> Sequence[ParamRule]:
        """The task's own learning rates and weight decays by parameter name; the user's `optimizer.rules` come first."""
        return ()

    def compiled_parts(self) -> Sequence[nn.Module]:
        """What `loop.compile` compiles."""
        return [self.network()]

    def predict(self, batch: Batch) -> Sequence[Sequence[Mapping[str, Any]]]:
        """What is found in each image, for people: its rows of a table, the surest first, perhaps none. Boxes are under
        x1 y1 x2 y2, in pixels of the network's image. `python -m trainer predict` calls it with images that have no labels."""
        raise NotImplementedError

    def restrict(self, classes: Sequence[int]) -> None:
        """Let only these classes compete from now on."""
        raise NotImplementedError

    def before_update(self, progress: Progress) -> None:
        """Gradients are final and unscaled; the optimizers have not stepped."""

    def after_update(self, progress: Progress) -> None:
        """The optimizers have stepped. EMA teachers move here."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self.held:
            part.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        return self.training_step(batch, progress)
