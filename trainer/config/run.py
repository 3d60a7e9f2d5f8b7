"""The whole of a run: the schema that every composed config must satisfy."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_type_hints

from trainer.config.augmentation import AugmentationConfig
from trainer.config.dataset import DatasetConfig
from trainer.config.fields import MISSING, setting
from trainer.config.logger import LoggerConfig
from trainer.config.loop import LoopConfig
from trainer.config.model import ModelConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.config.scheduler import SchedulerConfig
from trainer.config.schemas import schema
from trainer.errors import Problem

if TYPE_CHECKING:
    from trainer.task import DataInfo, Task


@dataclass
class TaskConfig:
    """Base of every task's config. A config knows how to build the thing it configures.

    `needs` are the fields of a sample the task learns from, checked against `DatasetConfig.offers`; `asks` is what it
    wants of a model, checked against `ModelConfig.offers`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    asks: ClassVar[frozenset[str]] = frozenset()
    views: ClassVar[bool] = False  # learns from several views of an image at once (augmentation=dino)
    smallest_image: ClassVar[int] = 32  # side in pixels below which the task makes no sense; `debug=tiny` goes down to it

    @abstractmethod
    def build(self, run: RunConfig, data: DataInfo) -> Task:
        """The task, on the CPU, with fresh weights drawn from the global generator the caller has seeded."""

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        """What cannot work between this task and the rest of the run."""
        yield from ()

    def prerequisites(self, run: RunConfig) -> Sequence[RunConfig]:
        """Runs that have to be finished before `run` can begin, and are trained first where they are not: a teacher, say.
        They lie in directories of their own, and whoever needs the same finds them there."""
        return ()

    def whole_batch(self) -> str:
        """What of the loss looks at all images of a batch at once, as settings; "" = nothing. It may look at every rank's, but not
        past a micro-batch, so that `loop.accumulate` changes it: a warning says so before the run."""
        return ""

    def warnings(self, run: RunConfig) -> Iterator[str]:
        """What works between this task and the rest of the run, but perhaps not as hoped, one line each, with the way out."""
        yield from ()

    def for_inference(self) -> Self:
        """The same task for a network that is trained already: without what only training needs from elsewhere."""
        return self

    def beyond_one_view(self) -> str:
        """The setting by which validation asks the network several times about an image, and "" where it asks once.

        An exported file and `load_model` answer once, so scores with more views are not theirs.
        """
        return ""


@schema("precision", "precision")
@dataclass
class PrecisionConfig:
    """Number formats of the arithmetic; weights and optimizer states stay in fp32."""

    autocast: str | None = setting(
        help="data type of matrix products under autocast: bfloat16, float16, or null for none", choices=["bfloat16", "float16"]
    )
    tf32: bool = setting(help="TF32 matrix products and convolutions on GPUs")


class Mode(Enum):
    auto = "auto"
    local = "local"


@schema("distributed", "distributed")
@dataclass
class DistributedConfig:
    """How many ranks there are, and who starts them."""

    mode: Mode = setting(
        help="auto: torchrun or SLURM, whichever surrounds the process, else one rank per visible GPU, or one process; local: this host, `processes` ranks",
        identity=False,
    )
    processes: int | None = setting(
        None, "ranks on this host (mode local, or auto with several GPUs); null = one per GPU, or one", ge=1, identity=False
    )
    max_restarts: int = setting(0, "start all local ranks again this many times after one has died", ge=0, identity=False)
    timeout: float = setting(
        600.0, "seconds a rank waits for the others before the run ends with exit 6 and every rank's stack", gt=0, identity=False
    )


@schema("debug", "debug")
@dataclass
class DebugConfig:
    """Instruments for finding out what goes wrong."""

    overfit: bool = setting(False, "train on the first batch only, over and over, and validate on it")
    profile: bool = setting(False, "write a torch profiler trace and print the top operators", identity=False)
    anomaly: bool = setting(False, "autograd anomaly detection, and gradient norms per parameter", identity=False)


class Resume(Enum):
    auto = "auto"
    never = "never"
    must = "must"


@dataclass
class RunConfig:
    """The whole of a run."""

    name: str = setting(help="the run's name: the folder in runs_dir", identity=False)
    version: str = setting(help="tells repeats of a run apart: the first part of the directory's name", identity=False)
    seed: int = setting(0, "everything random follows from it", ge=0)
    runs_dir: str = setting("runs", "where run directories are made", identity=False)
    resume: Resume = setting(
        Resume.auto,
        "auto: start, go on, or say that it is done; never: a new run beside it; must: fail if there is nothing",
        identity=False,
    )
    init_from: str | None = setting(None, "start from these weights: a run directory, a file, or timm:pretrained")
    task: TaskConfig = MISSING
    model: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    augmentation: AugmentationConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    scheduler: SchedulerConfig = MISSING
    precision: PrecisionConfig = MISSING
    distributed: DistributedConfig = MISSING
    loop: LoopConfig = MISSING
    logger: LoggerConfig = MISSING
    debug: DebugConfig = MISSING

    def problems(self) -> Iterator[Problem]:
        for key, text in (("name", self.name), ("version", self.version)):
            if not text or text.startswith(("/", "-", ".")) or ".." in text or "\0" in text or (key == "version" and "/" in text):
                yield Problem(key, text, "becomes a folder's name: letters, digits and -_.=", f"{key}=trial1")


def _tree() -> type[Any]:
    """`RunConfig` as Hydra composes it, open to parts of any kind. OmegaConf would make a node of every part's base class
    first, only to merge the choice into it; that a part is of its kind is checked when the run is made of the tree."""
    hints = get_type_hints(RunConfig)
    kinds = {name: Any if dataclasses.is_dataclass(hint) else hint for name, hint in hints.items()}
    fields = [(f.name, kinds[f.name], dataclasses.field(default=f.default, metadata=f.metadata)) for f in dataclasses.fields(RunConfig)]
    return dataclasses.make_dataclass("RunTree", fields)


schema("", "run")(_tree())
schema("loop", "loop")(LoopConfig)
