"""A trainer for vision: one engine, typed configs, runs that can be stopped anywhere and go on exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.inference import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: `import trainer` alone imports no torch."""
    if name == "load_model":
        from trainer.inference import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
