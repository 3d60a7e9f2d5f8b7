"""Which parameter gets which learning rate and weight decay, and the optimizers themselves.

Knows parameters by name, shape and owner; does not know what is being learned or how the rate moves over time.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from trainer import adamw
from trainer.config.names import nearest
from trainer.config.optimizer import OptimizerConfig, ParamRule
from trainer.errors import ConfigError, Problem
from trainer.parts import backbone_parameters
from trainer.pyramid import Pyramid, layers_of

if TYPE_CHECKING:
    from trainer.config.optimizer import AdamW, TimmOptimizer
    from trainer.config.optimizer import Sgd as SgdConfig

log = logging.getLogger(__name__)

NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms
)


def parameter_groups(
    module: nn.Module, cfg: OptimizerConfig, batch_size: int, own_rules: Sequence[ParamRule] = (), total_steps: int = 1
) -> list[dict[str, Any]]:
    """Groups of {params, lr, weight_decay} over everything in `module` that trains; parameters of equal rates share one.

    `own_rules` are the module's own, for what no rule of the config matches. `total_steps` is the length of the run, which a
    normalised weight decay depends on. A rule with lr_factor 0 freezes: it takes requires_grad away, so call this before
    wrapping the module in DDP.
    """
    rules = _match_rules(module, cfg)
    for name, _ in module.named_parameters():
        own = next((rule for rule in own_rules if re.search(rule.pattern, name)), None)
        if own is not None:
            rules.setdefault(name, own)
    scales = layer_scales(module, cfg.layer_decay)
    backbone, factor = _backbone(module, cfg)
    spared = set(_spared(module, cfg))
    peak = cfg.scaled_lr(batch_size)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        rule = rules.get(name, ParamRule(pattern=""))
        if rule.lr_factor == 0:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        lr = peak * scales.get(name, 1.0) * rule.lr_factor * (factor if name in backbone else 1.0)
        weight_decay = rule.weight_decay
        if weight_decay is None:
            weight_decay = 0.0 if name in spared else cfg.weight_decay
        weight_decay = cfg.scaled_weight_decay(weight_decay, total_steps)
        group = groups.setdefault((lr, weight_decay), {"params": [], "lr": lr, "weight_decay": weight_decay})
        group["params"].append(parameter)
    if not groups:
        raise ConfigError(Problem("optimizer.rules", [r.pattern for r in cfg.rules], "every parameter is frozen: nothing would be trained"))
    return list(groups.values())


def _match_rules(module: nn.Module, cfg: OptimizerConfig) -> dict[str, ParamRule]:
    """The first rule that matches each parameter's name. Raises ConfigError for rules that nothing is left for."""
    names = [name for name, _ in module.named_parameters()]
    taken: dict[str, ParamRule] = {}
    problems = []
    for i, rule in enumerate(cfg.rules):
        key = f"optimizer.rules[{i}].pattern"
        matched = [name for name in names if re.search(rule.pattern, name)]
        left = [name for name in matched if name not in taken]
        taken |= dict.fromkeys(left, rule)
        if not matched:
            problems.append(Problem(key, rule.pattern, "matches the name of no parameter", _close_to(rule.pattern, names)))
        elif not left:
            first = next(j for j, other in enumerate(cfg.rules) if re.search(other.pattern, matched[0]))
            reason = f"every parameter it matches ({matched[0]} …) goes to optimizer.rules[{first}], which comes first"
            problems.append(Problem(key, rule.pattern, reason, "put the narrower rule first"))
    if problems:
        raise ConfigError(*problems)
    return taken


def _backbone(module: nn.Module, cfg: OptimizerConfig) -> tuple[set[str], float]:
    """Names of the backbone's parameters, and the factor on their learning rate."""
    if cfg.backbone_lr is None:
        return set(), 1.0
    names = backbone_parameters(module)
    if not names:
        reason = f"no network in {type(module).__name__} has a head that could be told from the rest"
        raise ConfigError(Problem("optimizer.backbone_lr", cfg.backbone_lr, reason, "optimizer.rules=[{pattern: ..., lr_factor: ...}]"))
    return names, cfg.backbone_lr / cfg.lr


def _close_to(pattern: str, names: list[str]) -> str:
    """What the author of a pattern that matches nothing may have meant."""
    parts = dict.fromkeys(part for name in names for part in name.split("."))
    close = nearest(re.sub(r"[\\^$]", "", pattern), [*parts, *names])
    if close is None:
        tops = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
        return "one of the parameters' names, which begin with " + ", ".join(list(tops)[:8])
    example = next(name for name in names if close in name)
    return f"{close}, as in {example}"


def _spared(module: nn.Module, cfg: OptimizerConfig) -> Iterator[str]:
    """Names of the parameters without weight decay: what has fewer than two dimensions (biases, norms, scales), norms of
    any shape, what `no_decay` matches, and what a network says of itself as timm's do."""
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(part, NORMS):
            yield from (dot + name for name, _ in part.named_parameters(recurse=False))
        of_its_own = getattr(part, "no_weight_decay", None)
        if callable(of_its_own):
            names: Any = of_its_own()
            yield from (dot + name for name in names)
    patterns = [re.compile(pattern) for pattern in cfg.no_decay]
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2 or any(pattern.search(name) for pattern in patterns):
            yield name


