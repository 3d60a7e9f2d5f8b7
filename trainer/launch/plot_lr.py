"""`python -m trainer plot-lr <overrides>`: the learning rate and momentum of every optimizer step, before any is taken.

Composes and checks the run as launch.py does; builds no network and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.config import RunConfig
from trainer.launch.door import checked_run
from trainer.schedule import Schedule

EPOCH_ROWS = 10  # the table shows at most about this many epochs, beside the turning points


def main(argv: Sequence[str]) -> int:
    """Print a table and draw a picture of a run's schedule. `--out FILE` says where to."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m trainer plot-lr", description="The learning rate and momentum of every optimizer step."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/learning_rate.png"), help="the picture (default: outputs/learning_rate.png)"
    )
    options, overrides = parser.parse_known_args(argv)
    run = checked_run(overrides)
    total, steps_per_epoch = length(run)
    schedule = run.scheduler.build(total, steps_per_epoch)
    print(table(run, schedule, steps_per_epoch))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(run, schedule, steps_per_epoch, options.out)
    print(options.out)
    return 0


def length(run: RunConfig) -> tuple[int, int]:
    """Optimizer steps of the run, and of an epoch."""
    from trainer.validation import steps_per_epoch

    images = run.dataset.facts().num_train
    if images is None:
        images = len(run.dataset.build("train"))
    per_epoch = steps_per_epoch(run, images)
    return run.loop.steps or (run.loop.epochs or run.loop.default_epochs) * per_epoch, per_epoch


def momentum(run: RunConfig, schedule: Schedule, step: int) -> float | None:
    """Momentum (Adam: beta1) at a step: the schedule's, or what the optimizer keeps throughout, where it says."""
    moved = schedule.momentum(step)
    if moved is not None:
        return moved
    betas = getattr(run.optimizer, "betas", None)
    return betas[0] if betas else getattr(run.optimizer, "momentum", None)


def table(run: RunConfig, schedule: Schedule, steps_per_epoch: int) -> str:
    """The turning points and some epochs between them."""
    peak = run.optimizer.scaled_lr(run.loop.batch_size)
    scaled = "" if peak == run.optimizer.lr else f" ({run.optimizer.lr:g} scaled to batches of {run.loop.batch_size})"
    lines = [f"{type(run.scheduler).__name__}: peak {peak:g}{scaled}, {schedule.total_steps} steps, {steps_per_epoch} an epoch", ""]
    lines.append(f"{'step':>9}  {'epoch':>8}  {'learning rate':>13}  {'momentum':>8}")
    for step, note in moments(schedule, steps_per_epoch):
        beta = momentum(run, schedule, step)
        shown = f"{beta:8.4f}" if beta is not None else f"{'-':>8}"
        row = f"{step:9d}  {step / steps_per_epoch:8.2f}  {peak * schedule.factor(step):13.4e}  {shown}  {note}"
        lines.append(row.rstrip())
    if run.optimizer.layer_decay is not None or any(rule.lr_factor != 1 for rule in run.optimizer.rules):
        lines += ["", "layer decay and rules multiply this: every parameter group has a fraction or multiple of it throughout"]
    return "\n".join(lines)


def moments(schedule: Schedule, steps_per_epoch: int) -> Iterator[tuple[int, str]]:
    """The steps the table shows, each with what begins or ends there."""
    last = schedule.total_steps - 1
    factors = [schedule.factor(step) for step in range(schedule.total_steps)]
    notes: dict[int, list[str]] = {0: ["first step"]}
    if 0 < schedule.warmup_steps <= last:
        notes.setdefault(schedule.warmup_steps, []).append("end of the warm-up")
    notes.setdefault(max(range(len(factors)), key=factors.__getitem__), []).append("peak")
    if schedule.cooldown_steps:
        notes.setdefault(last + 1 - schedule.cooldown_steps, []).append("cool-down begins")
    notes.setdefault(last, []).append("last step")
    epochs = -(-schedule.total_steps // steps_per_epoch)
    stride = -(-epochs // EPOCH_ROWS) * steps_per_epoch
    for step in sorted({*notes, *range(0, schedule.total_steps, stride)}):
        yield step, ", ".join(notes.get(step, []))


def draw(run: RunConfig, schedule: Schedule, steps_per_epoch: int, path: Path) -> None:
    """Draw as the plots of a run are drawn, so that the two can be laid side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np

    from trainer.log.draw import STYLE, TRAIN, line, panels, save

    peak = run.optimizer.scaled_lr(run.loop.batch_size)
    steps = np.arange(schedule.total_steps, dtype=np.float64)
    curves = {"learning rate": np.array([peak * schedule.factor(step) for step in range(schedule.total_steps)])}
    if schedule.momentum(0) is not None:
        curves["momentum"] = np.array([schedule.momentum(step) for step in range(schedule.total_steps)], dtype=np.float64)
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(curves), across=1)
        for axis, (name, values) in zip(axes, curves.items(), strict=True):
            line(axis, (steps, values), name, TRAIN)
            axis.set_title(name)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes[0].set_ylim(bottom=0.0)
        save(figure, path, float(steps_per_epoch))
