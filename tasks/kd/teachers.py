"""Teachers: networks trained elsewhere, asked about the student's images in the size and the colours that they know.

A run of ours, one of timm's networks, a TorchScript or an exported file. Whatever does not fit comes out as a ConfigError.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.kd.config import TIMM, KdConfig
from trainer.config.names import nearest
from trainer.errors import ConfigError, Problem, TrainyardError
from trainer.inference import load_task
from trainer.pretrained import first_line, timm_weights_within_reach
from trainer.probe import Asked


class Answer(NamedTuple):
    logits: Tensor | None  # [N, C]
    features: Tensor | None  # [N, D]


@dataclass(frozen=True)
class Look:
    """How images are given to a network."""

    size: int  # pixels
    mean: Sequence[float]
    std: Sequence[float]


class Teacher:
    """A trained network that is only ever asked. Not a module: nobody trains, saves, averages or synchronises it by mistake."""

    def __init__(self, network: nn.Module, look: Look, students: Look, classes: Sequence[str] = (), *, name: str, features: bool) -> None:
        """`students`: how the images look that it is given. `features`: whether those are wanted beside the logits."""
        self.network = network
        self.called = Asked(network) if features else network
        for parameter in network.parameters():  # one by one: TorchScript has no requires_grad_ of its own
            parameter.requires_grad_(False)
        self.look, self.students = look, students
        self.classes = list(classes)  # empty where they are not known
        self.name, self.features = name, features
        self.num_classes = self.width = 0  # columns of its logits and features, known once it has been tried
        self.device = torch.device("cpu")

    def __call__(self, images: Tensor) -> Answer:
        """`images`: as the student sees them, [N, C, S, S]."""
        if images.device != self.device:
            self.network.to(images.device)
            self.device = images.device
        with torch.inference_mode():
            seen = self._as_known(images)
            features, output = self.called(seen) if self.features else (None, self.called(seen))
        # Autograd may keep what it is compared with, which it refuses to do with a tensor out of inference mode.
        return Answer(output.clone(), None if features is None else features.clone())

    def _as_known(self, images: Tensor) -> Tensor:
        """The same images in the size and the scale of colours that the teacher was trained with."""
        own, given = self.look, self.students
        channels = range(images.shape[1])
        scale = [_at(given.std, c) / _at(own.std, c) for c in channels]
        shift = [(_at(given.mean, c) - _at(own.mean, c)) / _at(own.std, c) for c in channels]
        if any(abs(s - 1) > 1e-9 for s in scale) or any(abs(s) > 1e-9 for s in shift):
            images = images * images.new_tensor(scale).view(-1, 1, 1) + images.new_tensor(shift).view(-1, 1, 1)
        if images.shape[-1] != own.size:
            images = F.interpolate(images, size=(own.size, own.size), mode="bilinear", antialias=True, align_corners=False)
        return images


def _at(values: Sequence[float], channel: int) -> float:
    return values[channel % len(values)]


def open_teacher(source: str, cfg: KdConfig, students: Look, channels: int) -> Teacher:
    """The teacher that `source` names, tried on one image.

    Raises:
        ConfigError: it cannot be had, is of another kind than it should be, or cannot take such images.
    """
    if source.startswith(TIMM):
        network, look, classes = _timm(source, channels)
    elif _is_archive(Path(source).expanduser()):
        if cfg.uses_features:
            reason = "is a program that gives logits alone, and features are asked for"
            raise ConfigError(
                Problem("task.teacher", source, reason, "task.feature_weight=0 task.method=soft, or the run that it comes from")
            )
        network, look, classes = _archive(Path(source).expanduser(), source), students, []
    else:
        network, look, classes = _of_a_run(source)
    look = Look(cfg.teacher_size or look.size, cfg.teacher_mean or look.mean, cfg.teacher_std or look.std)
    teacher = Teacher(network, look, students, classes, name=source, features=cfg.uses_features)
    _try(teacher, channels)
    return teacher


def _try(teacher: Teacher, channels: int) -> None:
    size = teacher.students.size
    try:
        answer = teacher(torch.zeros(2, channels, size, size))
    except Exception as error:
        reason = f"cannot be asked about images of {teacher.look.size} pixels and {channels} channels: {first_line(error)}"
        fix = "task.teacher_size=<the size it was made for>; a .pt2 file has to be exported with a dynamic batch"
        raise ConfigError(Problem("task.teacher", teacher.name, reason, fix)) from error
    if not isinstance(answer.logits, Tensor) or answer.logits.ndim != 2:
        raise ConfigError(Problem("task.teacher", teacher.name, f"gives {_kind(answer.logits)} for two images, not logits [2, classes]"))
    teacher.num_classes = answer.logits.shape[1]
    if answer.features is not None:
        teacher.width = answer.features.shape[1]


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


# --- where it comes from ------------------------------------------------------------------------------------------------


def _of_a_run(source: str) -> tuple[nn.Module, Look, Sequence[str]]:
    try:
        task, run, content = load_task(source)
    except TrainyardError as error:
        fix = "task.teacher=<run directory>, or timm:<name>@<file> for a file with weights alone"
        raise ConfigError(Problem("task.teacher", source, str(error).replace("\n    try: ", "; try "), fix)) from error
    dataset = run.dataset
    return task.network().eval(), Look(dataset.image_size, dataset.mean, dataset.std), content["classes"]


def _timm(source: str, channels: int) -> tuple[nn.Module, Look, Sequence[str]]:
    """timm's network with its published weights, or with those of a file."""
    import timm

    name, _, file = source.removeprefix(TIMM).partition("@")
    if not timm.is_model(name.partition(".")[0]):
        close = nearest(name, timm.list_models())
        raise ConfigError(
            Problem("task.teacher", source, "timm knows no network of this name", f"task.teacher=timm:{close}" if close else "")
        )
    metadata = timm.models.get_pretrained_cfg(name)
    assert metadata is not None
    look = Look(metadata.input_size[-1], metadata.mean, metadata.std)
    if not file:
        try:
            timm_weights_within_reach(name, metadata)
            return timm.create_model(name, pretrained=True, in_chans=channels).eval(), look, []
        except ConfigError as error:
            reason = "; ".join(p.reason if isinstance(p, Problem) else p for p in error.problems)
            raise ConfigError(Problem("task.teacher", source, reason, f"task.teacher={TIMM}{name}@<file with the weights>")) from error
    weights = _state(Path(file).expanduser(), source)
    network = timm.create_model(name, num_classes=_classes_in(weights, name), in_chans=channels)
    own = network.state_dict()
    wrong = [k for k in own if k not in weights or weights[k].shape != own[k].shape] + [k for k in weights if k not in own]
    if wrong:
        reason = f"the file is of another network than {name}, or of another input size: {', '.join(wrong[:3])} … do not fit"
        raise ConfigError(Problem("task.teacher", source, reason, f"task.teacher={TIMM}<the network it is of>@{file}"))
    network.load_state_dict(weights)
    return network.eval(), look, []


