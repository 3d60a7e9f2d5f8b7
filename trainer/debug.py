"""Instruments for finding out what goes wrong or slow: a profiler trace, anomaly detection, gradient norms."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from trainer.config import DebugConfig

logger = logging.getLogger(__name__)

WARM_UP, RECORDED = 3, 10  # optimizer steps: the first ones allocate and compile, and would drown the rest


@contextmanager
def instruments(cfg: DebugConfig, directory: Path, *, is_main: bool) -> Iterator[Callable[[], None]]:
    """Switch on what `cfg` asks for. Yields what to call after every optimizer step."""
    with torch.autograd.set_detect_anomaly(cfg.anomaly):
        if not (cfg.profile and is_main):
            yield _nothing
            return
        with _profiler(directory) as tick:
            yield tick


def _nothing() -> None:
    pass


@contextmanager
def _profiler(directory: Path) -> Iterator[Callable[[], None]]:
    cuda = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]

    def finished(profile: torch.profiler.profile) -> None:
        path = directory / "profile.json"
        profile.export_chrome_trace(str(path))
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50))
        print(f"trace of {RECORDED} steps: {path} (open it in https://ui.perfetto.dev)")

    schedule = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=RECORDED, repeat=1)
    with torch.profiler.profile(activities=kinds, schedule=schedule, on_trace_ready=finished, record_shapes=True) as profile:
        yield profile.step


def gradient_norms(module: nn.Module) -> dict[str, float]:
    """The L2 norm of every parameter's gradient, by name, before the update drops them."""
    return {f"train/grad_norm/{name}": p.grad.norm().item() for name, p in module.named_parameters() if p.grad is not None}
