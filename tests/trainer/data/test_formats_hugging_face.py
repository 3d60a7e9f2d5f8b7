"""The adapter to Hugging Face's datasets: the same samples as the files they were made of."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.config.dataset import Facts
from trainer.data.config import HuggingFaceConfig, ImageFolderConfig
from trainer.data.formats import hugging_face
from trainer.data.formats.hugging_face import load_splits
from trainer.data.source import BadSample, encoded


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "datasets" else real(name, *rest))
    (problem,) = HuggingFaceConfig(path="/data", image_size=8).problems()
    assert problem.key == "dataset" and "pip install" in problem.fix and "[hf]" in problem.fix


def test_the_hub_is_not_asked_for_a_dataset_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("trainer.data.formats.hugging_face.load_splits", lambda *where: asked.append(where) or {})
    config = HuggingFaceConfig(image_size=8)
    assert any(p.key == "dataset.path" for p in config.problems()) and config.facts() == Facts() and not asked


@pytest.fixture(scope="module")
def saved(shared_data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A few classes of real photographs, as folders and as a saved dataset."""
    pytest.importorskip("datasets", reason="needs the extra hf: pip install -e '.[hf]'")
    folders, out = tmp_path_factory.mktemp("folders"), tmp_path_factory.mktemp("arrow")
    for split in ("train", "val"):
        for name in ("cat", "frog"):
            (folders / split / name).mkdir(parents=True)
            for path in sorted((shared_data / "cifar10" / split / name).iterdir())[:15]:
                (folders / split / name / path.name).symlink_to(path)
    code = """
import sys, datasets
features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "frog"])})
from trainer.data.config import ImageFolderConfig
config = ImageFolderConfig(path=sys.argv[1], image_size=8)
splits = {}
for split, name in (("train", "train"), ("val", "validation")):
    source = config.build(split)
    rows = {"image": [{"bytes": source.encoded(i)[0]} for i in range(len(source))], "label": source.labels().tolist()}
    splits[name] = datasets.Dataset.from_dict(rows, features=features)
splits["broken"] = datasets.Dataset.from_dict({"image": [{"bytes": b"no image"}, {"bytes": rows["image"][0]["bytes"]}], "label": [0, -1]}, features=features)
datasets.DatasetDict(splits).save_to_disk(sys.argv[2])
"""
    # In a process of its own: writing starts threads and progress bars that have no place in this one.
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(folders), str(out)], check=True, capture_output=True, text=True)
    return folders, out


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_the_samples_are_those_of_the_files(saved: tuple[Path, Path]) -> None:
    folders, path = saved
    config = HuggingFaceConfig(path=str(path), image_size=8)
    assert not list(config.problems())
    facts = config.facts()
    assert (facts.num_classes, facts.num_train, facts.num_val) == (2, 30, 30)
    for split in ("train", "val"):
        source, truth = config.build(split), ImageFolderConfig(path=str(folders), image_size=8).build(split)
        assert source.classes == truth.classes and len(source) == len(truth)
        np.testing.assert_array_equal(np.asarray(source.labels()), np.asarray(truth.labels()))
        for i in (0, 14, 29):
            np.testing.assert_array_equal(np.asarray(source[i]["image"]), np.asarray(truth[i]["image"]))
            assert source[i]["label"] == truth[i]["label"] and encoded(source, i) == encoded(truth, i)
        assert source.fingerprint == config.build(split).fingerprint
        np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(source))[3]["image"]), np.asarray(source[3]["image"]))
    assert config.build("train").fingerprint != config.build("val").fingerprint


def test_bad_rows_are_bad_samples(saved: tuple[Path, Path]) -> None:
    source = HuggingFaceConfig(path=str(saved[1]), image_size=8, val_split="broken").build("val")
    with pytest.raises(BadSample, match=r"broken\[0\].*not an image"):
        source[0]
    with pytest.raises(BadSample, match="has no label"):
        source[1]


def test_a_fraction_may_validate(saved: tuple[Path, Path]) -> None:
    config = HuggingFaceConfig(path=str(saved[1]), image_size=8, val_fraction=0.2)
    train, val = config.build("train"), config.build("val")
    assert len(train) == 24 and len(val) == 6
    assert not {train.name(i) for i in range(24)} & {val.name(i) for i in range(6)}


def test_the_split_that_validates_is_named(saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset without a validation split validates on its test split, of which a run warns."""
    config = HuggingFaceConfig(path=str(saved[1]), image_size=8)
    assert config.validates_on() == "validation"
    splits = load_splits(str(saved[1]), None)
    monkeypatch.setattr(hugging_face, "_loaded", lambda *_: {"train": splits["train"], "test": splits["validation"]})
    assert config.validates_on() == "test"
    assert HuggingFaceConfig(path=str(saved[1]), image_size=8, val_fraction=0.2).validates_on() == "train"
    assert HuggingFaceConfig(path=str(saved[1]), image_size=8, val_split="train").validates_on() == "train"
    assert HuggingFaceConfig(path=str(saved[1]), image_size=8, val_split="test2").validates_on() == "test2"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"path": "/nowhere/at all"}, "cannot be loaded"),
        ({"train_split": "training"}, "has no split training; it has train, validation"),
        ({"image_column": "img"}, "has no column 'img'; it has image, label"),
        ({"image_column": "label"}, "holds no images"),
        ({"label_column": "image"}, "has no class names"),
    ],
)
def test_what_is_wrong_is_said(saved: tuple[Path, Path], change: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = HuggingFaceConfig(path=str(saved[1]), image_size=8)
    for key, value in change.items():
        setattr(config, key, value)
    (problem,) = config.problems()
    assert problem.key == "dataset.path" and reason in problem.reason
