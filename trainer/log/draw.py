"""Draws a run's curves from its record: `python -m trainer.log.draw RUN_DIR`.

A program of its own, started beside the run now and then: matplotlib would hold Python's lock for half a second at a time,
which a step of 200 microseconds feels. Imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import partial_path
from trainer.log.readable import is_rate, show
from trainer.log.record import read_rows

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALIDATION, OTHERS = "#4878a8", "#d1693a", ("#5a9a68", "#8a6bb1", "#a8813e", "#4aa3a8", "#b0567f", "#7a7a7a")
POINTS = 600  # a line has at most this many; more become means over equal stretches, with their range behind
STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}

SECONDS = "time/seconds"  # since the run began, at each step of the record

Curve = tuple["np.ndarray", "np.ndarray"]  # steps [N] and values [N], float64


def draw(directory: Path) -> list[Path]:
    """Draw what the record of the run in `directory` holds. Returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from trainer.log.course import mark_stages, over_time, speed, stages

    curves, steps_per_epoch = read_curves(directory / "metrics.jsonl")
    figures = {
        "loss": lambda: losses(curves),
        "metrics": lambda: metrics(curves),
        "learning_rate": lambda: setting(curves, "train/lr", "learning rate"),
        "momentum": lambda: setting(curves, "train/momentum", "momentum"),
        "speed": lambda: speed(curves),
        "stages": lambda: stages(curves),
    }
    written = []
    (directory / "plots").mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, make in figures.items():
            figure = make()
            if figure is not None:
                mark_stages(figure, curves)
                written.append(save(figure, directory / "plots" / f"{name}.png", steps_per_epoch))
        figure = over_time(curves)
        if figure is not None:
            written.append(save(figure, directory / "plots" / "time.png", 0.0, across="minutes"))
    return written


def read_curves(record: Path) -> tuple[dict[str, Curve], float]:
    """Every number of the record against its step, and how many steps an epoch has (0 = not known)."""
    import numpy as np

    points: dict[str, list[tuple[float, float]]] = {}
    steps_per_epoch = 0.0
    for row in read_rows(record):
        step = row["step"]
        steps_per_epoch = step / row["epoch"] if row.get("epoch") else steps_per_epoch
        if "seconds" in row:
            points.setdefault(SECONDS, []).append((step, row["seconds"]))
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float):
                points.setdefault(name, []).append((step, value))
    columns = {name: np.asarray(pairs, dtype=np.float64).T for name, pairs in points.items()}  # [2, N]
    if "train/stage" in columns and len(np.unique(columns["train/stage"][1])) > 1:
        steps_per_epoch = 0.0  # epochs of different lengths have no scale
    return {name: (table[0], table[1]) for name, table in columns.items()}, steps_per_epoch


def losses(curves: Mapping[str, Curve]) -> Figure | None:
    """The total, in training and validation; below it the terms it is made of, where there are several."""
    if "train/loss" not in curves and "val/loss" not in curves:
        return None
    terms = [name for name in curves if name.startswith("train/loss_")]
    figure, axes = panels(2 if terms else 1, across=1)
    pair(axes[0], curves, "loss")
    axes[0].set_title("loss")
    if terms:
        for color, name in zip(OTHERS * len(terms), terms):
            line(axes[1], curves[name], name.removeprefix("train/loss_").replace("_", " "), color)
        axes[1].set_title("terms of the training loss")
    for axis in axes:
        logarithmic_if_wide(axis)
        axis.legend()
    return figure


def metrics(curves: Mapping[str, Curve]) -> Figure | None:
    """A panel for each validation metric but the loss, with the same metric in training where there is one."""
    names = [name.removeprefix("val/") for name in curves if name.startswith("val/") and name not in ("val/loss", "val/seconds")]
    if not names:
        return None
    figure, axes = panels(len(names), across=min(2, len(names)))
    for axis, name in zip(axes, names):
        pair(axis, curves, name)
        axis.set_title(name.replace("_", " "))
        mark_best(axis, curves[f"val/{name}"], name)
        if is_rate(name):
            axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %" if value < 1.001 else "")
            axis.set_ylim(top=min(axis.get_ylim()[1], 1.02))
        axis.legend()
    return figure


