"""Networks by the names timm and torchvision know them by, built for any image size, channels and classes.

Everything a library refuses comes out as a ConfigError that names the key. Knows nothing of tasks or training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.config.names import nearest
from trainer.dilation import dilate
from trainer.errors import ConfigError, Problem
from trainer.pretrained import first_line, load_torchvision, timm_weights_within_reach, torchvision_weights, unreachable

if TYPE_CHECKING:
    from trainer.config.loop import LoopConfig
    from trainer.config.model import ModelConfig, TimmModel, TorchvisionModel

DROP_RATES = ("drop_rate", "drop_path_rate")
SMALL = 96  # pixels; below, a network that halves the image five or six times may have nothing left of it


# --- timm ---------------------------------------------------------------------------------------------------------------


def build_timm(cfg: TimmModel, *, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    """timm's network; with `num_classes=0` it ends in pooled features [N, D]."""
    import timm

    metadata = None
    if ":" not in cfg.name:  # hf-hub: and local-dir: names are timm's to resolve
        _check_timm_name(cfg.name)
        metadata = timm.models.get_pretrained_cfg(cfg.name)
    arguments: dict[str, Any] = {
        "patch_size": cfg.patch_size,
        "drop_rate": cfg.drop_rate,
        "drop_path_rate": cfg.drop_path_rate,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None} | cfg.args
    if cfg.conv_stem:
        arguments |= _stem(cfg.conv_stem, cfg.conv_stem_depth, cfg.in_channels or in_channels)
    if metadata is not None and metadata.fixed_input_size:  # position embeddings, relative positions, windows
        arguments.setdefault("img_size", image_size)
    if cfg.pretrained and metadata is not None and "pretrained_cfg_overlay" not in cfg.args:
        timm_weights_within_reach(cfg.name, metadata)
    try:
        model = _created(cfg.name, arguments, pretrained=cfg.pretrained, num_classes=num_classes, in_chans=cfg.in_channels or in_channels)
    except Exception as error:
        raise _refused(error, cfg, arguments, image_size, "timm") from error
    _try_small(model, cfg, in_channels, image_size)
    return model


def _created(name: str, arguments: dict[str, Any], **rest: Any) -> nn.Module:
    """timm's network. A rate of zero is left out where the network takes no such argument: it has none to be switched off."""
    import timm

    try:
        return timm.create_model(name, **rest, **arguments)
    except TypeError as error:
        idle = [rate for rate in DROP_RATES if arguments.get(rate) == 0 and f"'{rate}'" in str(error)]
        if not idle:
            raise
        return _created(name, {key: value for key, value in arguments.items() if key not in idle}, **rest)


def _stem(channels: list[int], depth: int, in_channels: int) -> dict[str, Any]:
    """Arguments of timm's vision transformers that put convolutions, `depth` for each halving of the image, before the blocks."""
    from timm.layers import ConvNormAct, HybridEmbed

    convolutions, before = nn.Sequential(), in_channels
    for after in channels:
        for i in range(depth):
            convolutions.append(ConvNormAct(before, after, kernel_size=3, stride=2 if i == 0 else 1))
            before = after
    return {"patch_size": 1, "embed_layer": partial(HybridEmbed, backbone=convolutions)}


def _check_timm_name(name: str) -> None:
    """`name` is an architecture or, with a tag, one set of its published weights."""
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ConfigError(_unknown(name, timm.list_models(), "timm", "timm.list_models()"))
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in tagged:
        raise ConfigError(_unknown(name, tagged, "timm", "timm.list_pretrained()"))


# --- torchvision --------------------------------------------------------------------------------------------------------


def build_torchvision(cfg: TorchvisionModel, *, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    """torchvision's classifier; with `num_classes=0` it ends in pooled features [N, D]."""
    import torchvision.models as zoo

    known = zoo.list_models(module=zoo)
    if cfg.name not in known:
        raise ConfigError(_unknown(cfg.name, known, "torchvision", "torchvision.models.list_models(module=torchvision.models)"))
    arguments: dict[str, Any] = dict(cfg.args)
    constructor = zoo.get_model_builder(cfg.name)
    if cfg.name.startswith("vit_"):
        arguments.setdefault("image_size", image_size)
    elif cfg.name.startswith("maxvit_"):
        arguments.setdefault("input_size", (image_size, image_size))
    if cfg.patch_size is not None:
        raise ConfigError(
            Problem("model.patch_size", cfg.patch_size, "torchvision's networks have theirs in their name", "model.patch_size=null")
        )
    output_stride = arguments.pop("output_stride", None)  # timm's word for it, whose networks take it themselves
    if cfg.name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": True}  # a second output would be no classifier's
    try:
        model: nn.Module = constructor(num_classes=num_classes or 1000, **arguments)
    except Exception as error:
        raise _refused(error, cfg, arguments, image_size, "torchvision") from error
    channels = cfg.in_channels or in_channels
    if channels != 3:
        _replace_first_convolution(model, channels)
    if num_classes == 0:
        _replace(model, _names(model, nn.Linear)[-1], nn.Identity())
    if output_stride is not None:
        dilate(model, output_stride, name=cfg.name, in_channels=channels)
    if cfg.pretrained:
        load_torchvision(model, torchvision_weights(cfg.name), cfg.name, channels)
    _try_small(model, cfg, in_channels, image_size)
    return model


def _replace_first_convolution(model: nn.Module, channels: int) -> None:
    name = _names(model, nn.Conv2d)[0]
    old = model.get_submodule(name)
    assert isinstance(old, nn.Conv2d)
    assert isinstance(old.padding, tuple)
    new = nn.Conv2d(
        channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, bias=old.bias is not None  # type: ignore[arg-type]
    )  # fmt: skip
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    _replace(model, name, new)


def _names(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, kind)]


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


