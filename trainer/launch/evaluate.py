"""`python -m trainer evaluate RUN_DIR [overrides] [checkpoint=best]`: a trained network on any data, as validation measures it.

Decides what is to be measured and where the answer lies; the measuring is in trainer.evaluate. Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer.config import RunConfig
from trainer.errors import ConfigError, Problem
from trainer.identity import identity
from trainer.launch.amend import amended, trained_run, words
from trainer.surroundings import ranks_to_start, surroundings

OTHER_WEIGHTS = "the weights are those of the run's own"
FIXED = {"task": OTHER_WEIGHTS, "model": OTHER_WEIGHTS, "model.*": OTHER_WEIGHTS, "seed": OTHER_WEIGHTS}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer evaluate",
        description="Measure a run's network as validation does: on other data, at another size, with the task's own settings.",
        epilog="words: checkpoint=best|last|epoch-0010|FILE  split=val|train  classes=a,b|FILE (only these compete)  real_labels=FILE.json",
    )
    parser.add_argument("run_dir", help="runs/<name>/<version>-<hash>")
    parser.add_argument("overrides", nargs="*", help="group=choice and key=value, as for launch.py")
    parser.add_argument("--name", help="folder in RUN_DIR/evaluations (default: the checkpoint's name, and a hash of what differs)")
    parser.add_argument("--config-dir", help="a folder of your own YAML, laid out like conf/")
    return parser


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write `RUN_DIR/evaluations/<name>/`."""
    options = arguments().parse_intermixed_args(argv)
    directory, before = trained_run(options.run_dir)
    own, overrides = words(options.overrides, checkpoint="best", split="val", classes="", real_labels="")
    if own["split"] not in ("train", "val"):
        raise ConfigError(Problem("split", own["split"], "is train or val", "split=val"))
    run = checked(before, overrides, options.config_dir, own["split"])
    name = options.name or default_name(before, run, own)
    out = directory.path / "evaluations" / name
    count = ranks_to_start(run.distributed)
    if count > 1 and surroundings().size == 1:
        from trainer.launch.local import start_local_ranks

        out.mkdir(parents=True, exist_ok=True)
        return start_local_ranks(out, count, 0, command=[sys.executable, "-m", "trainer", "evaluate", *argv])
    from trainer.evaluate import Question, evaluate

    evaluate(run, directory, Question(**own, overrides=[*options.overrides]), out)
    return 0


def checked(before: RunConfig, overrides: Sequence[str], config_dir: str | None = None, split: str = "val") -> RunConfig:
    """The run as it is to be measured, on one split. Raises ConfigError with everything that is wrong with it, but nothing of training."""
    from trainer.launch import diagnose
    from trainer.validation import problems_of

    run, given, problems = amended(before, overrides, fixed=FIXED, config_dir=config_dir)
    if run is None or problems:
        raise ConfigError(*problems)
    if "loop.max_validation_batches" not in given:
        run.loop.max_validation_batches = None  # a limit that saved time in training
    run.dataset = run.dataset.alone(split)
    found = [diagnose.with_fix(p, {}) for p in problems_of(run, trains=False)]
    if found:
        raise ConfigError(*found)
    return run


def default_name(before: RunConfig, run: RunConfig, own: dict[str, str]) -> str:
    """`best` where nothing differs from the run's own validation; a hash of what does, behind it, where something does."""
    import hashlib

    checkpoint = Path(own["checkpoint"]).stem
    asked = [identity(run), *(f"{key}={value}" for key, value in sorted(own.items()) if key != "checkpoint")]
    plain = replace(before, loop=replace(before.loop, max_validation_batches=None), dataset=before.dataset.alone("val"))
    usual = [identity(plain), "classes=", "real_labels=", "split=val"]
    return checkpoint if asked == usual else f"{checkpoint}-{hashlib.sha256('|'.join(asked).encode()).hexdigest()[:8]}"
