"""Exported files: each gives the original's answers in the program that runs it, knows what it is, and is not there if it does not."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import trainer.export as exporting
from tests.test_exact import MODELS, run
from trainer import load_model
from trainer.errors import ConfigError, DataError
from trainer.launch import export
from trainer.launch.compose import compose_run

NETWORKS = {name: [*overrides, "dataset.num_workers=0"] for name, overrides in MODELS.items()}
ONNX = exporting.FORMATS["onnx"].needs  # an extra: without it, the other formats are asked all the same
HERE = [kind for kind in export.FORMATS if kind != "onnx" or all(importlib.util.find_spec(package) for package in ONNX)]


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param) / "run"
    run(directory, *NETWORKS[request.param], "loop.epochs=1", "loop.ema_decay=0.5")
    return directory


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """Every format that can be written here, in one call."""
    assert export.main([str(trained), "--format", ",".join(HERE)]) == 0
    return trained / "exports"


def test_the_names_of_the_formats_are_those_that_can_be_written():
    assert set(export.FORMATS) == set(exporting.FORMATS)


def originals(trained: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and logits of other images than those the file was checked on: by `load_model`, from the picture on."""
    model: Any = load_model(trained)
    source = compose_run("dataset=digits").dataset.build("train")
    images = [source[i]["image"] for i in range(count)]
    with torch.inference_mode():
        return model.transform.pixels(images), model(model.transform(images))


def onnx_session(exported: Path) -> Any:
    if "onnx" not in HERE:
        pytest.skip("needs the extra onnx: pip install -e '.[onnx]'")
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])


DEPRECATED = pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated:FutureWarning")


@DEPRECATED
@pytest.mark.parametrize("count", [1, 5])
def test_each_file_gives_the_logits_of_the_original(count, trained, exported):
    pixels, logits = originals(trained, count)
    answers = {
        "pt2": torch.export.load(exported / "model.pt2").module()(pixels),
        "torchscript": torch.jit.load(str(exported / "model.torchscript.pt"))(pixels),
    }
    for kind, answer in answers.items():
        torch.testing.assert_close(answer, logits, rtol=1e-4, atol=1e-4, msg=lambda text, kind=kind: f"{kind}: {text}")


@pytest.mark.parametrize("count", [1, 5])
def test_an_onnx_file_gives_the_logits_of_the_original(count, trained, exported):
    session = onnx_session(exported)
    pixels, logits = originals(trained, count)
    answer = torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])
    torch.testing.assert_close(answer, logits, rtol=1e-4, atol=1e-4)


@DEPRECATED
def test_each_file_knows_what_it_is(trained, exported):
    script, program = {"trainyard.json": ""}, {"trainyard.json": ""}
    torch.jit.load(str(exported / "model.torchscript.pt"), _extra_files=script)
    torch.export.load(exported / "model.pt2", extra_files=program)
    with safe_open(exported / "model.safetensors", "pt") as file:
        weights = file.metadata()["trainyard"]
        assert set(file.keys()) == set(load_model(trained).state_dict())
    known = [json.loads(text) for text in (script["trainyard.json"], program["trainyard.json"], weights)]
    assert known[0] == known[1] == known[2]
    size = compose_run(*NETWORKS[trained.parent.name[:-1]]).dataset.image_size
    assert known[0]["output"]["classes"] == [str(i) for i in range(10)] and known[0]["input"]["shape"] == ["N", 3, size, size]
    assert known[0]["inside"]["mean"] == compose_run("dataset=digits").dataset.mean and known[0]["config"]["model"]["name"]


def test_an_onnx_file_knows_what_it_is(trained, exported):
    known = json.loads(onnx_session(exported).get_modelmeta().custom_metadata_map["trainyard"])
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert known == json.loads(file.metadata()["trainyard"])


def test_the_card_says_what_the_run_knows(trained, exported):
    card = (exported / "model_card.md").read_text()
    result = json.loads((trained / "result.json").read_text())
    assert f"| top1 | {100 * result['best']['val/top1']:.2f} % |" in card
    assert "averaged weights" in card and "1,438 images to train on" in card and "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in card
    gaps = [float(g) for g in re.findall(r"\| `model\.\S+` \| (\S+) \|", card)]
    assert len(gaps) == len(HERE) and max(gaps) < exporting.TOLERANCE
    assert not [p for p in exported.iterdir() if p.name.startswith(".")], "nothing half written is left"


