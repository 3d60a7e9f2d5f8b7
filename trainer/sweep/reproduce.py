"""`python -m trainer reproduce RUN_DIR`: the same run again from its own config.yaml, and how far its numbers are from the first.

The second run lies beside the first, is marked as a repetition, and goes on where it was stopped when the command is repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.run import Resume, RunConfig
from trainer.errors import ConfigError, Problem
from trainer.files import write_atomically
from trainer.log.record import read_rows
from trainer.rundir import RunDirectory
from trainer.sweep.diff import differences
from trainer.sweep.found import REPRODUCTION, number, text_of

SUFFIX = "-reproduced"
_CLOCKS = ("seconds", "system/")  # parts of the names of what no two runs share


def main(argv: Sequence[str]) -> int:
    options = arguments().parse_intermixed_args(argv)
    first = RunDirectory(options.directory)
    run = again(first.read_config())
    second = RunDirectory(options.out or first.path.with_name(first.path.name + SUFFIX))
    _refuse_strangers(first, second)
    if second.is_finished():
        print(f"{second} has run already; --out NAME runs it once more")
    else:
        from trainer.launch.dispatch import go_on
        from trainer.validation import validate

        validate(run)
        second.create()
        write_atomically(second.path / REPRODUCTION, json.dumps({"of": str(first.path.absolute())}) + "\n")
        second.write_config(run)
        if code := go_on(second):
            return code
    distance = distance_of(first, second)
    print("\n".join(account(first, second, distance)))
    return 1 if options.tolerance is not None and distance.largest > options.tolerance else 0


def again(run: RunConfig) -> RunConfig:
    """The config to run a second time: whatever could make it go on in the first run is taken out."""
    run.resume = Resume.auto
    run.logger.wandb.resume_id = None
    return run


def _refuse_strangers(first: RunDirectory, second: RunDirectory) -> None:
    """A directory that holds anything else than a repetition of this run is left alone."""
    if not second.path.exists() or not any(second.path.iterdir()):
        return
    try:
        of = json.loads((second.path / REPRODUCTION).read_text())["of"]
    except (OSError, ValueError, KeyError, TypeError):
        of = None
    if of is None or Path(of).name != first.path.name:
        raise ConfigError(Problem("--out", second.path, f"is there already, and is no repetition of {first}", f"--out {second.path}-2"))


# How far


@dataclass(frozen=True)
class Distance:
    """Between two records of one run."""

    rows: int  # that both have, by step
    largest: float  # difference of any number in them
    where: str  # its metric and step
    scores: dict[str, tuple[float, float]]  # of the last validation that both have
    same_weights: bool | None  # None where a run has none


def distance_of(first: RunDirectory, second: RunDirectory) -> Distance:
    """Compare every number that both runs wrote down, clocks apart."""
    a, b = dict(_rows(first)), dict(_rows(second))
    common = [key for key in a if key in b]
    largest, where = 0.0, ""
    scores: dict[str, tuple[float, float]] = {}
    for key in common:
        for name, value in a[key].items():
            other = b[key].get(name)
            x, y = number(value), number(other)
            if name.startswith("val/") and x is not None and y is not None:
                scores[name] = (x, y)
            gap = abs(x - y) if x is not None and y is not None else float("inf") if (x is None) != (y is None) else 0.0
            if gap > largest:
                largest, where = gap, f"{name} at step {key[0]}"
    return Distance(len(common), largest, where, scores, _same_weights(first, second))


def _rows(run: RunDirectory) -> Iterator[tuple[tuple[int, str], dict[str, Any]]]:
    """Rows by step and kind: the training row and the validation row of one step are two."""
    if not run.metrics_path.is_file():
        return
    for row in read_rows(run.metrics_path):
        kind = "val" if any(name.startswith("val/") for name in row) else "train"
        yield (row["step"], kind), {name: v for name, v in row.items() if "/" in name and not any(part in name for part in _CLOCKS)}


def _same_weights(first: RunDirectory, second: RunDirectory) -> bool | None:
    hashes = []
    for run in (first, second):
        try:
            hashes.append((run.checkpoints / "model.safetensors.sha256").read_text().split()[0])
        except (OSError, IndexError):
            return None
    return hashes[0] == hashes[1]


def account(first: RunDirectory, second: RunDirectory, distance: Distance) -> Iterator[str]:
    """What came of it, in words."""
    yield f"\nfirst  {first}\nagain  {second}\n"
    if not distance.rows:
        yield "the two records have no step in common: there is nothing to compare"
        return
    yield from _table(distance.scores)
    weights = {True: "the weights are the same, bit for bit", False: "the final weights differ", None: "there are no weights to compare"}
    if distance.largest == 0.0:
        yield f"identical: every number of {distance.rows} rows of the record; {weights[distance.same_weights]}"
    else:
        yield f"largest difference in {distance.rows} rows: {distance.largest:.3g} ({distance.where}); {weights[distance.same_weights]}"
    reasons = list(_reasons(differences(first, second)))
    if reasons and (distance.largest > 0.0 or distance.same_weights is False):
        yield "what has changed since:"
        yield from (f"  {reason}" for reason in reasons)
    elif distance.largest > 0.0:
        yield "nothing that could explain it has changed; on a GPU, loop.deterministic=true makes a run repeat itself"


def _reasons(found: Mapping[str, Any]) -> Iterator[str]:
    """What is different that can make numbers differ. The files that changed, `diff` shows."""
    yield from (line for line in found["code"] if " | " not in line)
    yield from (f"{line} differ" for line in found["data"])
    for key, (a, b) in found["environment"].items():
        if key.startswith(("versions", "hardware", "ranks", "variables")):
            yield f"{key}: {text_of(a)}, then {text_of(b)}"


def _table(scores: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    """To the last digit: what people round to is not what this is about."""
    rows = [("metric", "first", "again", "difference")]
    rows += [(name, repr(a), repr(b), "0" if a == b else f"{b - a:+.3g}") for name, (a, b) in scores.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, *numbers in rows:
        yield f"{name:{widths[0]}}  " + "  ".join(f"{text:>{width}}" for text, width in zip(numbers, widths[1:], strict=True))
    yield ""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer reproduce",
        description="The same run again from its own config.yaml, and how far its metrics are from the first.",
    )
    parser.add_argument("directory", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where the second run goes (default: RUN_DIR{SUFFIX})")
    parser.add_argument("--tolerance", type=float, metavar="X", help="end with 1 where any number is farther apart than this")
    return parser
