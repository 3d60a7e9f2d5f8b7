"""What a run is, as typed dataclasses. Nothing here imports torch: composing, validating and submitting stay fast."""

from trainer.config.augmentation import AugmentationConfig
from trainer.config.dataset import DatasetConfig, Facts
from trainer.config.fields import setting
from trainer.config.letterbox import Letterbox
from trainer.config.logger import LoggerConfig
from trainer.config.loop import LoopConfig, Progressing, StageConfig
from trainer.config.mit import MitModel
from trainer.config.model import ModelConfig
from trainer.config.optimizer import LrScaling, OptimizerConfig, ParamRule
from trainer.config.run import DebugConfig, DistributedConfig, Mode, PrecisionConfig, Resume, RunConfig, TaskConfig
from trainer.config.scheduler import SchedulerConfig
from trainer.config.schemas import schema
from trainer.config.stages import stage_runs

__all__ = [
    "AugmentationConfig", "DatasetConfig", "DebugConfig", "DistributedConfig", "Facts", "Letterbox", "LoggerConfig", "LoopConfig",
    "LrScaling", "MitModel", "Mode", "ModelConfig", "OptimizerConfig", "ParamRule", "PrecisionConfig", "Progressing", "Resume",
    "RunConfig", "SchedulerConfig", "StageConfig", "TaskConfig", "schema", "setting", "stage_runs",
]  # fmt: skip
