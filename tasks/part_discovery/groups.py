"""Which parameter belongs to what: the twelve groups of learning rate and weight decay, and what each switch freezes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from tasks.part_discovery.config import PartDiscoveryConfig
from trainer.config import ParamRule

TOKENS = r"(cls_token|reg_token|dist_token|pos_embed)$|embeddings\.(mask_token|register_tokens|position_embeddings)$"

KINDS: dict[str, tuple[str, bool]] = {  # name: (pattern, decays), the first that matches counts
    "classifier_1": (r"stage_1\.classifier\.", True),
    "classifier_2": (r"stage_2\.(head|head_norm)\.", True),
    "modulation": (r"stage_1\.modulation\.", False),
    "prototypes": (r"stage_1\.prototypes$", False),
    "tokens_1": (rf"stage_1\.backbone\.(.*\.)?({TOKENS})", False),
    "tokens_2": (rf"stage_2\.backbone\.(.*\.)?({TOKENS})", False),
    "backbone_2": (r"stage_2\.", True),
    "backbone_1": (r"stage_1\.", True),
}
"""Those that decay are two groups each: what has fewer than two dimensions is spared, as everywhere. Twelve in all."""


def kind_of(name: str) -> str:
    """The key of `KINDS` that a parameter's dotted name belongs to."""
    return next(kind for kind, (pattern, _) in KINDS.items() if re.search(pattern, name))


def groups(module: nn.Module) -> dict[str, list[str]]:
    """Names of parameters by group: a kind, and `…_undecayed` for those of a decaying kind with fewer than two dimensions."""
    found: dict[str, list[str]] = {}
    for kind, (_, decays) in KINDS.items():
        found[kind] = []
        if decays:
            found[f"{kind}_undecayed"] = []
    for name, parameter in module.named_parameters():
        kind = kind_of(name)
        found[f"{kind}_undecayed" if KINDS[kind][1] and parameter.ndim < 2 else kind].append(name)
    return found


def rules(cfg: PartDiscoveryConfig) -> Iterator[ParamRule]:
    factors = {
        "classifier_1": cfg.scratch_lr_factor,
        "classifier_2": cfg.scratch_lr_factor,
        "modulation": cfg.modulation_lr_factor,
        "prototypes": cfg.finer_lr_factor,
        "tokens_2": cfg.stage_two_lr_factor,
        "backbone_2": cfg.stage_two_lr_factor,
    }
    for kind, (pattern, decays) in KINDS.items():
        yield ParamRule(pattern, factors.get(kind, 1.0), None if decays else 0.0)


def freeze(module: nn.Module, cfg: PartDiscoveryConfig) -> None:
    """Take gradients from what the four switches name. Classifiers, modulation and prototypes always learn."""
    frozen = {
        "backbone_1": cfg.freeze_stage_1,
        "tokens_1": cfg.freeze_stage_1_tokens,
        "backbone_2": cfg.freeze_stage_2,
        "tokens_2": cfg.freeze_stage_2_tokens,
    }
    for name, parameter in module.named_parameters():
        if frozen.get(kind_of(name)):
            parameter.requires_grad_(False)
