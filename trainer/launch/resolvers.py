"""What conf/ may call as ${name:}: values that no YAML can hold, because they depend on the user or on other choices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainer.config import DatasetConfig, ModelConfig, TaskConfig
from trainer.launch.resolve import to_object


def temporary_directory() -> str:
    """The same folder every time, and another for every user."""
    import tempfile  # and with it compression and random numbers, which few runs need here

    return str(Path(tempfile.gettempdir()) / f"trainyard-{os.getuid()}")


def fitting_image_size(at_least: int, patches: int = 1, *, _root_: DictConfig) -> int:
    """The smallest side, in pixels, that is no less than this and that the network can cut into whole patches, so many at least."""
    model = to_object(_root_.model)
    multiple = (model.input_multiple if isinstance(model, ModelConfig) else None) or 1
    return max(-(-at_least // multiple), patches) * multiple


def small_image_size(*, _root_: DictConfig) -> int:
    """The smallest side, in pixels, that both the task and the network can do with."""
    task = OmegaConf.get_type(_root_, "task")
    smallest = task.smallest_image if isinstance(task, type) and issubclass(task, TaskConfig) else TaskConfig.smallest_image
    return fitting_image_size(smallest, _root_=_root_)


def small_view_size(*, _root_: DictConfig) -> int:
    """The side, in pixels, of a small view beside a large one: three sevenths, 96 beside 224, in whole patches of the network."""
    model, size = to_object(_root_.model), _root_.dataset.image_size
    multiple = (model.input_multiple if isinstance(model, ModelConfig) else None) or 1
    return max(1, round(size * 3 / 7 / multiple)) * multiple


def unless_tiny(usual: Any, tiny: Any, *, _root_: DictConfig) -> Any:
    """`usual`, but `tiny` where the dataset's images are such that a piece of one, or its mirror image, is of something else."""
    kind = OmegaConf.get_type(_root_, "dataset")
    return tiny if isinstance(kind, type) and issubclass(kind, DatasetConfig) and kind.tiny else usual


for resolver in (temporary_directory, fitting_image_size, small_image_size, small_view_size, unless_tiny):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
