"""`python -m trainer export RUN_DIR --format onnx`: a run's network as a file for other programs, with a model card beside it.

Imports no torch before there is something to export.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import RunConfig
from trainer.config.names import nearest
from trainer.errors import ConfigError, DataError, Problem
from trainer.launch.amend import trained_run, words
from trainer.launch.predict import checked
from trainer.rundir import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.source import Source
    from trainer.inference import Transform

FORMATS = ("safetensors", "onnx", "torchscript", "pt2")
CHECKED = 32  # real images that a file is compared with the original on


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer export", description="A run's network as a file for other programs.")
    parser.add_argument("run_dir", help="runs/<name>/<version>-<hash>")
    parser.add_argument("overrides", nargs="*", help="checkpoint=best|last|…, dataset.image_size=… and others")
    parser.add_argument(
        "--format", default="safetensors", help=f"one of {', '.join(FORMATS)}, or several with commas (default: safetensors)"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: RUN_DIR/exports)")
    parser.add_argument("--images", type=Path, help="folder of images to check with (default: the run's validation images)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Write and check each file, then the card; print where they are and how far they are from the original."""
    options = arguments().parse_intermixed_args(argv)
    directory, before = trained_run(options.run_dir)
    own, overrides = words(options.overrides, checkpoint="best")
    kinds = list(dict.fromkeys(options.format.split(",")))
    for kind in kinds:
        if kind not in FORMATS:
            raise ConfigError(
                Problem("--format", kind, f"there are {', '.join(FORMATS)}", f"--format {nearest(kind, FORMATS) or FORMATS[0]}")
            )
    run = checked(before, overrides)
    write(directory, run, own["checkpoint"], kinds, options.out or directory.path / "exports", options.images)
    return 0


def write(directory: RunDirectory, run: RunConfig, checkpoint: str, kinds: Sequence[str], out: Path, images: Path | None) -> None:
    import torch

    from trainer.export import FORMATS, Parcel, describe, export, tensors
    from trainer.files import write_atomically
    from trainer.inference import dressed, load_task
    from trainer.launch.card import card

    task, run, saved = load_task(directory.path, checkpoint, run)
    network: Any = dressed(task, run, saved)
    pixels = real_images(run, network.transform, saved["channels"], images)

    def original(given: Tensor) -> Sequence[Tensor]:
        with torch.inference_mode():
            return tensors(network(network.transform(given)))

    metadata = describe(run, saved["classes"], saved["channels"])
    with torch.random.fork_rng(devices=[]):
        parcel = Parcel(task.network(), lambda: load_task(directory.path, checkpoint, run)[0].network(), run, metadata, pixels, original)
        files = {}
        for kind in kinds:
            path = out / f"model{FORMATS[kind].suffix}"
            files[path.name] = export(parcel, kind, path)
            size = path.stat().st_size / 1e6
            print(
                f"{path}  {size:.1f} MB, checked on {len(pixels)} images: differs by {files[path.name]:.1e} of the largest output",
                flush=True,
            )
    result = directory.read_result()
    parameters = sum(p.numel() for p in network.parameters())
    write_atomically(out / "model_card.md", card(directory, run, saved, metadata, files, result, parameters, len(pixels)))
    print(out / "model_card.md")


def real_images(run: RunConfig, transform: Transform, channels: int, folder: Path | None) -> Tensor:
    """Images to compare on, uint8 [N, C, S, S], spread over the run's validation set or from a folder.

    Raises:
        ConfigError: there are none, and unchecked nothing is exported.
    """
    import numpy as np
    import torch

    from trainer.data.source import BadSample

    source = _source(run, channels, folder)
    found: list[Tensor] = []
    for index in np.unique(np.linspace(0, len(source) - 1, CHECKED).astype(int)).tolist():
        try:
            found.append(transform.pixels(source[index]["image"])[0])
        except BadSample:
            continue
    if not found:
        raise DataError(f"none of the images to check with can be read ({len(source)} of them)")
    return torch.stack(found)


def _source(run: RunConfig, channels: int, folder: Path | None) -> Source:
    from trainer.data.loose import LooseImages

    fix = "--images <a folder of images like those it was trained on>"
    if folder is not None:
        if not folder.exists():
            raise ConfigError(Problem("--images", folder, "there is no such folder", fix))
        source: Source = LooseImages(folder, channels)
    else:
        data = run.dataset.alone("val")
        problems = list(data.problems())
        if problems:
            reason = f"the run's data cannot be read ({problems[0].reason}), and a file that was compared with nothing is not exported"
            raise ConfigError(Problem(problems[0].key, problems[0].value, reason, fix))
        source = data.build("val")
    if not len(source):
        raise ConfigError(Problem("--images", folder, "there are no images to check with", fix))
    return source