def layer_scales(module: nn.Module, decay: float | None) -> dict[str, float]:
    """Factor on each parameter's learning rate: decay ** (L + 1 - id), id 0 for the embedding, i + 1 for block i, L + 1 for
    the head (arXiv:2106.08254, app. C; MAE, arXiv:2111.06377, app. A.2). Networks tell their layers by `group_matcher`,
    as timm's do; what belongs to none (a task's own head) is as far up as can be, 1. Above the last layer of a pyramid,
    which has no head, is the detector (ViTDet, arXiv:2203.16527, app. A.3)."""
    if decay is None:
        return {}
    networks = list(_networks_with_layers(module, ""))
    if not networks:
        reason = f"no network in {type(module).__name__} tells its layers (group_matcher, as timm's networks have it)"
        raise ConfigError(Problem("optimizer.layer_decay", decay, reason, "optimizer.layer_decay=null"))
    scales: dict[str, float] = {}
    for prefix, network in networks:
        headless = isinstance(network, Pyramid)
        layer_of = network.layers() if headless else layers_of(network)
        top = max(layer_of.values()) + headless
        scales |= {prefix + name: decay ** (top - layer) for name, layer in layer_of.items()}
    return scales


def _networks_with_layers(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that have a `group_matcher`, or are made of such."""
    if hasattr(module, "group_matcher") or isinstance(module, Pyramid):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _networks_with_layers(child, f"{prefix}{name}.")


# --- optimizers ---------------------------------------------------------------------------------------------------------


def build_adamw(cfg: AdamW, groups: list[dict[str, Any]]) -> Optimizer:
    betas = (cfg.betas[0], cfg.betas[1])
    if fused_or_none(cfg, groups):
        return adamw.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps)


def build_sgd(cfg: SgdConfig, groups: list[dict[str, Any]]) -> Optimizer:
    return Sgd(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=fused_or_none(cfg, groups))


class Sgd(torch.optim.SGD):
    """torch's, with momenta that begin at zero, which is what the first gradient is added to.

    torch's fused kernel takes memory for them at the first step and fills it there, unless that step is skipped for a bad
    gradient, as fp16's first ones usually are: then the next step adds to whatever lay there (torch 2.15, optim/sgd.py). And it
    wants a momentum of every parameter or of none, while some may have their first gradient later than others.
    """

    def _init_group(self, group: Any, params: Any, grads: Any, momentum_buffer_list: list[Any]) -> bool:
        sparse = super()._init_group(group, params, grads, momentum_buffer_list)  # pyright: ignore[reportAttributeAccessIssue]
        for i, momentum in enumerate(momentum_buffer_list):
            if momentum is None:
                momentum_buffer_list[i] = torch.zeros_like(params[i])
        return sparse


def fused_or_none(cfg: OptimizerConfig, groups: list[dict[str, Any]]) -> bool | None:
    """True where torch has a fused kernel for all of these parameters; None, torch's own choice, elsewhere."""
    if not cfg.fused:
        return None
    devices = _get_fused_kernels_supported_devices()
    for parameter in (p for group in groups for p in group["params"]):
        if parameter.device.type not in devices or not parameter.is_floating_point():
            what = f"{parameter.dtype} on {parameter.device.type}"
            log.warning("no fused optimizer for %s, using torch's own choice (optimizer.fused=false silences this)", what)
            return None
    return True


def build_timm(cfg: TimmOptimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer timm knows as `cfg.name`. Raises ConfigError for a name or an argument it does not know."""
    from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers

    base = cfg.name.lower().removeprefix("lookahead_")
    known = [str(name) for name in list_optimizers()]
    if base not in known:
        close = nearest(cfg.name, known)
        reason = "timm knows no optimizer of this name (timm.optim.list_optimizers() prints them)"
        raise ConfigError(Problem("optimizer.name", cfg.name, reason, f"optimizer.name={close}" if close else "optimizer.name=lamb"))
    info = get_optimizer_info(base)
    if info.second_order:
        reason = "needs second-order gradients, which the loop does not compute"
        raise ConfigError(Problem("optimizer.name", cfg.name, reason, "optimizer.name=adamw"))
    if isinstance(info.opt_class, str):  # apex., bitsandbytes.: timm only names their classes
        package = info.opt_class.split(".")[0]
        if importlib.util.find_spec(package) is None or not torch.cuda.is_available():
            reason = f"is in the package {package}, which needs a CUDA device and to be installed"
            raise ConfigError(Problem("optimizer.name", cfg.name, reason, "optimizer.name=adamw"))
    accepted = inspect.signature(get_optimizer_class(base, bind_defaults=False)).parameters
    arguments = _timm_arguments(cfg, info.num_betas, accepted)

    if "fused" in accepted and base != "adagrad":  # which has one on the CPU only
        arguments.setdefault("fused", fused_or_none(cfg, groups))
    return create_optimizer_v2(groups, opt=cfg.name, lr=cfg.lr, weight_decay=cfg.weight_decay, **arguments)  # pyright: ignore[reportArgumentType]


def _timm_arguments(cfg: TimmOptimizer, num_betas: int, accepted: Any) -> dict[str, Any]:
    """What the config sets, checked against what this optimizer takes."""
    named = {"momentum": cfg.momentum, "betas": tuple(cfg.betas) if cfg.betas else None, "eps": cfg.eps}
    arguments = {name: value for name, value in named.items() if value is not None}
    problems = []
    for name, value in arguments.items():
        if name not in accepted:
            problems.append(Problem(f"optimizer.{name}", value, f"{cfg.name} has none", f"optimizer.{name}=null"))
    if "betas" in arguments and "betas" in accepted and len(arguments["betas"]) != num_betas:
        problems.append(Problem("optimizer.betas", cfg.betas, f"{cfg.name} has {num_betas}", "optimizer.betas=null"))
    for name, value in cfg.args.items():
        if name not in accepted:
            close = nearest(name, accepted)
            fix = f"optimizer.args.{close}={value}" if close else "one of " + ", ".join(accepted)
            problems.append(Problem(f"optimizer.args.{name}", value, f"{cfg.name} takes no such argument", fix))
    if problems:
        raise ConfigError(*problems)
    return arguments | cfg.args