def _state(path: Path, source: str) -> dict[str, Tensor]:
    """Weights by name: a bare state dict, or one inside a checkpoint of somebody's."""
    from trainer.weights import read_weights

    try:
        return read_weights(path)
    except TrainyardError as error:
        raise ConfigError(Problem("task.teacher", source, str(error).replace("\n    try: ", "; try "))) from error


def _classes_in(weights: dict[str, Tensor], name: str) -> int:
    """Rows of the classifier's weight, which timm's networks name in their metadata."""
    import timm

    metadata = timm.models.get_pretrained_cfg(name)
    classifier = metadata.classifier if metadata is not None else None
    first = classifier[0] if isinstance(classifier, tuple | list) else classifier
    head = weights.get(f"{first}.weight")
    return 0 if head is None else head.shape[0]


def _is_archive(path: Path) -> bool:
    """Whether it holds code beside weights: TorchScript, or an exported program."""
    if path.suffix == ".pt2":
        return True
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())


def _archive(path: Path, source: str) -> nn.Module:
    try:
        if path.suffix == ".pt2":
            return torch.export.load(str(path)).module()
        with warnings.catch_warnings():  # TorchScript is to be replaced by torch.export some day; the files are there
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(str(path), map_location="cpu").eval()
    except Exception as error:
        raise ConfigError(Problem("task.teacher", source, f"cannot be read: {first_line(error)}")) from error
