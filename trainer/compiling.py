"""`torch.compile` as an offer: where it fails, the run goes on without it, after one warning."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from trainer.errors import ConfigError, Problem

logger = logging.getLogger(__name__)


def regions(module: nn.Module) -> list[nn.Module]:
    """The innermost blocks that a network repeats: neighbours in a list or a sequence, of one class. Compiled one by one they
    share what is compiled, so that depth costs no time."""
    found: list[nn.Module] = []
    parts = list(module.children())
    kinds = Counter(type(part) for part in parts if not isinstance(part, nn.ModuleList | nn.Sequential))
    for part in parts:
        inner = regions(part)
        repeated = isinstance(module, nn.ModuleList | nn.Sequential) and kinds[type(part)] > 1 and any(True for _ in part.children())
        found += inner or ([part] if repeated else [])
    return found


def compile_in_place(module: nn.Module, mode: str, *, fullgraph: bool = False) -> None:
    """Compile `module`'s forward at its first call. Its class, its parameters and their names stay what they are."""
    module.compile(mode=mode, fullgraph=fullgraph)
    compiled: Any = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except (TorchDynamoException, InductorError) as error:
            # Compilation fails before anything has run, so the same call can be made again.
            if fullgraph:
                text = (str(error).strip().splitlines() or [type(error).__name__])[0]
                reason = f"{type(module).__name__} is not compiled as one graph: {text}"
                raise ConfigError(Problem("loop.compile_fullgraph", True, reason, "loop.compile_fullgraph=false")) from error
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("torch.compile of %s failed, so it runs as it is: %s: %s", type(module).__name__, type(error).__name__, reason)
            module._compiled_call_impl = None
            return module(*args, **kwargs)

    module._compiled_call_impl = call
