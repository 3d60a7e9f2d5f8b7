"""`torch.compile` as an offer: where it fails, the run goes on without it, after one warning."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

logger = logging.getLogger(__name__)


def compile_in_place(module: nn.Module, mode: str) -> None:
    """Compile `module`'s forward at its first call. Its class, its parameters and their names stay what they are."""
    module.compile(mode=mode)
    compiled: Any = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except (TorchDynamoException, InductorError) as error:
            # Compilation fails before anything has run, so the same call can be made again.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("torch.compile of %s failed, so it runs as it is: %s: %s", type(module).__name__, type(error).__name__, reason)
            module._compiled_call_impl = None
            return module(*args, **kwargs)

    module._compiled_call_impl = call
