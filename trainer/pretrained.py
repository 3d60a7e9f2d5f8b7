"""Published weights: whether they can be had here, and what to say where they cannot.

The hub's client retries for most of a minute before it gives up, so a host that has no name is found out first.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError, Problem


def timm_metadata(name: str) -> Any:
    """What timm knows of a network's input and weights, by the config.json of a repository of the hub ("hf_hub:timm/vit_…", out of
    the cache where it is there) or of a folder ("local-dir:/models/vit"). None where timm knows no such source.

    Raises:
        ConfigError: there is no such file, and none can be fetched.
    """
    import timm

    source, _, where = name.partition(":")
    local = source.lower() == "local-dir"
    if not local and source.lower() not in ("hf-hub", "hf_hub"):
        return None
    file = Path(where).expanduser() / "config.json" if local else _hub_config(name, where)
    if not file.is_file():
        raise ConfigError(Problem("model.name", name, "is no folder with a network of timm's: there is no config.json in it"))
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        architecture, own = str(facts["architecture"]), facts.get("pretrained_cfg", facts)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(Problem("model.name", name, f"{file} describes no network of timm's: {first_line(error)}")) from error
    usual = timm.models.get_pretrained_cfg(architecture, allow_unregistered=True)
    fixed = own.get("fixed_input_size", usual is not None and usual.fixed_input_size)
    origin: dict[str, Any] = {"file": where} if local else {"hf_hub_id": where, "hf_hub_filename": own.get("hf_hub_filename")}
    return timm.models.PretrainedCfg(architecture=architecture, fixed_input_size=fixed, **origin)


def _hub_config(name: str, where: str) -> Path:
    """config.json of a repository of the hub, `owner/name` or `owner/name@revision`."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    repository, _, revision = where.partition("@")
    try:
        cached = try_to_load_from_cache(repository, "config.json", revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
        if _hub_can_be_asked():
            return Path(hf_hub_download(repository, "config.json", revision=revision or None))
        why = "is not cached here and cannot be fetched"
    except Exception as error:  # no such repository, no such file in it, no answer
        why = f"cannot be had: {first_line(error)}"
    place = f"{constants.HF_HUB_CACHE}/models--{repository.replace('/', '--')}"
    raise ConfigError(
        Problem(
            "model.name",
            name,
            f"config.json of {constants.ENDPOINT}/{repository} {why}",
            f"a network that timm has itself (timm.list_models() prints them), or put what a machine with a network caches in {place}",
        )
    )


def timm_weights_within_reach(name: str, metadata: Any) -> None:
    """Return where timm's weights are cached here or their host can be found; raise ConfigError otherwise."""
    from huggingface_hub import try_to_load_from_cache

    if not (metadata.hf_hub_id or metadata.url or metadata.file or metadata.state_dict):
        raise ConfigError(Problem("model.pretrained", True, f"there are no published weights of {name}", "model.pretrained=false"))
    if metadata.hf_hub_id is None:
        return
    files = [metadata.hf_hub_filename] if metadata.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    repository, _, revision = metadata.hf_hub_id.partition("@")
    if any(isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str) for file in files):
        return
    hub_within_reach(repository)


def hub_within_reach(repository: str) -> None:
    """Return where Hugging Face's hub can be asked for what is not cached; raise ConfigError otherwise."""
    from huggingface_hub import constants

    if not _hub_can_be_asked():
        where = f"{constants.HF_HUB_CACHE}/models--{repository.replace('/', '--')}"
        raise ConfigError(_no_weights(f"{constants.ENDPOINT}/{repository}", where))


def _hub_can_be_asked() -> bool:
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _host_has_a_name(constants.ENDPOINT)


def torchvision_weights(name: str) -> dict[str, Tensor]:
    """torchvision's default weights of `name`."""
    import torchvision.models as zoo

    weights = zoo.get_model_weights(name)["DEFAULT"]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(weights.url).path).name
    if not cached.exists() and not _host_has_a_name(weights.url):
        raise ConfigError(_no_weights(weights.url, str(cached)))
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except OSError as error:
        raise ConfigError(_no_weights(weights.url, str(cached))) from error


def load_torchvision(model: nn.Module, state: dict[str, Tensor], name: str, channels: int) -> None:
    """Load weights into a network of another size, other channels or other classes than they were trained with."""
    # DenseNet's published files still have the names of before 2017.
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): value for key, value in state.items()}
    own = model.state_dict()
    first = next(f"{path}.weight" for path, part in model.named_modules() if isinstance(part, nn.Conv2d))
    if channels != 3 and first in state:
        from timm.models import adapt_input_conv

        state[first] = adapt_input_conv(channels, state[first])
    if "encoder.pos_embedding" in state:
        from torchvision.models.vision_transformer import interpolate_embeddings

        state = dict(interpolate_embeddings(int(model.image_size), int(model.patch_size), OrderedDict(state)))  # type: ignore[arg-type]
    heads = ("fc.", "head.", "heads.", "classifier.", "aux", "AuxLogits.")  # for other classes: drawn anew
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    wrong = [key for key in state if key not in fitting and not key.startswith(heads)]
    absent = [key for key in own if key not in state and not key.startswith(heads) and not key.endswith("num_batches_tracked")]
    if wrong or absent:
        reason = f"the weights do not fit {name} with model.args as they are: {', '.join((wrong + absent)[:4])} …"
        raise ConfigError(Problem("model.pretrained", True, reason, "model.pretrained=false"))
    model.load_state_dict(fitting, strict=False)


def unreachable(error: Exception, name: str) -> Problem | None:
    """What to say where `error` means that weights could not be fetched; None where it means something else."""
    network = {"huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "urllib", "http", "socket"}
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in network:
        from huggingface_hub import constants

        return _no_weights(name, f"{constants.HF_HUB_CACHE} or {torch.hub.get_dir()}/checkpoints")
    return None


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _host_has_a_name(url: str) -> bool:
    """A proxy finds names by itself, so behind one only trying tells."""
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in ("https_proxy", "http_proxy", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(url).hostname, 443)
    except OSError:
        return False
    return True


def _no_weights(source: str, where: str) -> Problem:
    return Problem(
        "model.pretrained",
        True,
        f"the weights ({source}) are not cached here and cannot be fetched",
        f"model.pretrained=false init_from=<file with the weights>, or put what a machine with a network caches in {where}",
    )
