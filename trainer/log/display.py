"""What a person sees while a run goes: a bar on a terminal, lines elsewhere, or nothing. train.log has the lines in any case.

It knows the engine's log points and how to word them; imports rich when it draws a bar, and no torch.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from trainer.config.loop import Progressing
from trainer.log.readable import duration, is_rate, show

if TYPE_CHECKING:
    from rich.table import Table

WORDS = 76  # columns of a terminal that the words around the bar take

lines = logging.getLogger("trainer.progress")  # for train.log; the terminal has its own way of showing it


class Display:
    """Shows nothing and keeps train.log: for loop.progress=none. On every rank but the main one it is `silent`, too."""

    def __init__(self, total: int, steps_per_epoch: float, *, silent: bool = False) -> None:
        self.total, self.steps_per_epoch, self.silent = total, steps_per_epoch, silent
        self.epochs = total / steps_per_epoch
        self.epochs_at: Callable[[int], float] = lambda step: step / steps_per_epoch
        self.pace = Pace()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def enter(self, stage: str, epochs: float, epochs_at: Callable[[int], float]) -> None:
        """A stage of the run begins: what it is (nothing where there is but one), and how its steps make up the run's `epochs`."""
        self.epochs, self.epochs_at = epochs, epochs_at
        if stage and not self.silent:
            self.say_score(stage)

    def advance(self, step: int) -> None:
        """At every step and validation batch, so it costs next to nothing."""
        if not self.pace.points:
            self.pace.note(step)

    def logged(self, step: int, epoch: float, scalars: Mapping[str, float]) -> None:
        if self.silent:
            return
        self.pace.note(step)
        parts = [f"step {step:>{len(str(self.total))}}/{self.total}", f"epoch {epoch:.1f}/{whole(self.epochs)}", *training_words(scalars)]
        left = self.pace.left(self.total)
        if step < self.total and math.isfinite(left):
            parts.append(f"{duration(left)} left")
        self.say("  ".join(parts))

    def validated(self, step: int, epoch: float, scores: Mapping[str, float], *, is_best: bool = False) -> None:
        if not self.silent:
            # What has a name of two levels, as one score per class, is for the table at the end.
            told = {name: value for name, value in scores.items() if name != "val/seconds" and name.count("/") < 2}
            words = [f"{name.removeprefix('val/')} {show(name, value)}" for name, value in told.items()]
            best = ["(best)"] if is_best else []
            self.say_score(
                "  ".join([f"epoch {whole(epoch):>{len(whole(self.epochs))}}/{whole(self.epochs)}", "validation", *words, *best])
            )
            if step >= self.total:
                self.close()

    def say(self, text: str) -> None:
        """A line about training."""
        lines.info(text)

    def say_score(self, text: str) -> None:
        """A line about a validation."""
        lines.info(text)

    def close(self) -> None:
        """Give the terminal back."""


class Lines(Display):
    """One line per log point and validation."""

    def say(self, text: str) -> None:
        super().say(text)
        print(text, flush=True)

    def say_score(self, text: str) -> None:
        self.say(text)


class Bar(Display):
    """A bar that moves, with a line above it for each validation."""

    def __init__(self, total: int, steps_per_epoch: float) -> None:
        super().__init__(total, steps_per_epoch)
        from rich.live import Live

        self.step = 0
        self.words: list[str] = []
        self.live: Live | None = None
        self.live = Live(get_renderable=self._draw, refresh_per_second=4, transient=True)
        self.live.start()
        restore_streams_in_children()

    def advance(self, step: int) -> None:
        super().advance(step)
        self.step = step  # drawn by rich's own thread, four times a second

    def logged(self, step: int, epoch: float, scalars: Mapping[str, float]) -> None:
        super().logged(step, epoch, scalars)
        self.words = [word for word in training_words(scalars) if not word.startswith("lr ")]

    def say_score(self, text: str) -> None:
        super().say_score(text)
        print(text)  # above the bar: rich has replaced stdout

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _draw(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = self.step
        epoch = min(math.floor(self.epochs_at(step)) + 1, math.ceil(self.epochs))
        left = self.pace.left(self.total, step)
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            Text(f"epoch {epoch}/{math.ceil(self.epochs)}", style="bold"),
            ProgressBar(self.total, step, width=max(8, min(40, (self.live.console.width if self.live else 80) - WORDS))),
            Text(f"{step}/{self.total}", style="green"),
            Text("  ".join(self.words), no_wrap=True, overflow="ellipsis"),
            Text(f"{duration(left)} left" if math.isfinite(left) else "", style="cyan"),
        )
        return grid


class Pace:
    """How fast the run goes, validation and saving included: over the last log points, so that a slow start is forgotten."""

    def __init__(self) -> None:
        self.points: deque[tuple[int, float]] = deque(maxlen=20)  # (step, seconds)

    def note(self, step: int) -> None:
        self.points.append((step, time.monotonic()))

    def left(self, total: int, step: int | None = None) -> float:
        """Seconds until step `total`, infinite where there is nothing to tell from."""
        if len(self.points) < 2:
            return math.inf
        (first, began), (last, ended) = self.points[0], self.points[-1]
        if last <= first:
            return math.inf
        return (total - (last if step is None else step)) * (ended - began) / (last - first)


def training_words(scalars: Mapping[str, float]) -> list[str]:
    """What matters at a glance of a log point: the loss, rates, speed, memory, learning rate."""
    words = [f"loss {show('train/loss', scalars['train/loss'])}"] if "train/loss" in scalars else []
    words += [
        f"{name.removeprefix('train/')} {show(name, value)}"
        for name, value in scalars.items()
        if name.startswith("train/") and is_rate(name)
    ]
    if "system/images_per_second" in scalars:
        words.append(f"{scalars['system/images_per_second']:,.0f} images/s")
    if "system/gpu_memory_gb" in scalars:
        words.append(f"{scalars['system/gpu_memory_gb']:.1f} GB")
    if "train/lr" in scalars:
        words.append(f"lr {scalars['train/lr']:.2e}")
    return words


def whole(epochs: float) -> str:
    """3, 2.5: epochs without a fraction that is none."""
    return f"{epochs:.0f}" if abs(epochs - round(epochs)) < 0.005 else f"{epochs:.1f}"


def open_display(progress: Progressing, is_main: bool, total: int, steps_per_epoch: float) -> Display:
    """The display that loop.progress asks for; auto is a bar where a person sits before a terminal."""
    if not is_main or progress is Progressing.none:
        return Display(total, steps_per_epoch, silent=not is_main)
    if progress is Progressing.bar or (progress is Progressing.auto and is_terminal()):
        return Bar(total, steps_per_epoch)
    return Lines(total, steps_per_epoch)


def is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def restore_streams_in_children() -> None:
    """A worker forked while rich draws must not print through it: the lock it takes may be held by a thread that the
    child does not have."""
    global _restores
    if not _restores:
        _restores = True
        os.register_at_fork(after_in_child=_restore_streams)


def _restore_streams() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, getattr(stream, "rich_proxied_file", stream))


_restores = False
