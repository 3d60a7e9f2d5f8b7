"""`python -m trainer plot-lr <overrides>`: the learning rate and momentum of every optimizer step, before any is taken.

Composes and checks the run as launch.py does; builds no network and imports no torch.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import RunConfig, stage_runs
from trainer.launch.door import checked_run, override_arguments
from trainer.schedule import Schedule

if TYPE_CHECKING:
    import numpy as np

EPOCH_ROWS = 10  # the table shows at most about this many epochs, beside the turning points


def arguments() -> ArgumentParser:
    parser = override_arguments("plot-lr", "The learning rate and momentum of every optimizer step.")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/learning_rate.png"), help="the picture (default: outputs/learning_rate.png)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Print a table and draw a picture of a run's schedule. `--out FILE` says where to."""
    options = arguments().parse_intermixed_args(argv)
    run = checked_run(options.overrides, options.config_dir)
    parts = stretches(run)
    for part in parts:
        print(table(part.run, part.schedule, part.per_epoch, part) + ("\n" if part is not parts[-1] else ""))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(run, parts, options.out)
    print(options.out)
    return 0


@dataclass(frozen=True)
class Stretch:
    """A run, or a stage of one: optimizer steps [start, start + steps) of it, step `offset` of the schedule being the first."""

    run: RunConfig
    schedule: Schedule
    steps: int
    per_epoch: int
    title: str = ""
    start: int = 0
    offset: int = 0
    epochs_before: int = 0


def stretches(run: RunConfig) -> list[Stretch]:
    """The run's stages, or the run itself."""
    runs = stage_runs(run)
    if not run.loop.stages:
        total, per_epoch = length(run)
        return [Stretch(run, run.scheduler.build(total, per_epoch), total, per_epoch)]
    lengths = [length(part) for part in runs]
    total = sum(steps for steps, _ in lengths)
    whole = run.scheduler.build(total, total / run.loop.num_epochs) if run.loop.stage_schedule == "whole" else None
    found, start, epochs = [], 0, 0
    for i, (part, (steps, per_epoch)) in enumerate(zip(runs, lengths, strict=True), 1):
        schedule = whole or part.scheduler.build(steps, per_epoch)
        offset = start if whole else 0
        found.append(Stretch(part, schedule, steps, per_epoch, f"stage {i} of {len(runs)}", start, offset, epochs))
        start, epochs = start + steps, epochs + part.loop.num_epochs
    return found


def length(run: RunConfig) -> tuple[int, int]:
    """Optimizer steps of the run, and of an epoch."""
    from trainer.validation import steps_per_epoch

    images = run.dataset.facts().num_train
    if images is None:
        images = len(run.dataset.build("train"))
    per_epoch = steps_per_epoch(run, images)
    return run.loop.steps or run.loop.num_epochs * per_epoch, per_epoch


def momentum(run: RunConfig, schedule: Schedule, step: int) -> float | None:
    """Momentum (Adam: beta1) at a step: the schedule's, or what the optimizer keeps throughout, where it says."""
    moved = schedule.momentum(step)
    if moved is not None:
        return moved
    betas = getattr(run.optimizer, "betas", None)
    return betas[0] if betas else getattr(run.optimizer, "momentum", None)


def table(run: RunConfig, schedule: Schedule, steps_per_epoch: int, part: Stretch | None = None) -> str:
    """The turning points and some epochs between them."""
    part = part or Stretch(run, schedule, schedule.total_steps, steps_per_epoch)
    peak = run.optimizer.scaled_lr(run.loop.batch_size)
    scaled = "" if peak == run.optimizer.lr else f" ({run.optimizer.lr:g} scaled to batches of {run.loop.batch_size})"
    title = f"{part.title}, " if part.title else ""
    lines = [f"{title}{type(run.scheduler).__name__}: peak {peak:g}{scaled}, {part.steps} steps, {steps_per_epoch} an epoch", ""]
    lines.append(f"{'step':>9}  {'epoch':>8}  {'learning rate':>13}  {'momentum':>8}")
    for step, note in moments(schedule, steps_per_epoch, part.offset, part.steps):
        beta = momentum(run, schedule, step + part.offset)
        shown = f"{beta:8.4f}" if beta is not None else f"{'-':>8}"
        epoch = part.epochs_before + step / steps_per_epoch
        if step == 0 and part.title:
            note = note.replace("first step", f"first step of {part.title}")
        row = f"{step + part.start:9d}  {epoch:8.2f}  {peak * schedule.factor(step + part.offset):13.4e}  {shown}  {note}"
        lines.append(row.rstrip())
    if (
        run.optimizer.layer_decay is not None
        or run.optimizer.backbone_lr is not None
        or any(rule.lr_factor != 1 for rule in run.optimizer.rules)
    ):
        lines += ["", "layer decay, rules and a backbone's own rate: parameter groups have a fraction or multiple of this throughout"]
    return "\n".join(lines)


def moments(schedule: Schedule, steps_per_epoch: int, offset: int = 0, steps: int | None = None) -> Iterator[tuple[int, str]]:
    """The steps the table shows, each with what begins or ends there; of `steps` steps from the schedule's step `offset` on."""
    last = (schedule.total_steps if steps is None else steps) - 1
    factors = [schedule.factor(offset + step) for step in range(last + 1)]
    notes: dict[int, list[str]] = {0: ["first step"]}
    if 0 < schedule.warmup_steps - offset <= last:
        notes.setdefault(schedule.warmup_steps - offset, []).append("end of the warm-up")
    notes.setdefault(max(range(len(factors)), key=factors.__getitem__), []).append("peak")
    cooldown = schedule.total_steps - schedule.cooldown_steps - offset
    if schedule.cooldown_steps and 0 <= cooldown <= last:
        notes.setdefault(cooldown, []).append("cool-down begins")
    notes.setdefault(last, []).append("last step")
    epochs = -(-(last + 1) // steps_per_epoch)
    stride = -(-epochs // EPOCH_ROWS) * steps_per_epoch
    for step in sorted({*notes, *range(0, last + 1, stride)}):
        yield step, ", ".join(notes.get(step, []))


def draw(run: RunConfig, parts: Sequence[Stretch], path: Path) -> None:
    """Draw as the plots of a run are drawn, so that the two can be laid side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np

    from trainer.log.draw import STYLE, TRAIN, line, panels, save

    def over_all(value: Callable[[Stretch, int], float | None]) -> np.ndarray:
        return np.array([value(part, part.offset + step) for part in parts for step in range(part.steps)], dtype=np.float64)

    peaks = {part.start: part.run.optimizer.scaled_lr(part.run.loop.batch_size) for part in parts}
    curves = {"learning rate": over_all(lambda part, step: peaks[part.start] * part.schedule.factor(step))}
    if parts[0].schedule.momentum(0) is not None:
        curves["momentum"] = over_all(lambda part, step: part.schedule.momentum(step))
    steps = np.arange(len(curves["learning rate"]), dtype=np.float64)
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(curves), across=1)
        for axis, (name, values) in zip(axes, curves.items(), strict=True):
            line(axis, (steps, values), name, TRAIN)
            axis.set_title(name)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
            for part in parts[1:]:
                axis.axvline(part.start, color="#999999", linewidth=0.8, linestyle=":")
        axes[0].set_ylim(bottom=0.0)
        save(figure, path, 0.0 if len(parts) > 1 else float(parts[0].per_epoch))
