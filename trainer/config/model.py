"""Networks, by the names timm and torchvision know them by."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.config.fields import setting
from trainer.config.schemas import schema
from trainer.errors import Problem

if TYPE_CHECKING:
    from torch import nn

    from trainer.pyramid import Pyramid


@dataclass
class ModelConfig:
    """A network's recipe. What a task can ask of it is in `offers`; `build` imports the library behind it."""

    offers: ClassVar[frozenset[str]] = frozenset({"classifier"})

    name: str = setting(help="the network's name in its library, as timm.list_models() prints it")
    patch_size: int | None = setting(None, "side of a patch in pixels (transformers); null = the network's own", ge=1)
    in_channels: int | None = setting(None, "channels of the input; null = the dataset's", ge=1)
    args: dict[str, Any] = setting({}, "further keyword arguments of the network's constructor")
    pretrained: bool = setting(
        False, "start from the library's published weights, out of the local cache or from the network; those in a file: init_from"
    )

    @property
    def input_multiple(self) -> int | None:
        """The image size must be a multiple of this many pixels; None = any size, or not known before it is built."""
        return self.patch_size or self.own_patch_size

    @property
    def own_patch_size(self) -> int | None:
        """The patch size that comes with the network, as its name tells it."""
        return None

    @abstractmethod
    def build(self, *, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
        """The network, ending in `num_classes` logits; with `num_classes=0`, in pooled features [N, D]."""

    def build_pyramid(self, *, strides: Sequence[int], image_size: int, in_channels: int) -> Pyramid:
        """The network without its head, as maps of these strides (for tasks that ask for a "pyramid")."""
        raise NotImplementedError

    def channel_problems(self, channels: int) -> Iterator[Problem]:
        """What cannot work with images of this many channels."""
        if self.in_channels is not None and self.in_channels != channels:
            yield Problem("model.in_channels", self.in_channels, f"the images have {channels} channels", f"model.in_channels={channels}")

    def problems(self, at: str, image_size: int) -> Iterator[Problem]:
        multiple = self.input_multiple
        if multiple and image_size % multiple:
            near = max(multiple, round(image_size / multiple) * multiple)
            yield Problem(
                "dataset.image_size",
                image_size,
                f"{at}={self.name} cuts images into patches of {multiple} pixels, so the size must be a multiple of {multiple}",
                f"dataset.image_size={near}",
            )


@schema("model", "timm")
@dataclass
class TimmModel(ModelConfig):
    """Any network of timm, and with `source=huggingface` DINOv2 networks of Hugging Face's hub."""

    offers: ClassVar[frozenset[str]] = frozenset({"classifier", "features", "pyramid"})

    source: str = setting(
        "timm", "who has the network: timm, or huggingface, where name is a DINOv2 repository of the hub or its folder", choices=["timm", "huggingface"]
    )  # fmt: skip
    drop_rate: float | None = setting(
        None, "dropout before the classifier, as a probability; null = the network's own, which is mostly 0", ge=0, lt=1
    )
    drop_path_rate: float | None = setting(
        None,
        "stochastic depth of the last block, as a probability (arXiv:1603.09382); null = the network's own: mostly 0, 0.1 of Swin, TinyViT and FocalNet, 0.5 of NesT",
        ge=0,
        lt=1,
    )
    conv_stem: list[int] | None = setting(
        None,
        "vision transformers: channels of 3 x 3 convolutions of stride 2 in place of the patches, which learn faster from few images (arXiv:2106.14881); null = patches",
        ge=1,
    )
    conv_stem_depth: int = setting(
        1, "convolutions for each of conv_stem's channels: the first halves the image, the others keep its size", ge=1
    )

    @property
    def own_patch_size(self) -> int | None:
        if self.source == "huggingface":
            facts = Path(self.name).expanduser() / "config.json"
            return json.loads(facts.read_text()).get("patch_size") if facts.is_file() else 14  # that of all of DINOv2's
        if self.conv_stem:
            return 2 ** len(self.conv_stem)
        found = re.search(r"patch(\d+)", self.name)  # vit_base_patch16_224, swin_tiny_patch4_window7_224
        return int(found[1]) if found else None

    def problems(self, at: str, image_size: int) -> Iterator[Problem]:
        yield from super().problems(at, image_size)
        if self.conv_stem and self.patch_size:
            yield Problem(
                f"{at}.patch_size",
                self.patch_size,
                f"{at}.conv_stem makes patches of {self.own_patch_size} pixels",
                f"{at}.patch_size=null",
            )
        if self.source == "huggingface":
            for key in ("conv_stem", "patch_size"):
                if getattr(self, key):
                    yield Problem(
                        f"{at}.{key}", getattr(self, key), "networks of the hub are what their config.json says", f"{at}.{key}=null"
                    )
        elif self.conv_stem and self.pretrained:
            yield Problem(f"{at}.conv_stem", self.conv_stem, "no published weights have such a stem", f"{at}.conv_stem=null")

    def build(self, *, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
        if self.source == "huggingface":
            from trainer.dinov2 import build_dinov2

            return build_dinov2(self, num_classes=num_classes, image_size=image_size, in_channels=in_channels)
        from trainer.models import build_timm

        return build_timm(self, num_classes=num_classes, image_size=image_size, in_channels=in_channels)

    def build_pyramid(self, *, strides: Sequence[int], image_size: int, in_channels: int) -> Pyramid:
        from trainer.pyramid import timm_pyramid

        return timm_pyramid(self, strides, image_size=image_size, in_channels=in_channels)


@schema("model", "torchvision")
@dataclass
class TorchvisionModel(ModelConfig):
    """Any classifier of torchvision."""

    offers: ClassVar[frozenset[str]] = frozenset({"classifier", "pyramid"})

    @property
    def own_patch_size(self) -> int | None:
        found = re.fullmatch(r"vit_[a-z]_(\d+)", self.name)  # vit_b_16
        return int(found[1]) if found else None

    def build(self, *, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
        from trainer.models import build_torchvision

        return build_torchvision(self, num_classes=num_classes, image_size=image_size, in_channels=in_channels)

    def build_pyramid(self, *, strides: Sequence[int], image_size: int, in_channels: int) -> Pyramid:
        from trainer.pyramid import torchvision_pyramid

        return torchvision_pyramid(self, strides, image_size=image_size, in_channels=in_channels)


@dataclass
class StagedConfig(ModelConfig):
    """A residual network for small images, of this project's own."""

    offers: ClassVar[frozenset[str]] = frozenset({"classifier", "features"})

    stem: int = setting(help="channels of the stem, which keeps the image's size", ge=1)
    widths: list[int] = setting(help="channels of each stage; each halves the image's sides", ge=1)
    blocks: list[int] = setting(help="residual blocks of each stage", ge=0)

    def _shape(self, in_channels: int) -> dict[str, Any]:
        return {"in_channels": self.in_channels or in_channels, "stem": self.stem, "widths": self.widths, "blocks": self.blocks}

    def problems(self, at: str, image_size: int) -> Iterator[Problem]:
        if len(self.widths) != len(self.blocks):
            fix = f"{at}.blocks=[{','.join('2' for _ in self.widths)}]"
            yield Problem(f"{at}.blocks", self.blocks, f"needs a number for each of {at}.widths ({len(self.widths)})", fix)
        for name, off in (("pretrained", False), ("patch_size", None), ("args", {})):
            if getattr(self, name) != off:
                fix = f"{at}.{name}={'false' if off is False else 'null' if off is None else '{}'}"
                yield Problem(f"{at}.{name}", getattr(self, name), "this network has none", fix)


@schema("model", "small_resnet")
@dataclass
class SmallResNet(StagedConfig):
    """Residual blocks of two convolutions."""

    def build(self, *, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
        from trainer.small_resnet import SmallResNet

        return SmallResNet(num_classes=num_classes, **self._shape(in_channels))

    def problems(self, at: str, image_size: int) -> Iterator[Problem]:
        yield from super().problems(at, image_size)
        if 0 in self.blocks:
            yield Problem(
                f"{at}.blocks",
                self.blocks,
                "the first block of a stage is what halves the image",
                f"{at}.blocks=[{','.join(str(max(1, n)) for n in self.blocks)}]",
            )


@schema("model", "resnet9")
@dataclass
class ResNet9(StagedConfig):
    """DAWNBench's network of nine layers: convolutions, maxima over 2 x 2 pixels, residual pairs."""

    def build(self, *, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
        from trainer.small_resnet import ResNet9

        return ResNet9(num_classes=num_classes, **self._shape(in_channels))
