"""Part discovery: stage one finds parts without labels for them, stage two classifies from the parts alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tasks.part_discovery import groups, losses
from tasks.part_discovery.backbones import feature_map, feature_width, headless, shortened, vision_transformer
from tasks.part_discovery.config import PartDiscoveryConfig
from tasks.part_discovery.evaluation import ComparingScores, PartScores
from tasks.part_discovery.maps import TURNED_NOISE
from tasks.part_discovery.network import Found, MaskedClassifier, PartFinder, TwoStage
from tasks.part_discovery.turning import draw_turn
from trainer.config import ParamRule, RunConfig
from trainer.errors import ConfigError, Problem
from trainer.labels import best_five, competitors
from trainer.task import Batch, DataInfo, Evaluator, Progress, StepOutput, Task

STAGES = ("stage_1", "stage_2")  # the terms that learn classes


def build(cfg: PartDiscoveryConfig, run: RunConfig, data: DataInfo) -> PartDiscovery:
    """The task with its networks, drawn one after the other; pretrained ones are the same weights twice."""

    def backbone(drop_path: float) -> nn.Module:
        model = run.model
        if drop_path:
            model = dataclasses.replace(model, drop_path_rate=drop_path)
        channels = model.in_channels or data.channels
        return headless(model.build(num_classes=0, image_size=run.dataset.image_size, in_channels=data.channels), channels)

    classes, name = len(data.classes), run.model.name
    first = backbone(cfg.drop_path_stage_1)
    stage_2 = None
    if cfg.stages == 2:
        vision_transformer(first, name, class_token=False)
        second = vision_transformer(backbone(cfg.drop_path_stage_2), name, class_token=True)
        stage_2 = MaskedClassifier(second, cfg, classes)
    blocks = cfg.stage_1_blocks
    if blocks is None and getattr(run.model, "conv_stem", None):
        blocks = 0
    if blocks is not None:
        first = shortened(first, blocks, name)
    model = TwoStage(PartFinder(first, cfg, classes), stage_2)
    groups.freeze(model, cfg)
    if not isinstance(first, VisionTransformer):
        check_map(first, run, data.channels)
    return PartDiscovery(
        model, cfg, seed=run.seed, image_size=run.dataset.image_size, classes=data.classes, colours=(run.dataset.mean, run.dataset.std),
        num_val=data.num_val, offers=run.dataset.offers,
    )  # fmt: skip


def check_map(network: nn.Module, run: RunConfig, channels: int) -> None:
    """A network that is no transformer tells how fine its maps are when it has seen an image."""
    size = run.dataset.image_size
    network.eval()
    with torch.no_grad():
        features = feature_map(network, torch.zeros(1, channels, size, size)) if hasattr(network, "forward_features") else torch.zeros(1, 1)
    network.train()
    if features.ndim != 4 or features.shape[1] != feature_width(network):
        raise ConfigError(Problem("model.name", run.model.name, "gives no map of features [N, D, h, w] of an image", "model=vit_s"))
    if min(features.shape[2:]) < 3:
        reason = (
            f"{run.model.name} makes a map of {features.shape[2]} x {features.shape[3]} places of it, and presence looks at 3 x 3 at once"
        )
        raise ConfigError(Problem("dataset.image_size", size, reason, f"dataset.image_size={3 * size // min(features.shape[2:])}"))


class PartDiscovery(Task):
    main_metric = "val/top1"
    higher_is_better = True

    def __init__(
        self, model: TwoStage, cfg: PartDiscoveryConfig, *, seed: int, image_size: int, classes: Sequence[str],
        colours: tuple[Sequence[float], Sequence[float]], num_val: int = 0, offers: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.cfg, self.seed, self.image_size, self.classes = cfg, seed, image_size, list(classes)
        self.competing: Tensor | None = None  # [C] bool; None = all classes
        self.colours, self.num_val, self.offers = colours, num_val, offers
        self.find_unused_parameters = cfg.stage_1_weight == 0  # its classifier has no other use

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        images, keys = batch["image"], batch["key"]
        labels = batch["label"]  # [N]
        target = batch.get("target", labels)  # soft [N, C] where images are mixed
        found, logits = self.model.classify(images, keys)
        terms = self.classification(found, logits, target) | self.part_terms(found)
        weights = self.cfg.weights()
        if weights["equivariance"]:
            terms["equivariance"] = self.equivariance(images, keys, found.maps, progress.step)
        grown = min(1.0, progress.fraction / self.cfg.terms_warmup) if self.cfg.terms_warmup else 1.0
        loss = torch.stack([weights[name] * (1.0 if name in STAGES else grown) * term for name, term in terms.items()]).sum()
        with torch.no_grad():
            hard = labels if target is labels else target.argmax(1)
            scores = {"top1": (logits.argmax(1) == hard).float().mean()}
            if self.model.stage_2 is not None:
                scores["top1_stage1"] = (found.logits.argmax(1) == hard).float().mean()
                scores["seen_fraction"] = found.mask.hard.mean() if found.mask else loss.new_zeros(())
        return StepOutput(loss, {**{name: term.detach() for name, term in terms.items()}, **scores})

    def classification(self, found: Found, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of each stage that has a weight."""
        cfg, terms = self.cfg, {}
        if cfg.stage_1_weight:
            terms["stage_1"] = F.cross_entropy(found.logits.float(), target, label_smoothing=cfg.label_smoothing)
        if cfg.stage_2_weight and self.model.stage_2 is not None:
            terms["stage_2"] = F.cross_entropy(logits.float(), target, label_smoothing=cfg.label_smoothing)
        return terms

    def part_terms(self, found: Found) -> dict[str, Tensor]:
        """What maps and part features should be like, in float32."""
        cfg, maps = self.cfg, found.maps
        everywhere = cfg.presence_scope == "global"
        terms = {
            "orthogonality": lambda: losses.orthogonality(found.features, axis=cfg.orthogonality_axis),
            "presence": lambda: losses.presence(maps, cfg.presence_type, across_ranks=everywhere),
            "enforced_presence": lambda: losses.enforced_presence(maps, cfg.enforced_presence_type),
            "total_variation": lambda: losses.total_variation(maps),
            "entropy": lambda: losses.entropy(maps),
            "concentration": lambda: losses.concentration(maps),
        }
        weights = cfg.weights()
        with torch.autocast(maps.device.type, enabled=False):
            return {name: term() for name, term in terms.items() if weights[name]}

    def equivariance(self, images: Tensor, keys: Tensor, maps: Tensor, step: int) -> Tensor:
        """Only the first stage sees the turned images: their maps are all that is asked for."""
        cfg = self.cfg
        turn = draw_turn(
            self.seed, step, self.image_size,
            rotation=cfg.equivariance_rotation, translation=cfg.equivariance_translation, zoom=cfg.equivariance_zoom,
        )  # fmt: skip
        _, _, turned = self.model.stage_1.maps(turn.apply(images), keys, TURNED_NOISE)
        return losses.equivariance(maps, turn.undo(turned))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for stage, frozen in ((self.model.stage_1, self.cfg.freeze_stage_1), (self.model.stage_2, self.cfg.freeze_stage_2)):
            if frozen and stage is not None:
                stage.backbone.eval()  # no drop path, and batch statistics as they are
        return self

    def features(self, images: Tensor) -> Tensor:
        return self.model.features(images)

    def restrict(self, classes: Sequence[int]) -> None:
        self.competing = competitors(classes, len(self.classes), next(self.parameters()).device)

    def predict(self, batch: Batch) -> list[list[dict[str, Any]]]:
        """The likeliest class of each image by the last stage, and which parts it shows, by the number of their places."""
        found, logits = self.model.classify(batch["image"], batch.get("key"))
        owners = found.maps.argmax(1).flatten(1)  # [N, h * w]
        rows = best_five(logits, self.classes, self.competing)
        for (row,), owner in zip(rows, owners, strict=True):
            counts = torch.bincount(owner, minlength=self.cfg.num_parts + 1)[:-1].tolist()  # the last is the background
            row["parts"] = "; ".join(f"{part}: {count}" for part, count in enumerate(counts) if count)
        return rows

    def compiled_parts(self) -> Sequence[nn.Module]:
        """Blocks: a network's own forward pass is not what is called."""
        return [block for network in self.model.modules() if isinstance(network, VisionTransformer) for block in network.blocks]

    def param_rules(self) -> Sequence[ParamRule]:
        return list(groups.rules(self.cfg))

    def evaluator(self) -> Evaluator:
        points = self.cfg.keypoint_regression and {"parts", "box"} <= self.offers
        return ComparingScores(self) if points or self.cfg.threshold_quantile is not None else PartScores(self)
