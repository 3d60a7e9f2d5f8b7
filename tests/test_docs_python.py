"""The Python in the documents runs as it stands there, on a run of the kind that its document is about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_docs import DOCUMENTS
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory

BLOCKS = [
    pytest.param(document.name, block, id=f"{document.stem}-{i}")
    for document in DOCUMENTS
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL))
]

SHORT = ["loop.batch_size=8", "loop.steps=2", "loop.progress=none", "logger.plots=false", "loop.max_validation_batches=1",
         "dataset.num_workers=0"]  # fmt: skip
CLASSIFIER = ["model=timm", "model.name=test_resnet", "dataset.image_size=32"]
RUNS = {
    "detection.md": [
        "task=detection",
        "task.detector=ssdlite",
        "task.width=32",
        "model=timm",
        "model.name=test_resnet",
        "dataset.image_size=64",
    ],
    "masked-images.md": ["task=mim", "model=timm", "model.name=test_vit", "dataset.image_size=160", "loop.max_reference_images=16"],
}


def test_documents_have_blocks():
    assert len(BLOCKS) >= 5 and {"README.md", "reference.md"} <= {block.values[0] for block in BLOCKS}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory):
    """The run that a document's blocks work with, trained when first asked for."""
    made: dict[str, Path] = {}

    def find(document: str) -> Path:
        overrides = RUNS.get(document, CLASSIFIER)
        key = " ".join(overrides)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run")
            train(compose_run(*overrides, *SHORT), RunDirectory(made[key]))
        return made[key]

    return find


@pytest.mark.parametrize(("document", "block"), BLOCKS)
def test_block(document, block, run_of, tmp_path, monkeypatch):
    """`image` and photo.jpg are the reader's own; so are the run, and the network it is of."""
    image = compose_run("dataset=digits").dataset.build("val")[0]["image"].convert("RGB")
    image.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    directory = run_of(document)
    names = {"image": image}
    exec(block.replace("runs/…", str(directory)).replace("vit_base_patch16_224", "test_vit"), names)
    model = names.get("model")
    if "model.transform(image)" in block and document == "reference.md":
        assert names["logits"].shape == (1, len(model.classes)) and names["name"] in model.classes  # type: ignore[union-attr]
