"""A trained network for other programs: with its preprocessing and class names inside, and checked before it is called done.

What is exported takes uint8 pixels [N, C, S, S], cut and resized as in validation, and does the rest itself: no program has
to know means and deviations. How to cut and resize stands in the metadata. Every file is loaded again by the library that
is going to run it, and gives the original's outputs on real images, or is deleted.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import RunConfig
from trainer.config.plain import to_plain
from trainer.errors import ConfigError, Problem
from trainer.files import partial_path, storage_error

METADATA = "trainyard"  # the name under which a file holds what is known about it, as JSON
TOLERANCE = 1e-4  # largest difference of an output, relative to the largest output; another library adds up in another order
_ONNX = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Format:
    """A file format: how it is written, and how the program that runs it reads it back."""

    suffix: str
    write: Callable[[Parcel, Path], None]
    read: Callable[[Parcel, Path], Callable[[Tensor], Sequence[Tensor]]]
    needs: tuple[str, ...] = ()  # packages


@dataclass(frozen=True)
class Parcel:
    """What is exported."""

    network: nn.Module  # pixels float, normalised -> outputs
    rebuild: Callable[[], nn.Module]  # a network of the same kind with fresh weights
    run: RunConfig
    metadata: Mapping[str, Any]
    pixels: Tensor  # uint8 [N, C, S, S]: real images to check with
    original: Callable[[Tensor], Sequence[Tensor]]  # what the run's own network makes of pixels, by its own preprocessing

    @property
    def package(self) -> nn.Module:
        return Package(self.network, self.run.dataset.mean, self.run.dataset.std).eval().requires_grad_(False)


class Package(nn.Module):
    """Pixels in, outputs out."""

    scale: Tensor  # [1, C or 1, 1, 1]
    shift: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        scale, shift = 1 / (255 * torch.tensor(std)), -torch.tensor(mean) / torch.tensor(std)
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        self.register_buffer("shift", shift.view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Any:
        """uint8 or float pixels of 0 … 255, [N, C, S, S]."""
        return self.network(pixels.float() * self.scale + self.shift)


def describe(run: RunConfig, classes: Sequence[str], channels: int) -> dict[str, Any]:
    """What a file's user has to know: what goes in, what comes out, and what it was made of."""
    augmentation, data = run.augmentation, run.dataset
    return {
        "input": {
            "name": "pixels", "shape": ["N", channels, data.image_size, data.image_size], "type": "uint8",
            "colours": "RGB" if channels == 3 else f"{channels} channels",
            "resize": (f"shorter side to {round(data.image_size / augmentation.val_crop)}, then the centre of {data.image_size} x {data.image_size}"
                       if augmentation.keep_aspect else f"to {data.image_size} x {data.image_size}"),
            "interpolation": f"{augmentation.interpolation}, antialiased",
        },
        "inside": {"divide_by": 255, "mean": list(data.mean), "std": list(data.std)},
        "output": {"name": "logits" if classes else "outputs", "classes": list(classes)},
        "config": to_plain(run),
    }  # fmt: skip


