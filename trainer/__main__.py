"""`python -m trainer <verb> ...`: what can be done with runs, sweeps and data besides training.

A table of verbs; each is a function of its arguments in a module that is imported when it is called.
"""

from __future__ import annotations

import sys
from importlib import import_module

import tasks  # noqa: F401  (importing registers the tasks' schemas)
from trainer.config.names import nearest
from trainer.errors import ConfigError, Problem
from trainer.launch.guard import guarded

VERBS = {  # verb -> (module:function, what it does)
    "start": ("trainer.launch.dispatch:start", "RUN_DIR: run what its config.yaml says, as one rank of it"),
    "validate": ("trainer.launch.check:main", "OVERRIDES: everything that is wrong with a run, without starting it"),
    "plan": ("trainer.launch.plan:main", "OVERRIDES: a sweep without starting it: its jobs, GPU hours and disk"),
    "resume": ("trainer.sweep.verbs:resume", "DIR [JOB ...]: start what is left of a sweep, or go on with a run"),
    "retry": ("trainer.sweep.verbs:retry", "SWEEP [JOB ...]: start again what failed, as the cause allows"),
    "cancel": ("trainer.sweep.verbs:cancel", "DIR [JOB ...]: stop queued and running jobs of a sweep, or a run"),
    "status": (
        "trainer.sweep.status:main",
        "PATH ...: how the jobs of a sweep are doing, live: state, step, time left, metric, why it failed",
    ),
    "report": ("trainer.sweep.report:main", "PATH ...: the table over seeds of a sweep or of any runs: report.{md,csv,tex,json,html}"),
    "diff": ("trainer.sweep.diff:main", "A B: what differs between two runs or two sweeps: configuration, code, environment, results"),
    "reproduce": (
        "trainer.sweep.reproduce:main",
        "RUN_DIR: the same run again from its own config.yaml, and how far its metrics are from the first",
    ),
    "dashboard": (
        "trainer.sweep.dashboard:main",
        "SWEEP: a saved report in W&B: curves with bands over seeds, parallel coordinates, the table",
    ),
    "sync": ("trainer.sweep.sync:main", "[PATH ...]: upload to W&B what it could not be told while the runs went"),
    "evaluate": (
        "trainer.launch.evaluate:main",
        "RUN_DIR [OVERRIDES] [checkpoint=best]: a run's network measured as in validation, on these or other data",
    ),
    "knn": ("trainer.launch.knn:main", "RUN_DIR [OVERRIDES] [checkpoint=best]: a run's features judged by nearest neighbours"),
    "predict": (
        "trainer.launch.predict:main",
        "RUN_DIR FOLDER [checkpoint=best]: what a run's network finds in images, as a table and a contact sheet",
    ),
    "export": (
        "trainer.launch.export:main",
        "RUN_DIR --format onnx: a run's network as a file for other programs, checked on real images, with a model card",
    ),
    "extend": ("trainer.launch.extend:main", "RUN_DIR loop.epochs=N: let a run that is done go on, in its own directory"),
    "clean": ("trainer.launch.clean:main", "DIR [--dry-run]: delete the numbered checkpoints of runs that are done"),
    "shards": ("trainer.data.shards.verbs:shards", "index DIR | pack SRC DST: look through shards, or make them"),
    "split": ("trainer.data.shards.verbs:split", "DIR --val 0.1 --seed 0: divide a folder of classes into train/ and val/"),
    "plot-lr": (
        "trainer.launch.plot_lr:main",
        "OVERRIDES [--out FILE]: learning rate and momentum of every step, as a table and a picture",
    ),
    "find-lr": ("trainer.launch.find_lr:main", "OVERRIDES [--out DIR]: sweep the learning rate and suggest one, without starting the run"),
    "show-batch": ("trainer.launch.show_batch:main", "OVERRIDES [--out FILE]: a contact sheet of what the network will see"),
    "bench-loader": ("trainer.launch.bench_loader:main", "OVERRIDES: images per second over workers x prefetch, and which to use"),
    "describe-data": ("trainer.launch.describe:main", "OVERRIDES: counts, sizes, colours, duplicates and bad files of a dataset"),
}


def main(argv: list[str]) -> int:
    """The exit code of the verb that `argv` begins with."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print("python -m trainer <verb> ...\n")
        print("\n".join(f"  {verb:{width}}  {meaning}" for verb, (_, meaning) in VERBS.items()))
        return 0
    return guarded(lambda: _call(argv[0], argv[1:]))


def _call(verb: str, arguments: list[str]) -> int | None:
    if verb not in VERBS:
        close = nearest(verb, VERBS)
        raise ConfigError(
            Problem("verb", verb, f"there are {', '.join(VERBS)}", f"python -m trainer {close}" if close else "python -m trainer")
        )
    module, function = VERBS[verb][0].split(":")
    return getattr(import_module(module), function)(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