def test_scores_of_several_views_are_not_said_to_be_those_of_the_file(trained, tmp_path):
    directory = Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("exports")))
    text = (directory / "config.yaml").read_text()
    assert text.count("  tta: none\n") == 1
    for views, told in (
        ("none", "| metric | validation |"),
        ("flip", "| metric | validation, with test-time augmentation `task.tta=flip` |"),
    ):
        (directory / "config.yaml").write_text(text.replace("  tta: none\n", f"  tta: {views}\n"))
        for overrides in ([], ["task.tta=none"]):  # what is asked of the export does not change how the run was scored
            assert export.main([str(directory), *overrides]) == 0
            card = (directory / "exports" / "model_card.md").read_text()
            assert told in card and ("see each image once" in card) == (views == "flip")


def test_a_file_that_differs_is_not_left_behind(trained, tmp_path, monkeypatch):
    """Packed with the means of other data: the original knows its own."""
    original = exporting.Package.__init__
    monkeypatch.setattr(exporting.Package, "__init__", lambda self, network, mean, std: original(self, network, [0.0, 0.0, 0.0], std))
    with pytest.raises(ConfigError, match="--format=pt2: the file does not give what the original gives: outputs differ by"):
        export.main([str(trained), "--format", "pt2", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named_with_its_extra(trained, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    one_missing = dict.fromkeys(ONNX, real("json")) | {"onnxscript": None}  # whether or not the extra is installed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: one_missing[name] if name in ONNX else real(name, *rest))
    with pytest.raises(ConfigError, match=r'--format=onnx: needs onnxscript\n    try: pip install "trainyard\[onnx\]"'):
        export.main([str(trained), "--format", "onnx", "--out", str(tmp_path)])


def test_a_network_that_cannot_be_traced_says_so(trained, monkeypatch, tmp_path):
    def forward(self, pixels):
        return self.network(pixels.float() * self.scale + self.shift) * (1.0 if pixels.float().mean() > 3 else 2.0)

    monkeypatch.setattr(exporting.Package, "forward", forward)
    with pytest.raises(ConfigError, match="--format=pt2: this network cannot be written so"):
        export.main([str(trained), "--format", "pt2", "--out", str(tmp_path)])


def test_what_there_is_nothing_to_check_with_is_not_exported(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"--format=onx: there are .*\n    try: --format onnx"):
        export.main([str(trained), "--format", "onx"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="there are no images to check with"):
        export.main([str(trained), "--images", str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match="there is no such folder"):
        export.main([str(trained), "--images", str(tmp_path / "nowhere")])
    (tmp_path / "empty" / "a.png").write_bytes(b"torn")
    with pytest.raises(DataError, match="none of the images to check with can be read"):
        export.main([str(trained), "--images", str(tmp_path / "empty")])


def test_a_run_whose_data_are_gone_is_checked_with_other_images(trained, tmp_path):
    directory = Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("exports")))
    text = (directory / "config.yaml").read_text()
    moved = "  _schema_: trainer.data.schemas.folders:ImageFolderConfig\n  path: nowhere\n"
    dataset = text[text.index("dataset:\n") : text.index("augmentation:\n")]
    kept = [line for line in dataset.splitlines() if line.strip().startswith(("image_size", "num_workers", "mean", "std", "-"))]
    (directory / "config.yaml").write_text(text.replace(dataset, "dataset:\n" + moved + "\n".join(kept) + "\n"))
    with pytest.raises(ConfigError, match=r"(?s)dataset\.path=nowhere: the run's data cannot be read.*--images"):
        export.main([str(directory)])
    (tmp_path / "images").mkdir()
    compose_run("dataset=digits").dataset.build("val")[0]["image"].save(tmp_path / "images" / "a.png")
    assert export.main([str(directory), "--images", str(tmp_path / "images")]) == 0
    assert (directory / "exports" / "model.safetensors").exists()
