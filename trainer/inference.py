"""A trained network back from disk, ready to be used: with its weights, its preprocessing and the names of its classes.

In use:

    from trainer import load_model
    model = load_model("runs/…", checkpoint="best")
    with torch.inference_mode():
        probabilities = model(model.transform(image)).softmax(-1)  # [1, C]
        print(model.classes[probabilities.argmax()])
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.checkpoint import load
from trainer.config import RunConfig
from trainer.config.names import nearest
from trainer.config.plain import from_plain
from trainer.data.source import BadSample
from trainer.errors import ConfigError, DataError, Problem
from trainer.random import SampleRandom
from trainer.resample import resampled
from trainer.state import load_strictly
from trainer.task import DataInfo, Task

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainer.data.augment import Augmentation

log = logging.getLogger(__name__)


def load_model(path: str | PathLike[str], checkpoint: str | PathLike[str] = "best", *, device: str | torch.device = "cpu") -> nn.Module:
    """The network of a run, in eval mode, with its averaged weights where the run kept an average.

    Args:
        path: a run directory, or a checkpoint file on its own.
        checkpoint: which of the run's: best, last, epoch-0010 …, or a path. A run without validation has no best; then last is taken.

    Returns:
        The task's network, with `model.transform` (see `Transform`) and `model.classes` (names, index = label; may be empty).

    Raises:
        ConfigError: there is no such run or checkpoint, or it is not one of a run.
        CheckpointError: the file is damaged.
    """
    task, run, content = load_task(path, checkpoint)
    return dressed(task, run, content, device)


def dressed(task: Task, run: RunConfig, content: Mapping[str, Any], device: str | torch.device = "cpu") -> nn.Module:
    """The network of a loaded task, in eval mode, with its transform and its classes."""
    network = task.network()
    if any(hasattr(network, name) for name in ("transform", "classes")):
        network = Wrapped(network)
    augmentation = task.augmentation(train=False) or run.augmentation.build(run.dataset, train=False)
    # Plain attributes: the network's class is its library's, and its names and state dict stay as they are.
    network.transform = Transform(augmentation, channels=content["channels"], device=torch.device(device))  # type: ignore[assignment]
    network.classes = list(content["classes"])  # type: ignore[assignment]
    return network.to(device).eval().requires_grad_(False)


class Wrapped(nn.Module):
    """A network that has something of its own by one of our names, as torchvision's detectors have a `transform`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.network(*inputs, **named)


def load_task(
    path: str | PathLike[str], checkpoint: str | PathLike[str] = "best", run: RunConfig | None = None
) -> tuple[Task, RunConfig, dict[str, Any]]:
    """The whole task of a run with its trained weights (averaged ones where there are some), its config, and what else the
    checkpoint holds.

    `run` is the run's config with settings changed. Position embeddings are resampled to its image size.
    """
    file = _find(Path(path), checkpoint)
    content = load(file)
    if not {"config", "classes", "channels", "data", "task"} <= content.keys():
        raise ConfigError(
            Problem(
                "checkpoint",
                file,
                "is not a checkpoint of a run: it does not say what network it belongs to",
                "init_from takes foreign weights",
            )
        )
    changed = run is not None
    run = offline(from_plain(content["config"]) if run is None else run)
    data = DataInfo(classes=tuple(content["classes"]), channels=content["channels"], **content["data"])
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn and thrown away; the caller's numbers are not ours to use
        task = run.task.build(run, data)
    hidden = tuple(f"{name}." for name in task.never_trained())
    weights = {**content["task"], **(content.get("ema") or {})}
    try:
        load_strictly(task, _resized(task, weights) if changed else weights, hidden)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(Problem("checkpoint", file, f"does not fit the network that its config builds today: {error}")) from error
    return task, run, content


def _resized(task: Task, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with what follows from the image size fitted to the task's; what does not fit is left for the loader to name."""
    own = task.state_dict()
    other = {name for name, tensor in weights.items() if name in own and own[name].shape != tensor.shape}
    fitted = {name: resampled(task, name, weights[name], own[name]) for name in other}
    return {name: tensor if (new := fitted.get(name)) is None else new for name, tensor in weights.items()}


def offline(run: RunConfig) -> RunConfig:
    """`run` without pretrained weights and teachers: all weights come from the checkpoint, and nothing is to be fetched."""
    changes = {name: value for name, value in (("pretrained", False), ("weights", None)) if hasattr(run.model, name)}
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes), task=run.task.for_inference())