# --- errors -------------------------------------------------------------------------------------------------------------


def _unknown(name: str, known: Iterable[str], library: str, lister: str) -> Problem:
    close = nearest(name, known)
    return Problem(
        "model.name", name, f"{library} knows no network of this name ({lister} prints them)", f"model.name={close}" if close else ""
    )


def _refused(error: Exception, cfg: ModelConfig, arguments: Mapping[str, Any], image_size: int, library: str) -> Exception:
    """What the library's error means in terms of the config; the error itself where it means nothing."""
    text = first_line(error)
    if isinstance(error, FileNotFoundError) and cfg.name.startswith("local-dir:"):
        return ConfigError(Problem("model.name", cfg.name, f"is no folder with a network of timm's: {text}"))
    cannot = unreachable(error, cfg.name)
    if cannot is not None:
        return ConfigError(cannot)
    keys = dict.fromkeys(("img_size", "image_size", "input_size"), "dataset.image_size") | {"in_chans": "model.in_channels"}
    keys |= {name: f"model.{name}" for name in ("patch_size", *DROP_RATES)}
    keys |= {name: f"model.args.{name}" for name in cfg.args}
    if isinstance(error, TypeError):  # "… got an unexpected keyword argument 'patch_size'"
        for name, key in keys.items():
            if re.search(rf"\b{name}\b", text):
                value = arguments.get(name, image_size)
                default = {"drop_rate": "0", "drop_path_rate": "0", "patch_size": "null"}.get(name)
                fix = f"{key}={default}" if default and name not in cfg.args else f"leave {key} out"
                return ConfigError(Problem(key, value, f"{cfg.name} takes no such argument ({library}: {text})", fix))
    if isinstance(error, TypeError | ValueError | AssertionError | RuntimeError | ArithmeticError):
        asked = {keys[name]: value for name, value in arguments.items() if name in keys}
        key, value = next(iter(asked.items()), ("model.name", cfg.name))
        given = ", ".join(f"{k}={v}" for k, v in asked.items())
        return ConfigError(Problem(key, value, f"{library} cannot build {cfg.name} with {given or 'these values'}: {text}"))
    return error


def _try_small(model: nn.Module, cfg: ModelConfig, in_channels: int, image_size: int) -> None:
    """Send one small image through, so that a network too deep for it is refused now, with the size it could take."""
    if image_size >= SMALL:
        return
    channels = cfg.in_channels or in_channels
    error = _error_at(model, channels, image_size)
    if error is None:
        return
    larger = next((size for size in (64, 96, 128, 224) if _error_at(model, channels, size) is None), None)
    reason = f"{cfg.name} cannot take images of {image_size} pixels: {first_line(error)}"
    raise ConfigError(Problem("dataset.image_size", image_size, reason, f"dataset.image_size={larger}" if larger else "")) from error


def _error_at(model: nn.Module, channels: int, size: int) -> Exception | None:
    training = model.training
    model.eval()  # leaves batch statistics and the random state alone
    try:
        with torch.no_grad():
            model(torch.zeros(1, channels, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        return error
    finally:
        model.train(training)
    return None


# --- getting a network ready for the loop -------------------------------------------------------------------------------


def prepare(module: nn.Module, loop: LoopConfig) -> nn.Module:
    """Memory layout and activation checkpointing, as `loop` asks. Call it before the optimizer is made."""
    if loop.activation_checkpointing:
        checkpoint_activations(module)
    if loop.channels_last:
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module


def checkpoint_activations(module: nn.Module) -> None:
    """Recompute activations in the backward pass wherever a network inside `module` knows how to (as timm's do)."""
    able = list(_outermost_with(module, "set_grad_checkpointing"))
    if not able:
        reason = f"no network in {type(module).__name__} can recompute its activations (timm's can: set_grad_checkpointing)"
        raise ConfigError(Problem("loop.activation_checkpointing", True, reason, "loop.activation_checkpointing=false"))
    for network in able:
        try:
            network.set_grad_checkpointing(True)  # type: ignore[operator]
        except AssertionError as error:
            reason = f"{type(network).__name__} cannot recompute its activations"
            raise ConfigError(Problem("loop.activation_checkpointing", True, reason, "loop.activation_checkpointing=false")) from error
        for part in network.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.register_forward_pre_hook(_hold_statistics)
                part.register_forward_hook(_release_statistics, always_call=True)


def _hold_statistics(norm: nn.Module, _: Any) -> None:
    """A batch seen again in the backward pass must not count twice in the running statistics."""
    recomputing = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]  # torch.utils.checkpoint asks the same
    if recomputing and norm.track_running_stats:
        norm.held = (norm.running_mean, norm.running_var, norm.num_batches_tracked)  # type: ignore[assignment]
        norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()  # type: ignore[operator, union-attr]
        norm.num_batches_tracked = norm.num_batches_tracked.clone()  # type: ignore[operator, union-attr]


def _release_statistics(norm: nn.Module, *_: Any) -> None:
    held = norm.__dict__.pop("held", None)
    if held is not None:
        norm.running_mean, norm.running_var, norm.num_batches_tracked = held


def _outermost_with(module: nn.Module, method: str) -> Iterable[nn.Module]:
    if hasattr(module, method):
        yield module
        return
    for child in module.children():
        yield from _outermost_with(child, method)
