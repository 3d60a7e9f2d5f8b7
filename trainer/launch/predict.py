"""`python -m trainer predict RUN_DIR FOLDER [overrides]`: what a trained network finds in images, as a CSV file and a contact sheet.

Images go through the run's own validation transform and loader. It knows no task: rows are what the task's `predict` gives. Of a network
that has learned without labels it writes the features, `features.npz`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import RunConfig
from trainer.errors import ConfigError, DataError, Problem
from trainer.launch.amend import amended, trained_run, words
from trainer.launch.evaluate import FIXED

if TYPE_CHECKING:
    from trainer.data.loose import LooseImages
    from trainer.task import Batch, Task

Rows = Sequence[Mapping[str, Any]]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer predict", description="What a run's network finds in the images of a folder.")
    parser.add_argument("run_dir", help="runs/<name>/<version>-<hash>")
    parser.add_argument("folder", help="images, at any depth; or one image")
    parser.add_argument(
        "overrides", nargs="*", help="checkpoint=best|last|…, classes=a,b (only these compete), dataset.image_size=… and others"
    )
    parser.add_argument("--out", type=Path, help="where to write (default: RUN_DIR/predictions/<name of the folder>)")
    parser.add_argument("--sheet", type=int, default=64, metavar="N", help="images on the contact sheet (default: 64; 0 = no sheet)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Write `predictions.csv` and `sheet.png`, or `features.npz`, and print where they are."""
    options = arguments().parse_intermixed_args(argv)
    directory, before = trained_run(options.run_dir)
    own, overrides = words(options.overrides, checkpoint="best", classes="")
    folder = Path(options.folder)
    if not folder.exists():
        raise ConfigError(Problem("folder", folder, "there is no such folder or image", "python -m trainer predict RUN_DIR FOLDER"))
    run = checked(before, overrides)
    out = options.out or directory.path / "predictions" / (folder.resolve().stem or "images")
    write(run, directory.path, folder, out, own["checkpoint"], own["classes"], options.sheet)
    return 0


