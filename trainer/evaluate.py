"""A trained network measured on any data by the engine's own validation pass, on any number of ranks, and the answer written down.

It knows no task: scores, tables, matrices, rows and pictures are whatever the task's evaluator has.
"""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.backends import set_backends
from trainer.config import RunConfig
from trainer.data.relabel import class_names, only, places_of, relabelled
from trainer.data.source import Source
from trainer.distributed import World, open_world
from trainer.engine import Engine, Periods
from trainer.errors import ConfigError, Problem
from trainer.feeds import as_validated, reference, share_of
from trainer.files import storage_error, write_atomically
from trainer.inference import load_task
from trainer.models import prepare
from trainer.run import known_errors
from trainer.rundir import RunDirectory
from trainer.signals import StopSignals, stop_error
from trainer.stages import build_state
from trainer.task import ComparesWithTraining, Report, Reports, Task
from trainer.vote import StopVote
from trainer.watchdog import Watchdog

logger = logging.getLogger(__name__)

ROWS_SHOWN = 40  # of a table on the terminal; files have them all


@dataclass(frozen=True)
class Question:
    """What is asked, beside the settings of the run."""

    checkpoint: str = "best"
    split: str = "val"
    classes: str = ""  # names, or a file of them; empty = all
    real_labels: str = ""  # a JSON file; empty = none
    overrides: list[str] = field(default_factory=list)  # as typed


def evaluate(run: RunConfig, directory: RunDirectory, question: Question, out: Path) -> dict[str, Any]:
    """Measure and write the answer to `out`. Every rank calls this. Returns what `scores.json` holds."""
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals(max_hours=run.loop.max_hours))
        world = stack.enter_context(open_world(run.distributed))
        with known_errors(run, world):
            set_backends(run, world.device)
            watchdog = stack.enter_context(Watchdog(run.distributed.timeout, world))
            task, run, saved = load_task(directory.path, question.checkpoint, run)
            prepare(task.to(world.device), run.loop)
            source = relabelled(run.dataset.build(question.split), saved["classes"], question.real_labels or None)
            if question.classes:
                source = only(source, restrict(task, question.classes, saved["classes"]), question.classes)
            if len(source) == 0:
                raise ConfigError(Problem("split", question.split, "there are no samples in it", "dataset.val_path=/path/to/data"))
            engine = _engine(run, task, saved, world, StopVote(world, signals.told).poll, watchdog.tick)
            evaluator = task.evaluator()
            loader = as_validated(run, task, source, world, run.loop.max_validation_batches)
            if isinstance(evaluator, ComparesWithTraining):
                known = training_images(run, source, question.split)
                engine.reference = reference(run, task, relabelled(known, saved["classes"]), world) if known is not None else None
            started = time.perf_counter()
            scores = engine.evaluate(loader, illustrate=True, evaluator=evaluator)
            if scores is None:
                raise stop_error(engine.stop_reason, out)
            answer = {
                "run": str(directory.path), **asdict(question), "step": saved.get("step"), "num_samples": _count(run, world, len(source)),
                "bad_samples": sum(world.gather(len(loader.bad.found))),
                "data": source.fingerprint, "image_size": run.dataset.image_size, "seconds": round(time.perf_counter() - started, 3), **scores,
            }  # fmt: skip
            if question.real_labels and not any(name.startswith("val/real") for name in scores):
                logger.warning("real_labels=%s: this task's evaluation makes no use of them", question.real_labels)
            if world.is_main:
                report = evaluator.report() if isinstance(evaluator, Reports) else Report()
                write(out, answer, report, engine.reporter.shown, source.name)  # type: ignore[attr-defined]
                show(answer, report, directory, out)
            world.barrier()
            return answer


def training_images(run: RunConfig, source: Source, split: str) -> Source | None:
    """What an evaluator compares the images of a split with; None, and said, where the data have no others to train on."""
    data = run.dataset.alone("train")
    problem = next(data.problems(), None)
    if problem is None:
        known = data.build("train")
        if split == "train" or known.fingerprint != source.fingerprint:
            return known
    logger.warning("no training images to compare with: scores that need them are left out%s", f" ({problem.reason})" if problem else "")
    return None


