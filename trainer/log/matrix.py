"""A square table of numbers as a picture: who is taken for whom. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.files import partial_path
from trainer.log.draw import STYLE

WRITTEN = 30  # classes up to which every number and name is legible


def draw_matrix(path: Path, title: str, names: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    """Rows in shares of their sum, the numbers themselves written in where there is room."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib.figure import Figure

    table = np.asarray(values, dtype=np.float64).reshape(len(names), len(names))  # [C, C]
    shares = table / np.maximum(table.sum(1, keepdims=True), 1e-12)
    legible = len(names) <= WRITTEN
    side = 3.0 + 0.35 * len(names) if legible else 9.0
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(side, side), layout="constrained")
        axis = figure.add_subplot()
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.set(title=title, xlabel="predicted", ylabel="true")
        if legible:
            axis.set_xticks(range(len(names)), [n[:20] for n in names], rotation=90)
            axis.set_yticks(range(len(names)), [n[:20] for n in names])
            for y, x in np.argwhere(table != 0):
                axis.text(x, y, f"{table[y, x]:g}", ha="center", va="center", fontsize=8, color="white" if shares[y, x] > 0.5 else "black")
        partial = partial_path(path)
        figure.savefig(partial, format="png")
        partial.replace(path)
