"""The two stages: one finds parts and classifies from their features, the other sees the image's parts alone.

Noise and dropout come from the samples' keys; without keys there is neither, as in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tasks.part_discovery import maps as m
from tasks.part_discovery.backbones import feature_map, feature_width, seen_tokens
from tasks.part_discovery.config import PartDiscoveryConfig


@dataclass(slots=True)
class Found:
    """What the first stage makes of a batch. N images, P = K + 1 parts, the background last."""

    maps: Tensor  # [N, P, h, w]
    features: Tensor  # [N, P, D], modulated
    part_logits: Tensor  # [N, K, C] of each part
    logits: Tensor  # [N, C] over all parts
    mask: m.Mask | None  # what the second stage is to see
    similarity: Tensor | None  # [N, P, h, w], z · p; in evaluation


class Modulation(nn.Module):
    """Makes the parts' features [N, P, D] differ in scale and direction before they share a classifier."""

    def __init__(self, kind: str, parts: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "layer_norm":
            self.norm = nn.LayerNorm([parts, width])  # over parts and channels together
        elif kind == "original":
            self.scale = nn.Parameter(torch.ones(1, parts, width))
        elif kind == "parallel_mlp":  # a layer of its own for each part
            self.weight = nn.Parameter(torch.empty(parts, width, width).uniform_(-(width**-0.5), width**-0.5))
            self.bias = nn.Parameter(torch.zeros(parts, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer_norm":
            return self.norm(x)
        if self.kind == "original":
            return x * self.scale
        if self.kind == "parallel_mlp":
            return nn.functional.gelu(torch.einsum("npd,pde->npe", x, self.weight) + self.bias)
        return x


class PartFinder(nn.Module):
    """Stage one: a network, K + 1 prototypes, and one classifier that all parts share."""

    def __init__(self, backbone: nn.Module, cfg: PartDiscoveryConfig, num_classes: int) -> None:
        super().__init__()
        width, parts = feature_width(backbone), cfg.num_parts + 1
        self.cfg = cfg
        self.backbone = backbone
        self.prototypes = nn.Parameter(torch.empty(parts, width).uniform_(-(width**-0.5), width**-0.5))  # as a 1 x 1 convolution's
        self.modulation = Modulation(cfg.modulation, parts, width)
        self.classifier = nn.Linear(width, num_classes, bias=False)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)

    def maps(self, images: Tensor, keys: Tensor | None, stream: int) -> tuple[Tensor, Tensor, Tensor]:
        """Features [N, D, h, w], logits and maps [N, P, h, w], with Gumbel noise where there are keys."""
        features = feature_map(self.backbone, images)
        logits = m.distance_logits(features, self.prototypes)
        return features, logits, m.soft_maps(logits, self.cfg.temperature, self._noise(keys, stream, logits))

    def _noise(self, keys: Tensor | None, stream: int, logits: Tensor) -> Tensor | None:
        noisy = keys is not None and self.cfg.gumbel and (self.training or self.cfg.gumbel_at_eval)
        return m.gumbel(keys, stream, tuple(logits.shape[1:])) if noisy and keys is not None else None

    def forward(
        self, images: Tensor, keys: Tensor | None = None, thresholds: Tensor | None = None, *, map_stream: int = m.MAP_NOISE
    ) -> Found:
        """`thresholds` [K] turn the logits into those of an evaluation with thresholds."""
        removed = [] if self.training else self.cfg.remove_parts
        return self.read(*self.maps(images, keys, map_stream), keys, thresholds, removed, map_stream)

    def read(
        self, features: Tensor, logits: Tensor, maps: Tensor, keys: Tensor | None, thresholds: Tensor | None, removed: list[int], map_stream: int
    ) -> Found:  # fmt: skip
        """What there is to say of `maps()`, in evaluation perhaps without some parts."""
        cfg = self.cfg
        similarity = None if self.training else m.similarity_logits(features, self.prototypes)
        if similarity is not None and thresholds is not None:
            logits = m.above_thresholds(similarity, thresholds)
        if removed:
            logits = m.without(logits, removed)
        if removed or thresholds is not None:
            maps = m.soft_maps(logits, cfg.temperature, self._noise(keys, map_stream, logits))
        parts = self.modulation(m.part_features(features, maps, masked_mean=cfg.pool == "masked_mean"))
        part_logits = self.classifier(self._dropped(parts[:, :-1], keys))  # [N, K, C]
        left = [part for part in range(cfg.num_parts) if part not in removed]
        logits_of_all = (part_logits[:, left] if removed else part_logits).mean(1)
        return Found(maps, parts, part_logits, logits_of_all, self._mask(logits, keys) if cfg.stages == 2 else None, similarity)

    def _dropped(self, parts: Tensor, keys: Tensor | None) -> Tensor:
        """Whole parts left out of [N, K, D], the others scaled up (nn.Dropout1d, by the samples' keys)."""
        rate = self.cfg.part_dropout
        if not self.training or keys is None or rate == 0:
            return parts
        return parts * (m.kept(keys, m.PART_DROPOUT, parts.shape[1], rate) / (1 - rate)).unsqueeze(-1)

    def _mask(self, logits: Tensor, keys: Tensor | None) -> m.Mask:
        cfg = self.cfg
        drops = self.training and keys is not None and cfg.part_dropout_stage_2 > 0
        return m.foreground(
            logits if cfg.mask_gradient != "none" else logits.detach(),
            cfg.temperature,
            noise=self._noise(keys, m.MASK_NOISE, logits),
            kept_parts=m.kept(keys, m.MASK_DROPOUT, cfg.num_parts, cfg.part_dropout_stage_2) if drops and keys is not None else None,
            straight_through=cfg.mask_gradient == "straight_through" and self.training,
            bounded=cfg.bounded_mask_gradient,
        )


class MaskedClassifier(nn.Module):
    """Stage two: a transformer of its own that sees some of the patches, and a linear head on its class token."""

    def __init__(self, backbone: nn.Module, cfg: PartDiscoveryConfig, num_classes: int) -> None:
        super().__init__()
        width = feature_width(backbone)
        self.cfg = cfg
        self.backbone = backbone
        self.head_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes, bias=False)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, images: Tensor, mask: m.Mask) -> Tensor:
        """Logits [N, C]."""
        return self.head(self.features(images, mask))

    def features(self, images: Tensor, mask: m.Mask) -> Tensor:
        """What the head sees, [N, D]."""
        soft = self.cfg.mask_gradient == "soft"
        passes_on = self.training and self.cfg.mask_gradient == "straight_through"
        # To count what is seen the host waits for the device: always in evaluation, in training where waiting costs nothing.
        able = not soft and (not self.training or self.cfg.prune is True or images.device.type == "cpu")
        token = seen_tokens(
            self.backbone,  # pyright: ignore[reportArgumentType]  # checked when it was built
            images,
            mask.soft if soft else mask.hard,
            bias=m.TINY if soft or passes_on else None,
            prune=able and self.cfg.prune is not False,
        )
        return self.head_norm(token)


