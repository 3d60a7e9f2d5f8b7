"""From a config to a task: the network first, then what it has to fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.mim.config import MimConfig
from tasks.mim.crossmae import CrossMae
from tasks.mim.fcmae import Fcmae
from tasks.mim.mae import Mae
from tasks.mim.simmim import SimMim
from trainer.config import RunConfig
from trainer.errors import ConfigError, Problem

if TYPE_CHECKING:
    from tasks.mim.task import Mim
    from trainer.task import DataInfo

METHODS = {"mae": Mae, "simmim": SimMim, "fcmae": Fcmae, "crossmae": CrossMae}


def build(cfg: MimConfig, run: RunConfig, data: DataInfo) -> Mim:
    """The task with fresh weights.

    Raises:
        ConfigError: the network is of a kind that the method cannot use, or the mask does not fit its patches.
    """
    size = run.dataset.image_size
    model = run.model.build(num_classes=0, image_size=size, in_channels=data.channels)
    method = METHODS[cfg.method]
    patch = method.patch_of(model, run.model)
    if size % patch:
        reason = f"one place of the last feature map of {run.model.name} is {patch} pixels wide, and an image has whole ones"
        raise ConfigError(Problem("dataset.image_size", size, reason, f"dataset.image_size={max(2, round(size / patch)) * patch}"))
    if problems := list(cfg.grid_problems(patch, size)):
        raise ConfigError(*problems)
    task = method(model, cfg, patch=patch, image_size=size, channels=data.channels, fresh=not run.model.pretrained)
    task.mean, task.std = run.dataset.mean, run.dataset.std
    task.num_classes = len(data.classes) if "label" in run.dataset.offers else 0
    return task
