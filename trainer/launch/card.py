"""A model card in Markdown (arXiv:1810.03993, as far as a run knows the answers): what a network is, how good, and how to use it.

Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from trainer.config import RunConfig
from trainer.log.readable import show
from trainer.rundir import RunDirectory

_SHOWN = 50  # class names


def card(
    directory: RunDirectory, run: RunConfig, saved: Mapping[str, Any], metadata: Mapping[str, Any], files: Mapping[str, float],
    result: Mapping[str, Any] | None, parameters: int, checked_on: int,
) -> str:  # fmt: skip
    """The card. `files`: name -> how far its outputs are from the original's; `saved`: the checkpoint."""
    environment, data = directory.read_environment(), saved["data"]
    git = environment.get("git") or {}
    facts = {
        "network": f"`{run.model.name}`, {parameters:,} parameters",
        "task": type(run.task).__name__.removesuffix("Config"),
        "data": f"{type(run.dataset).__name__.removesuffix('Config')}, {data['num_train']:,} images to train on, {data['num_val']:,} to validate on",
        "trained": f"{saved['step']:,} optimizer steps of {run.loop.batch_size} images, seed {run.seed}",
        "checkpoint": f"step {saved['step']}{', averaged weights' if saved.get('ema') else ''}",
        "run": f"`{directory.path.parent.name}/{directory.path.name}`",
        "code": git.get("commit") or "not recorded",
        "exported": time.strftime("%Y-%m-%d"),
    }
    sections = [f"# {run.name}", "", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.items()), ""]
    views = directory.read_config().task.beyond_one_view()  # of the run that was scored; the export may have overrides
    sections += [*_scores(saved, result, views), *_input(metadata), *_classes(metadata), *_files(files, checked_on), *_use(metadata, files)]
    sections += [
        "## Limits", "",
        "The scores are those of the data above and say nothing about others; measure with `python -m trainer evaluate`. "
        "What the network should and should not be used for, and whom its errors would harm, is for its authors to write here.", "",
    ]  # fmt: skip
    return "\n".join(sections)


def _scores(saved: Mapping[str, Any], result: Mapping[str, Any] | None, views: str) -> list[str]:
    """`views`: the setting by which the run's validation saw several views of an image, or ""."""
    rows = (result or {}).get("history") or saved.get("history") or []
    row = next((r for r in rows if r.get("step") == saved["step"]), None)
    if row is None:
        return ["## Scores", "", "Not validated at this step.", ""]
    names = [name for name in row if name.startswith("val/") and name != "val/seconds"]
    measured = f"validation, with test-time augmentation `{views}`" if views else "validation"
    alone = f"The files, and `load_model`, see each image once and may score lower than this: `python -m trainer evaluate` without `{views}` tells."
    return [
        "## Scores",
        "",
        f"| metric | {measured} |",
        "|---|---|",
        *(f"| {n.removeprefix('val/')} | {show(n, row[n])} |" for n in names),
        "",
        *([alone, ""] if views else []),
    ]


def _input(metadata: Mapping[str, Any]) -> list[str]:
    given, inside = metadata["input"], metadata["inside"]
    shape = " × ".join(map(str, given["shape"]))
    numbers = lambda values: ", ".join(f"{v:g}" for v in values)  # noqa: E731
    return [
        "## Input", "",
        f"`{given['name']}`: {shape}, {given['type']}, {given['colours']}. Resize {given['resize']} ({given['interpolation']}). "
        f"Inside the file: division by {inside['divide_by']}, minus mean ({numbers(inside['mean'])}), over deviation ({numbers(inside['std'])}).", "",
    ]  # fmt: skip


def _classes(metadata: Mapping[str, Any]) -> list[str]:
    classes = metadata["output"]["classes"]
    if not classes:
        return []
    more = f" … and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    return [f"## Output: {metadata['output']['name']} of {len(classes)} classes", "", ", ".join(classes[:_SHOWN]) + more, ""]


def _files(files: Mapping[str, float], checked_on: int) -> list[str]:
    rows = [f"| `{name}` | {gap:.1e} |" for name, gap in files.items()]
    head = f"largest difference from the original on {checked_on} real images, of the largest output"
    return ["## Files", "", f"| file | {head} |", "|---|---|", *rows, ""]


def _use(metadata: Mapping[str, Any], files: Mapping[str, float]) -> list[str]:
    """How each file is run; `pixels` is what `Input` says."""
    ways = {
        ".onnx": 'import onnxruntime\nsession = onnxruntime.InferenceSession("{}")\nlogits = session.run(None, {{"pixels": pixels}})[0]  # metadata: session.get_modelmeta().custom_metadata_map["trainyard"]',
        ".torchscript.pt": 'import torch\nlogits = torch.jit.load("{}")(pixels)  # metadata: the file trainyard.json inside',
        ".pt2": 'import torch\nlogits = torch.export.load("{}").module()(pixels)  # metadata: the file trainyard.json inside',
        ".safetensors": 'from safetensors.torch import load_file\nnetwork.load_state_dict(load_file("{}"))  # weights alone: takes normalised images; metadata: in the header',
    }
    code = [way.format(name) for name in files for suffix, way in ways.items() if name.endswith(suffix)]
    return ["## Use", "", "```python", *code, "```", ""]