class TwoStage(nn.Module):
    """Images to class logits, by the last stage there is."""

    def __init__(self, stage_1: PartFinder, stage_2: MaskedClassifier | None) -> None:
        super().__init__()
        self.stage_1 = stage_1
        self.stage_2 = stage_2

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(images)[1]

    def features(self, images: Tensor) -> Tensor:
        """What the last stage's head sees, [N, D]; of one stage, the mean over parts."""
        found = self.stage_1(images)
        if self.stage_2 is None:
            return found.features[:, :-1].mean(1)
        assert found.mask is not None
        return self.stage_2.features(images, found.mask)

    def classify(
        self, images: Tensor, keys: Tensor | None = None, thresholds: Tensor | None = None, *, map_stream: int = m.MAP_NOISE
    ) -> tuple[Found, Tensor]:
        """What stage one found, and the logits [N, C] of the last stage."""
        return self._judged(images, self.stage_1(images, keys, thresholds, map_stream=map_stream))

    def without_each(self, images: Tensor, keys: Tensor | None = None, thresholds: Tensor | None = None) -> Iterator[tuple[Found, Tensor]]:
        """As `classify` in evaluation, without each part in turn and those that are removed anyway. The first stage's network runs once."""
        cfg, seen = self.stage_1.cfg, self.stage_1.maps(images, keys, m.MAP_NOISE)
        for part in range(cfg.num_parts):
            found = self.stage_1.read(*seen, keys, thresholds, sorted({*cfg.remove_parts, part}), m.MAP_NOISE)
            yield self._judged(images, found)

    def _judged(self, images: Tensor, found: Found) -> tuple[Found, Tensor]:
        if self.stage_2 is None:
            return found, found.logits
        assert found.mask is not None
        return found, self.stage_2(images, found.mask)
