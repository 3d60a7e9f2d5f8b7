"""The datasets' schemas. Imports nothing heavy: composing and checking a run must stay fast.

Importing this module registers every `dataset_schema` of conf/dataset/.
"""

from __future__ import annotations

from trainer.data.schemas.birds import CubConfig, MetaShiftConfig, SiimAcrConfig, WaterbirdsConfig
from trainer.data.schemas.detection import CocoConfig, VocConfig
from trainer.data.schemas.embedded import DigitPartsConfig, DigitScenesConfig, DigitsConfig, SyntheticConfig
from trainer.data.schemas.folders import ImageFolderConfig
from trainer.data.schemas.hugging_face import HuggingFaceConfig
from trainer.data.schemas.webdataset import WebDatasetConfig
from trainer.data.schemas.yolo import MultispectralConfig, YoloConfig

__all__ = [
    "CocoConfig", "CubConfig", "DigitPartsConfig", "DigitScenesConfig", "DigitsConfig", "HuggingFaceConfig", "ImageFolderConfig",
    "MetaShiftConfig", "MultispectralConfig", "SiimAcrConfig", "SyntheticConfig", "VocConfig", "WaterbirdsConfig",
    "WebDatasetConfig", "YoloConfig",
]  # fmt: skip
