"""How a run went besides its numbers: its speed, its stages, its hours. `draw` saves what is drawn here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainer.log.draw import SECONDS, TRAIN, Curve, line, logarithmic_if_wide, pair, panels
from trainer.log.readable import is_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def speed(curves: Mapping[str, Curve]) -> Figure | None:
    """Images a second, and the GPU's memory where there is one."""
    names = {"system/images_per_second": "images per second", "system/gpu_memory_gb": "GPU memory, GB"}
    names = {name: title for name, title in names.items() if name in curves}
    if not names:
        return None
    figure, axes = panels(len(names), across=1)
    for axis, (name, title) in zip(axes, names.items()):
        line(axis, curves[name], title, TRAIN)
        axis.set_title(title)
        axis.set_ylim(bottom=0.0)
    return figure


def stages(curves: Mapping[str, Curve]) -> Figure | None:
    """What changes from stage to stage."""
    if not _edges(curves):
        return None
    figure, axes = panels(2, across=1)
    for axis, name in zip(axes, ("image_size", "batch_size")):
        steps, values = curves[f"train/{name}"]
        axis.step(steps, values, where="pre", color=TRAIN)
        axis.set_title(name.replace("_", " "))
        axis.set_ylim(bottom=0.0)
    return figure


def over_time(curves: Mapping[str, Curve]) -> Figure | None:
    """The loss, and the first rate there is, against the minutes since the run began."""
    import numpy as np

    if SECONDS not in curves or "train/loss" not in curves:
        return None
    at, seconds = curves[SECONDS]
    minutes = {
        name: (np.interp(steps, at, seconds) / 60, values)
        for name, (steps, values) in curves.items()
        if name.startswith(("train/", "val/"))
    }
    rate = next((name.removeprefix("val/") for name in curves if name.startswith("val/") and is_rate(name)), None)
    shown = ["loss", *([rate] if rate else [])]
    figure, axes = panels(len(shown), across=1)
    for axis, name in zip(axes, shown):
        pair(axis, minutes, name)
        axis.set_title(name.replace("_", " "))
        axis.legend()
    logarithmic_if_wide(axes[0])
    return figure


def _edges(curves: Mapping[str, Curve]) -> list[float]:
    """The steps at which a stage of the run ends and another begins."""
    if "train/stage" not in curves:
        return []
    steps, numbers = curves["train/stage"]
    return [float(before) for before, a, b in zip(steps, numbers, numbers[1:]) if a != b]


def mark_stages(figure: Figure, curves: Mapping[str, Curve]) -> None:
    for axis in figure.axes:
        for edge in _edges(curves):
            axis.axvline(edge, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
