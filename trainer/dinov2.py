"""DINOv2 networks as Hugging Face's transformers store them, read into timm's vision transformer of the same shape.

So RAD-DINO and its like can do what timm's networks can: any image size, hidden tokens, layer decay. Of the library only the
files are needed, from the hub's cache or a folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError, Problem
from trainer.pretrained import first_line, hub_within_reach, unreachable
from trainer.resample import resampled

if TYPE_CHECKING:
    from trainer.config.model import TimmModel

KINDS = ("dinov2", "dinov2_with_registers")  # `model_type` in config.json
RENAMED = (  # transformers' names, timm's names
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),  # SwiGLU: gate and value in one, as in the hub's files
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)


def build_dinov2(cfg: TimmModel, *, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    """The network `cfg.name` of the hub, or in a folder of that name. Raises ConfigError where it is none, or out of reach."""
    from timm.models.vision_transformer import VisionTransformer

    facts = json.loads(_file(cfg, "config.json").read_text())
    if facts.get("model_type") not in KINDS:
        reason = f"is a {facts.get('model_type', 'network of no known kind')}; of the hub's networks, {' and '.join(KINDS)} are read"
        raise ConfigError(Problem("model.name", cfg.name, reason, "model.name=facebook/dinov2-base, or model.source=timm"))
    registers = int(facts.get("num_register_tokens", 0))
    arguments: dict[str, Any] = {
        "img_size": image_size, "patch_size": facts["patch_size"], "in_chans": cfg.in_channels or in_channels, "num_classes": num_classes,
        "embed_dim": facts["hidden_size"], "depth": facts["num_hidden_layers"], "num_heads": facts["num_attention_heads"],
        "mlp_ratio": facts["mlp_ratio"], "qkv_bias": facts["qkv_bias"], "init_values": facts["layerscale_value"],
        "reg_tokens": registers, "no_embed_class": registers > 0, "drop_rate": cfg.drop_rate or 0.0,
        "drop_path_rate": cfg.drop_path_rate or 0.0,
    }  # fmt: skip
    if facts.get("use_swiglu_ffn"):
        arguments |= swiglu(facts["hidden_size"], facts["mlp_ratio"])
    try:
        model = VisionTransformer(**(arguments | cfg.args))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(Problem("model.name", cfg.name, f"timm cannot build it: {first_line(error)}")) from error
    if cfg.pretrained:
        load(model, weights(_file(cfg, "model.safetensors")), cfg.name)
    return model


def swiglu(width: int, ratio: float) -> dict[str, Any]:
    """Arguments of timm's transformer whose layers between attentions are gated as in DINOv2's giant (arXiv:2002.05202): two thirds
    of the hidden channels, rounded up to a multiple of eight, once for the gate and once for the values."""
    from timm.layers import SwiGLUPacked

    hidden = (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8
    return {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": (2 * hidden + 0.5) / width}  # timm rounds width * ratio down


def _file(cfg: TimmModel, name: str) -> Path:
    """A file of the repository, out of a folder, the cache or the network."""
    folder = Path(cfg.name).expanduser()
    if folder.is_dir():
        if (folder / name).is_file():
            return folder / name
        raise ConfigError(Problem("model.name", cfg.name, f"the folder holds no {name}", "model.name=<a folder of save_pretrained()>"))
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(cfg.name, name)
    if isinstance(cached, str):
        return Path(cached)
    hub_within_reach(cfg.name)
    try:
        return Path(hf_hub_download(cfg.name, name))
    except Exception as error:
        cannot = unreachable(error, cfg.name)
        if cannot is None:
            cannot = Problem("model.name", cfg.name, f"is no network of the hub: {first_line(error)}", "model.name=microsoft/rad-dino")
        raise ConfigError(cannot) from error


def weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def load(model: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Load transformers' weights into timm's network, at its own image size and channels. A classifier is left as drawn."""
    own = model.state_dict()
    fitting: dict[str, Tensor] = {}
    for key, value in timm_names(state, registers=int(cast(Any, model).num_reg_tokens)).items():
        if key not in own:
            continue  # the mask token of pretraining, a classifier
        if key == "patch_embed.proj.weight" and value.shape[1] != own[key].shape[1]:
            from timm.models import adapt_input_conv

            value = adapt_input_conv(own[key].shape[1], value)
        if value.shape != own[key].shape:
            value = resampled(model, key, value, own[key])
        if value is None:
            raise ConfigError(Problem("model.name", name, f"its {key} does not fit the network that its config.json describes"))
        fitting[key] = value
    missing = [key for key in own if key not in fitting and not key.startswith("head.")]
    if missing:
        raise ConfigError(Problem("model.name", name, f"its file has no {missing[0]}"))
    model.load_state_dict(fitting, strict=False)


def timm_names(state: dict[str, Tensor], *, registers: int) -> dict[str, Tensor]:
    """The same weights under timm's names: query, key and value in one, a gate and its values in one, and with registers the class token with its position."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for theirs, ours in RENAMED:
            key = re.sub(theirs, ours, key)
        renamed[key] = value
    for parts, packed in ((("query", "key", "value"), "qkv"), (("gate_proj", "up_proj"), "fc1")):
        for key in [k for k in renamed if f".{parts[0]}." in k]:
            renamed[key.replace(parts[0], packed)] = torch.cat([renamed.pop(key.replace(parts[0], part)) for part in parts])
    if registers:
        positions = renamed["pos_embed"]
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        renamed["pos_embed"] = positions[:, 1:]
    return renamed