def restrict(task: Task, text: str, classes: Sequence[str]) -> list[int]:
    """Let only the classes that `text` names compete; their labels."""
    names = class_names(text)
    places = places_of(names, classes)
    try:
        task.restrict(places)
    except NotImplementedError:
        raise ConfigError(Problem("classes", text, f"{type(task).__name__} has no classes that compete", "leave it out")) from None
    return places


def _count(run: RunConfig, world: World, size: int) -> int:
    """How many samples are looked at, where there is a limit on batches too."""
    most = run.loop.max_validation_batches
    return size if most is None else min(size, most * share_of(run, world) * world.size)


def _engine(
    run: RunConfig, task: Task, saved: Mapping[str, Any], world: World, poll: Callable[[int], int], tick: Callable[[], None]
) -> Engine:
    """An engine that is not going to train, at the checkpoint's step."""
    data = saved["data"]
    periods = Periods(total=data["total_steps"], epoch=int(data["steps_per_epoch"]), log=1, validate=0, checkpoint=0)
    state = build_state(run, task)  # the task holds the averaged weights already, so an average of them changes nothing
    schedule = run.scheduler.build(periods.total, periods.epoch)
    return Engine(state, world, schedule, periods, run.loop, run.precision, seed=run.seed, reporter=Listener(tick), poll=poll)


class Listener:
    """An `engine.Reporter` that keeps the pictures."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick
        self.shown: dict[str, Tensor] = {}  # name -> uint8 [3, H, W]

    def logged(self, scalars: dict[str, float]) -> None: ...
    def validated(self, scores: dict[str, float]) -> None: ...
    def save(self) -> None: ...

    def pictures(self, pictures: Mapping[str, Tensor]) -> None:
        self.shown = dict(pictures)


# --- the answer ---------------------------------------------------------------------------------------------------------


def write(out: Path, answer: Mapping[str, Any], report: Report, pictures: Mapping[str, Tensor], name: Callable[[int], str]) -> None:
    """`scores.json`, `predictions.csv`, a CSV for each table, a CSV and a PNG for each matrix, and the pictures."""
    from PIL import Image

    from trainer.log.matrix import draw_matrix

    try:
        out.mkdir(parents=True, exist_ok=True)
        if report.samples:
            write_csv(out / "predictions.csv", [{"file": name(int(row["index"])), **row} for row in report.samples])
        for title, rows in report.tables.items():
            write_csv(out / f"{title}.csv", rows)
        for title, (names, values) in report.matrices.items():
            write_csv(
                out / f"{title}.csv", [{"": own, **dict(zip(names, row, strict=True))} for own, row in zip(names, values, strict=True)]
            )
            draw_matrix(out / f"{title}.png", title, names, values)
        for title, picture in pictures.items():
            Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(out / f"{title}.png")
    except OSError as error:
        raise storage_error(out, error) from error
    write_atomically(out / "scores.json", json.dumps(answer, indent=1, ensure_ascii=False) + "\n")  # last: who finds it has all


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the columns of all of them, in the order in which they first come."""
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue(), durable=False)


def show(answer: Mapping[str, Any], report: Report, directory: RunDirectory, out: Path) -> None:
    """The scores beside those that the run had, then the tables that are short enough."""
    from trainer.log.readable import show as value_of
    from trainer.log.table import print_rows

    result = directory.read_result() or {}
    then = next((row for row in result.get("history", ()) if row.get("step") == answer["step"]), {})
    names = [name for name in answer if name.startswith("val/")]
    print(f"{answer['num_samples']:,} samples, checkpoint {answer['checkpoint']} (step {answer['step']})")
    rows = [{"metric": n.removeprefix("val/"), "here": value_of(n, answer[n]), "in training": value_of(n, then.get(n))} for n in names]
    print_rows(rows)
    for title, table in report.tables.items():
        if len(table) <= ROWS_SHOWN:
            print_rows([{key: value_of(key, v) if isinstance(v, float) else v for key, v in row.items()} for row in table])
        else:
            print(f"{title}: {len(table)} rows in {out / f'{title}.csv'}")
    print(out, flush=True)
