"""`python -m trainer knn RUN_DIR [overrides] [checkpoint=best]`: a run's features judged by nearest neighbours (arXiv:1805.01978).

Decides what is to be asked and where the answer lies; the asking is in trainer.knn. Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config import RunConfig
from trainer.errors import ConfigError, Problem
from trainer.identity import identity
from trainer.launch.amend import amended, trained_run, words
from trainer.launch.evaluate import FIXED
from trainer.surroundings import ranks_to_start, surroundings

NEIGHBOURS = (10, 20, 100, 200)  # as DINO reports them (arXiv:2104.14294, app. F)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer knn",
        description="How often the nearest training images of a validation image agree with it in class, by a run's features; nothing is trained.",
        epilog="words: checkpoint=best|last|epoch-0010|FILE; another dataset needs no classes in common with the run's",
    )
    parser.add_argument("run_dir", help="runs/<name>/<version>-<hash>")
    parser.add_argument("overrides", nargs="*", help="group=choice and key=value, as for launch.py")
    parser.add_argument("--neighbours", type=int, nargs="+", default=list(NEIGHBOURS), help="how many vote (default: 10 20 100 200)")
    parser.add_argument("--temperature", type=float, default=0.07, help="votes weigh exp(cosine / temperature) (default: 0.07)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Ask, print, and write `RUN_DIR/evaluations/knn-<name>/scores.json`."""
    options = arguments().parse_intermixed_args(argv)
    for key, values in (("--neighbours", options.neighbours), ("--temperature", [options.temperature])):
        if min(values) <= 0:
            raise ConfigError(Problem(key, min(values), "must be > 0", f"{key} {20 if key == '--neighbours' else 0.07}"))
    directory, before = trained_run(options.run_dir)
    own, overrides = words(options.overrides, checkpoint="best")
    run = checked(before, overrides)
    same = "" if identity(run) == identity(before) else f"-{identity(run)}"  # other data, another size: an answer of its own
    out = directory.path / "evaluations" / f"knn-{Path(own['checkpoint']).stem}{same}"
    count = ranks_to_start(run.distributed)
    if count > 1 and surroundings().size == 1:
        from trainer.launch.local import start_local_ranks

        out.mkdir(parents=True, exist_ok=True)
        return start_local_ranks(out, count, 0, command=[sys.executable, "-m", "trainer", "knn", *argv])
    from trainer.knn import knn

    answer = knn(run, directory, own["checkpoint"], options.neighbours, options.temperature, out)
    if surroundings().is_main:
        from trainer.log.table import print_rows

        print(f"{answer['num_samples']:,} images asked about, {answer['num_known']:,} known")
        print_rows([{"neighbours": k, "top1": f"{100 * answer[f'val/knn_top1_of_{k}']:.2f} %"} for k in options.neighbours])
        print(out / "scores.json")
    return 0


def checked(before: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run as it is to be asked. Raises ConfigError with everything that is wrong with that."""
    from trainer.launch import diagnose
    from trainer.validation import problems_of

    run, _, problems = amended(before, overrides, fixed=FIXED)
    if run is None or problems:
        raise ConfigError(*problems)
    found = [diagnose.with_fix(p, {}) for p in problems_of(run, trains=False)]
    if "label" not in run.dataset.offers:
        reason = "its images have no labels that neighbours could agree in"
        found.append(Problem("dataset", type(run.dataset).__name__, reason, "dataset=image_folder dataset.path=/path/to/labelled/images"))
    if found:
        raise ConfigError(*found)
    return run