def export(parcel: Parcel, kind: str, path: Path) -> float:
    """Write `path` and check it; the largest relative difference from the original on `parcel.pixels`.

    Raises:
        ConfigError: a package is missing, the network cannot be written in this format, or the file does not give the same.
        StorageError: it could not be written.
    """
    form = FORMATS[kind]
    missing = [name for name in form.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(Problem("--format", kind, f"needs {' and '.join(missing)}", 'pip install "trainyard[onnx]"'))
    partial = partial_path(path).with_suffix(path.suffix)  # readers go by the ending
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters warn of their own innards; what counts is compared below
            _quietly(kind, lambda: form.write(parcel, partial))
            program = form.read(parcel, partial)
            difference = _difference(kind, program, parcel.pixels, parcel.original)
        partial.replace(path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return difference


def _quietly(kind: str, write: Callable[[], None]) -> None:
    """Exporters print and log what they do, and raise whatever they like."""
    import contextlib
    import io

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            write()
    except OSError:
        raise
    except Exception as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
        raise ConfigError(Problem("--format", kind, f"this network cannot be written so: {why}", "--format safetensors")) from error
    finally:
        logging.disable(level)


def _difference(
    kind: str, program: Callable[[Tensor], Sequence[Tensor]], pixels: Tensor, original: Callable[[Tensor], Sequence[Tensor]]
) -> float:
    """How far the file is from the original, with all images at once and with one of them."""
    worst = 0.0
    for count in dict.fromkeys((len(pixels), 1)):
        expected, found = original(pixels[:count]), program(pixels[:count])
        if [f.shape for f in found] != [e.shape for e in expected]:
            reason = "the file does not give what the original gives: other shapes"
            raise ConfigError(Problem("--format", kind, reason, "--format safetensors"))
        for ours, theirs in zip(expected, found, strict=True):
            if ours.numel():
                gap = (ours.float() - theirs.float()).abs().max() / ours.float().abs().max().clamp_min(1e-6)
                worst = max(worst, gap.nan_to_num(float("inf")).item())
    if worst > TOLERANCE:
        reason = f"the file does not give what the original gives: outputs differ by {worst:.1e} of the largest, more than {TOLERANCE:.0e}"
        raise ConfigError(Problem("--format", kind, reason, "--format safetensors"))
    return worst


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a network's outputs, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [tensor for part in outputs if part is not None for tensor in tensors(part)]


# --- the formats --------------------------------------------------------------------------------------------------------


def _text(parcel: Parcel) -> str:
    return json.dumps(parcel.metadata, ensure_ascii=False)


def _write_safetensors(parcel: Parcel, path: Path) -> None:
    from safetensors.torch import save_file

    # The format has no notion of tied weights: each name gets bytes of its own.
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in parcel.network.state_dict().items()}
    save_file(weights, path, {"format": "pt", METADATA: _text(parcel)})


def _read_safetensors(parcel: Parcel, path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    from safetensors.torch import load_file

    network = parcel.rebuild()
    network.load_state_dict(load_file(path))
    package = Package(network.eval(), parcel.run.dataset.mean, parcel.run.dataset.std)
    return lambda pixels: _run(package, pixels)


def _write_torchscript(parcel: Parcel, path: Path) -> None:
    traced = torch.jit.trace(parcel.package, (parcel.pixels[:2],), strict=False, check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={f"{METADATA}.json": _text(parcel)})


def _read_torchscript(parcel: Parcel, path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    program = torch.jit.load(str(path))
    return lambda pixels: _run(program, pixels)


def _program(parcel: Parcel) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=65536)
    two = parcel.pixels[:2].repeat(2, 1, 1, 1)[:2]  # a batch of one would be taken for a constant
    return torch.export.export(parcel.package, (two,), dynamic_shapes=({0: batch},))


def _write_pt2(parcel: Parcel, path: Path) -> None:
    torch.export.save(_program(parcel), path, extra_files={f"{METADATA}.json": _text(parcel)})


def _read_pt2(parcel: Parcel, path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    program = torch.export.load(path).module()
    return lambda pixels: _run(program, pixels)


def _write_onnx(parcel: Parcel, path: Path) -> None:
    import onnx

    outputs = [parcel.metadata["output"]["name"]]
    names = {"input_names": ["pixels"], "output_names": outputs if len(tensors(parcel.package(parcel.pixels[:1]))) == 1 else None}
    program = torch.onnx.export(_program(parcel), dynamo=True, verbose=False, **names)
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {METADATA: _text(parcel)})
    onnx.save(model, path)


def _read_onnx(parcel: Parcel, path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    import onnx
    import onnxruntime

    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: [torch.from_numpy(out) for out in session.run(None, {name: pixels.numpy()})]


def _run(program: nn.Module | Callable[..., Any], pixels: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return tensors(program(pixels))


FORMATS = {
    "safetensors": Format(".safetensors", _write_safetensors, _read_safetensors),
    "torchscript": Format(".torchscript.pt", _write_torchscript, _read_torchscript),
    "pt2": Format(".pt2", _write_pt2, _read_pt2),
    "onnx": Format(".onnx", _write_onnx, _read_onnx, _ONNX),
}