def checked(before: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run as it is to be used. Its data need not be there any more, so nothing about them is asked."""
    from trainer.config.fields import field_problems

    run, _, problems = amended(before, overrides, fixed=FIXED)
    if run is not None:
        problems = [*problems, *field_problems(run), *run.model.problems("model", run.dataset.image_size)]
    if run is None or problems:
        raise ConfigError(*problems)
    return run


def write(run: RunConfig, run_dir: Path, folder: Path, out: Path, checkpoint: str, classes: str, on_sheet: int) -> None:
    import torch

    from trainer.data.loose import LooseImages
    from trainer.evaluate import restrict
    from trainer.inference import load_task
    from trainer.task import Task

    task, run, saved = load_task(run_dir, checkpoint, run)
    images = LooseImages(folder, saved["channels"])
    if not len(images):
        endings = "images (.jpg, .png …)" if saved["channels"] in (1, 3) else "arrays (.npy)"
        raise ConfigError(Problem("folder", folder, f"holds no {endings}, at any depth"))
    task.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
    has_rows = type(task).predict is not Task.predict
    if classes and not has_rows:
        reason = f"{type(task).__name__} tells no classes apart: it has features to give"
        raise ConfigError(Problem("classes", classes, reason, f"task=classification init_from={run_dir} learns some"))
    if classes:
        restrict(task, classes, saved["classes"])
    answer = task.predict if has_rows else lambda batch: task.features(batch["image"]).float().cpu().numpy()
    found: dict[str, Any] = {}
    shown: list[tuple[Any, Any]] = []
    bad: dict[str, str] = {}
    for path, pixels, given in answers(run, task, answer, images, bad):
        found[path] = given
        if len(shown) < on_sheet:
            shown.append((pixels, given))
    if not found:
        listed = "\n".join(f"  {path}: {why}" for path, why in bad.items())
        raise DataError(f"none of the {len(images)} images in {folder} can be read:\n{listed}")
    out.mkdir(parents=True, exist_ok=True)
    if has_rows:
        written = write_table(out, images, found, bad, shown)
    else:
        written = write_features(out, {images.relative(path): given for path, given in sorted(found.items())})
    left = f", {len(bad)} cannot be read" + (" (column error)" if has_rows else "") if bad else ""
    print("\n".join([f"{len(found)} images{left}", *map(str, written)]))


def write_table(
    out: Path, images: LooseImages, found: Mapping[str, Rows], bad: Mapping[str, str], shown: Sequence[tuple[Any, Rows]]
) -> list[Path]:
    from trainer.evaluate import write_csv

    write_csv(out / "predictions.csv", [row for p in images.paths for row in rows_of(images.relative(p), found.get(p), bad.get(p))])
    if not shown:
        return [out / "predictions.csv"]
    contact_sheet(shown).save(out / "sheet.png")
    return [out / "predictions.csv", out / "sheet.png"]


def write_features(out: Path, found: Mapping[str, Any]) -> list[Path]:
    """`files` [N], as they are called in the folder, and their `features`, float32 [N, D]."""
    import numpy as np

    np.savez(out / "features.npz", files=np.array(list(found)), features=np.stack(list(found.values())))
    return [out / "features.npz"]


def answers(
    run: RunConfig, task: Task, answer: Callable[[Batch], Any], images: LooseImages, bad: dict[str, str]
) -> Iterator[tuple[str, Any, Any]]:
    """(path, pixels [S, S, 3] uint8 that the network saw, answer) of every image that can be read; the others go to `bad`."""
    from contextlib import nullcontext

    import torch

    from trainer.data.loader import validation_loader, worker_count
    from trainer.distributed import World
    from trainer.launch.show_batch import to_pixels

    cfg, device = run.dataset, next(task.parameters()).device
    loader = validation_loader(
        images, task.augmentation(train=False) or run.augmentation.build(cfg, train=False), World(device=device),
        batch_size=run.loop.batch_size, workers=worker_count(cfg.num_workers, 1, device), timeout=cfg.worker_timeout,
        max_bad_samples=len(images), seed=run.seed,
    )  # fmt: skip
    kind = run.precision.autocast
    with torch.inference_mode(), torch.autocast(device.type, dtype=getattr(torch, kind)) if kind else nullcontext():
        for batch in loader:
            pixels, indices = to_pixels(batch["image"].float(), cfg.mean, cfg.std), batch["index"].tolist()
            for index, picture, rows in zip(indices, pixels, answer(batch), strict=True):
                yield images.name(index), picture, rows
    loader.close()
    bad.update(loader.bad.found)


def rows_of(file: str, rows: Rows | None, error: str | None) -> list[dict[str, Any]]:
    """What the table has on an image: a row for each thing found, and at least one."""
    if rows is None:
        return [{"file": file, "error": error}]
    return [{"file": file, **row} for row in rows or [{}]]


def contact_sheet(shown: Sequence[tuple[Any, Rows]]) -> Any:
    """Pictures over what was found in them, boxes drawn in."""
    import numpy as np

    from trainer.launch.show_batch import page

    def annotate(draw: Any, i: int, corner: tuple[int, int], scale: int) -> None:
        for row in shown[i][1]:
            if "x1" in row:
                x, y = corner
                draw.rectangle([x + row["x1"] * scale, y + row["y1"] * scale, x + row["x2"] * scale, y + row["y2"] * scale], outline="red")

    return page(np.stack([pixels for pixels, _ in shown]), [caption(rows) for _, rows in shown], annotate)


def caption(rows: Rows) -> str:
    """The first thing found: its first text, and its first number."""
    if not rows:
        return "nothing"
    values = list(rows[0].values())
    text = next((str(v) for v in values if isinstance(v, str)), "")
    number = next((f" {v:.2f}" for v in values if isinstance(v, float)), "")
    return f"{text}{number}" + (f" +{len(rows) - 1}" if len(rows) > 1 else "")