def setting(curves: Mapping[str, Curve], prefix: str, title: str) -> Figure | None:
    """What the schedule sets, one line a parameter group where they differ."""
    names = [name for name in curves if name == prefix or name.startswith(prefix + "_")]
    if not names:
        return None
    figure, (axis,) = panels(1, across=1)
    for color, name in zip((TRAIN, *OTHERS) * len(names), names):
        line(axis, curves[name], "0" if name == prefix else name.removeprefix(prefix + "_"), color)
    axis.set_title(title)
    if len(names) > 1:
        axis.legend(title="parameter group", ncols=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]) if prefix == "train/lr" else None)
    return figure


def panels(count: int, across: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    down = -(-count // across)
    figure = Figure(figsize=(7.5 if across == 1 else 5.2 * across, 0.4 + 3.5 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    flat = [axis for row in grid for axis in row]
    for axis in flat[count:]:
        axis.remove()
    return figure, flat[:count]


def pair(axis: Axes, curves: Mapping[str, Curve], name: str) -> None:
    """One metric in training and in validation."""
    if f"train/{name}" in curves:
        line(axis, curves[f"train/{name}"], "training", TRAIN)
    if f"val/{name}" in curves:
        line(axis, curves[f"val/{name}"], "validation", VALIDATION, marked=True)


def line(axis: Axes, curve: Curve, label: str, color: str, marked: bool = False) -> None:
    import numpy as np

    steps, values = curve
    if len(steps) > POINTS:
        stretches = [part for part in np.array_split(np.arange(len(steps)), POINTS) if np.isfinite(values[part]).any()]
        low, high = (np.array([f(values[part]) for part in stretches]) for f in (np.nanmin, np.nanmax))
        values = np.array([np.nanmean(values[part]) for part in stretches])
        steps = np.array([steps[part].mean() for part in stretches])
        axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    dots = "o" if len(steps) <= 30 and (marked or len(steps) < 3) else None
    axis.plot(steps, values, color=color, label=label, marker=dots, markersize=3.5)


def mark_best(axis: Axes, curve: Curve, name: str) -> None:
    """The highest value of a rate, with its number; of other metrics the record does not say which way is better."""
    import numpy as np

    steps, values = curve
    if not is_rate(name) or not np.isfinite(values).any():
        return
    best = int(np.nanargmax(values))
    axis.plot(
        steps[best],
        values[best],
        "o",
        color=VALIDATION,
        markersize=7,
        markerfacecolor="white",
        markeredgewidth=1.8,
        label=f"best {show(name, values[best])}",
    )


def logarithmic_if_wide(axis: Axes) -> None:
    """A loss that falls by more than a factor of 50 is a line along the floor on a linear axis."""
    import numpy as np

    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.get_lines()])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() / values.min() > 50:
        axis.set_yscale("log")


def save(figure: Figure, path: Path, steps_per_epoch: float, across: str = "optimizer steps") -> Path:
    """Write `path` in one step, so that a viewer never sees half a picture."""
    from matplotlib.ticker import MaxNLocator

    last = max(axis.get_xlim()[1] for axis in figure.axes)
    whole = across == "optimizer steps"
    for axis in list(figure.axes):
        axis.set_xlim(0, last)
        axis.set_xlabel(across)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=whole))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if whole else f"{value:,.4g}")
        if steps_per_epoch > 0:
            add_epochs(axis, steps_per_epoch)
    partial = partial_path(path)
    figure.savefig(partial, format="png")
    os.replace(partial, path)
    return path


def add_epochs(axis: Axes, steps_per_epoch: float) -> None:
    """A second scale along the top."""
    from matplotlib.ticker import MaxNLocator

    top = axis.twiny()
    top.set_xlim(*(edge / steps_per_epoch for edge in axis.get_xlim()))
    top.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    top.set_xlabel("epochs", fontsize=8, loc="right")
    top.tick_params(labelsize=8, length=0)
    top.grid(False)
    top.spines["top"].set_visible(False)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "metrics.jsonl").is_file():
        print("usage: python -m trainer.log.draw RUN_DIR    (a directory with a metrics.jsonl)", file=sys.stderr)
        return 2
    os.nice(10)  # the run comes first
    for path in draw(Path(arguments[0])):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
