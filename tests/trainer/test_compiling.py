"""What is compiled: the whole, or each repeated block; and what happens where that is no single graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch._dynamo.exc import Unsupported

from tests.test_exact import MODELS, last, run
from trainer.compiling import regions
from trainer.errors import ConfigError
from trainer.launch.compose import checked, compose

VIT = [*MODELS["vit"], "dataset.num_workers=0", "loop.epochs=1"]


@pytest.mark.parametrize(
    ("network", "kind", "count"),
    [
        (lambda: timm.create_model("test_vit"), "Block", 6),
        (lambda: timm.create_model("convnext_atto"), "ConvNeXtBlock", 12),
        (lambda: timm.create_model("resnet18"), "BasicBlock", 8),
        (lambda: torchvision.models.resnet18(), "BasicBlock", 8),
    ],
)
def test_the_blocks_that_repeat(network, kind, count):
    found = regions(network())
    assert [type(part).__name__ for part in found] == [kind] * count


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict]]:
    compiled = []

    def compile(self, **arguments):
        compiled.append((type(self).__name__, arguments))
        self._compiled_call_impl = self._call_impl

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    return compiled


def test_each_block_or_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiled = counted(monkeypatch)
    run(tmp_path / "whole", *VIT, "loop.compile=true", "loop.compile_mode=max-autotune")
    assert compiled == [("VisionTransformer", {"mode": "max-autotune", "fullgraph": False})]
    compiled.clear()
    run(tmp_path / "blocks", *VIT, "loop.compile=true", "loop.compile_regions=true")
    assert [name for name, _ in compiled] == ["Block"] * 6


def test_one_compilation_for_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Counted where torch's compiler hands a graph to its backend: one to train with and one to validate with, in two epochs as in one;
    and of as many as torch allows for one function, a stage needs no more than its own."""
    graphs: list[tuple[int, bool]] = []  # side of the images, and whether gradients are wanted
    compile = torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append((inputs[0].shape[-1], torch.is_grad_enabled()))
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode, **rest: compile(self, backend=backend, **rest))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    stages = "loop.stages=[{epochs: 1, image_size: 8}, {epochs: 2}]"
    run(tmp_path, *VIT, "loop.epochs=3", "loop.compile=true", "loop.compile_fullgraph=true", stages)
    assert graphs == [(8, True), (8, False), (16, True), (16, False)]


def test_no_single_graph_is_an_error_where_one_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def compile(self, **arguments):
        def call(*a, **k):
            raise Unsupported("graph break in user code")

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    with pytest.raises(ConfigError, match=r"(?s)not compiled as one graph: graph break.*compile_fullgraph=false"):
        run(tmp_path, *VIT, "loop.compile=true", "loop.compile_fullgraph=true")


@pytest.mark.parametrize("key", ["loop.compile_regions", "loop.compile_fullgraph"])
def test_without_compilation_there_is_nothing_to_compile(key):
    _, problems = checked(compose([f"{key}=true"]))
    assert [p.key for p in problems] == [key]


@pytest.mark.slow
def test_compiled_blocks_agree_with_eager(tmp_path: Path):
    run(tmp_path / "plain", *VIT)
    run(tmp_path / "compiled", *VIT, "loop.compile=true", "loop.compile_regions=true")
    a, b = last(tmp_path / "plain")["task"], last(tmp_path / "compiled")["task"]
    assert a.keys() == b.keys()
    assert max((a[k].double() - b[k].double()).abs().max().item() for k in a) < 1e-4
