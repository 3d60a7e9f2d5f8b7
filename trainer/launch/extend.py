"""`python -m trainer extend RUN_DIR loop.epochs=40`: a run that is done goes on, in its own directory, from its last checkpoint.

Imports no torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from trainer.config import Resume, RunConfig, stage_runs
from trainer.errors import ConfigError, Problem
from trainer.identity import differences
from trainer.launch import diagnose
from trainer.launch.amend import amended, existing_run
from trainer.launch.dispatch import report_finished, run_in
from trainer.surroundings import surroundings
from trainer.validation import problems_of, steps_per_epoch

CHANGEABLE = (
    "loop.epochs", "loop.steps", "loop.default_epochs", "loop.max_grad_norm", "loop.clip_mode", "loop.max_bad_steps", "loop.validate_*",
    "loop.best_*", "loop.max_validation_batches", "loop.max_reference_images", "scheduler", "scheduler.*", "augmentation", "augmentation.*",
    "optimizer.lr", "optimizer.lr_scaling", "optimizer.base_batch_size",
)  # fmt: skip
"""What may differ after the extension, of the settings that change a result. The rest is what the checkpoint is made of."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer extend", description="Let a run that is done go on, in its own directory.")
    parser.add_argument("run_dir", help="runs/<name>/<version>-<hash>")
    parser.add_argument(
        "overrides",
        nargs="+",
        help="loop.epochs=N or loop.steps=N, the new length in all, or loop.stages=[those it has, more]; also scheduler=…, optimizer.lr=…",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Write down the new length and train on."""
    options = arguments().parse_intermixed_args(argv)
    directory, before = existing_run(options.run_dir)
    if not directory.has_checkpoint():
        raise ConfigError(
            Problem("run directory", directory.path, "holds no checkpoint, so there is nothing to extend", "python launch.py …")
        )
    run, _, problems = amended(
        before, options.overrides, fixed=dict.fromkeys(("name", "version", "runs_dir", "resume"), "the run stays where it is")
    )
    problems += [] if run is None else [*(diagnose.with_fix(p, {}) for p in problems_of(run)), *refused(before, run)]
    if run is None or problems:
        raise ConfigError(*problems)
    total, done = total_steps(run), int(directory.read_status().get("step") or 0)
    if directory.is_finished() and differences(before, run) == []:
        report_finished(directory, run)
        return 0
    if total is not None and total <= done:
        key = "loop.steps" if run.loop.steps else "loop.epochs"
        value = run.loop.steps or run.loop.epochs or run.loop.default_epochs
        longer = 2 * round(value * max(1.0, done / total))
        raise ConfigError(Problem(key, value, f"the run has {done} steps behind it already, and this is {total} in all", f"{key}={longer}"))
    run.resume = Resume.auto
    directory.refuse_second_writer()
    if surroundings().is_main and differences(before, run):
        directory.record_extension(at_step=done, total_steps=total, overrides=list(options.overrides), time=time.time())
        directory.write_config(run)
        directory.status("queued", total_steps=total)  # not finished any more, whoever asks
        print(f"from step {done} to {total or 'the new end'}: the schedule is from here on that of a run of this length")
    return run_in(run, directory)


def refused(before: RunConfig, run: RunConfig) -> Iterator[Problem]:
    """Settings that an extension cannot change, because the checkpoint's state would not fit, or mean something else."""
    for key, old, new in differences(before, run):
        if key == "loop.stages":
            if not old or new[: len(old)] != old:
                reason = "the stages that an extended run has come first, as they are; others may follow"
                fix = "loop.stages=[<those of its config.yaml>, {epochs: ...}]" if old else f"loop.epochs={2 * before.loop.num_epochs}"
                yield Problem(key, f"{len(new)} stages", reason if old else "this run has none: its length may change", fix)
        elif not any(fnmatchcase(key, pattern) for pattern in CHANGEABLE):
            fix = f"leave it at {old}; init_from=<this run> starts another run from its weights"
            yield Problem(
                key, new, "an extended run stays the run it is; its length, schedule, augmentation and learning rate may change", fix
            )


def total_steps(run: RunConfig) -> int | None:
    """The length of the run in optimizer steps; None where nobody knows yet how many images there are."""
    if run.loop.steps:
        return run.loop.steps
    num_train = run.dataset.facts().num_train
    return None if num_train is None else sum(stage.loop.num_epochs * steps_per_epoch(stage, num_train) for stage in stage_runs(run))