def _find(path: Path, checkpoint: str | PathLike[str]) -> Path:
    if path.is_file():
        if path.suffix == ".safetensors":
            raise ConfigError(
                Problem(
                    "path",
                    path,
                    "holds weights alone; a run directory or its .pt files say what network they belong to",
                    f"load_model({str(path.with_name('best.pt'))!r})",
                )
            )
        return path
    if not path.is_dir():
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else None
        raise ConfigError(Problem("path", path, "there is no such run or file", f"load_model({str(path.parent / near)!r})" if near else ""))
    if Path(checkpoint).suffix == ".pt" or Path(checkpoint).is_file():
        return Path(checkpoint)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    file = folder / f"{checkpoint}.pt"
    if not file.is_file() and Path(checkpoint).name == str(checkpoint):  # epoch-0010 is epoch-0010-loss-0.1234 too
        file = next(folder.glob(f"{checkpoint}-loss-*.pt"), file)
    if not file.is_file() and checkpoint == "best" and (folder / "last.pt").is_file():
        log.warning("%s has no best.pt (nothing was validated): taking last.pt", folder)
        return folder / "last.pt"
    if not file.is_file():
        there = sorted(p.stem for p in folder.glob("*.pt"))
        reason = f"{folder} has {', '.join(there)}" if there else f"{path} holds no checkpoints"
        raise ConfigError(Problem("checkpoint", checkpoint, reason, f"checkpoint={there[0]!r}" if there else ""))
    return file


class Transform:
    """From images to the network's input, [N, C, H, W] on its device, exactly as in validation.

    Takes one image or a sequence of them, each a PIL image, an array [H, W] or [H, W, C], or a path; or a loader's uint8 batch
    as a dict or a tensor [N, C, H, W], cut and resized already, of which only the second half is still to be done. Validation
    decodes a JPEG much larger than needed at a smaller scale: for the same bits give the path, or `Image.open(path)` unread.
    """

    def __init__(self, augmentation: Augmentation, *, channels: int, device: torch.device) -> None:
        self.augmentation, self.channels, self.device = augmentation, channels, device

    def __call__(self, images: Any) -> Tensor:
        if isinstance(images, Mapping):
            return self._batch(images["image"], images)
        if isinstance(images, Tensor):
            assert images.ndim == 4, f"a batch is [N, C, H, W]; this tensor is {tuple(images.shape)}"
            return self._batch(images, {})
        return self._batch(self.pixels(images), {})

    def pixels(self, images: Any) -> Tensor:
        """The first half alone: cut and resized, uint8 [N, C, H, W]."""
        several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
        return torch.stack([self._cut(image) for image in (images if several else [images])])

    def _cut(self, image: Any) -> Tensor:
        """What a loader's worker does: [C, H, W]."""
        sample = self.augmentation.sample({"image": self._as_source_gives(image)}, SampleRandom(0))
        return torch.as_tensor(sample["image"])

    def _batch(self, pixels: Tensor, rest: Mapping[str, Any]) -> Tensor:
        """What the device does. Validation draws no random numbers, so any key will do."""
        count = len(pixels)
        keys = torch.zeros(count, dtype=torch.int64, device=self.device)
        batch = {"key": keys, "index": torch.arange(count, device=self.device), "image": pixels.to(self.device)}
        return self.augmentation.batch({**{k: v for k, v in rest.items() if k not in batch}, **batch})["image"]

    def _as_source_gives(self, image: Image | np.ndarray | str | PathLike[str]) -> Image | np.ndarray:
        """Sources give PIL images in RGB, and arrays [H, W, C] for any other number of channels."""
        from PIL import Image as Images

        if isinstance(image, str | PathLike):
            from trainer.data.images import open_image, read_file

            try:
                image = open_image(read_file(str(image)), str(image))
            except BadSample as bad:
                raise DataError(str(bad)) from bad
        if isinstance(image, np.ndarray):
            image = image[..., None] if image.ndim == 2 else image
            if image.shape[-1] == 1 and self.channels == 3:
                return image.repeat(3, axis=-1)
        elif self.channels == 1:
            return np.asarray(image.convert("L"))[..., None]
        found = image.shape[-1] if isinstance(image, np.ndarray) else 3
        if found != self.channels:
            shape = image.shape if isinstance(image, np.ndarray) else f"{image.mode} image"
            raise ConfigError(Problem("image", shape, f"the network takes {self.channels} channel(s), [H, W, {self.channels}]"))
        assert isinstance(image, np.ndarray | Images.Image)
        return image
