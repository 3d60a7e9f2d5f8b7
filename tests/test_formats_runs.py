"""Real photographs in whole runs: killed and resumed to the same bits, and the same on two ranks as on one.

tests/test_choices.py does the first for every dataset, on small ones made for it.
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.processes import finish, logs, start, start_ranks
from tests.test_exact import MODELS, assert_same_run, last
from tests.test_ranks import losses
from trainer.data.config import ImageFolderConfig
from trainer.data.shards.pack import pack

RUN = [*MODELS["vit"], "optimizer=sgd", "optimizer.lr=0.05", "loop.batch_size=16", "loop.samples_per_epoch=48", "loop.epochs=6", "loop.log_every=1",
       "loop.progress=none", "logger.plots=false", "loop.max_validation_batches=1", "loop.checkpoint_every_steps=3"]  # fmt: skip


def cifar(root: Path, shared_data) -> Path:
    """A few photographs in class folders."""
    for split, count in (("train", 16), ("val", 4)):
        for name in ("cat", "dog", "frog"):
            (root / split / name).mkdir(parents=True)
            for path in sorted((shared_data / "cifar10" / split / name).iterdir())[:count]:
                shutil.copy(path, root / split / name)
    return root


def image_folder(root: Path, shared_data) -> list[str]:
    return [f"dataset.path={cifar(root, shared_data)}"]


def webdataset(root: Path, shared_data) -> list[str]:
    config = ImageFolderConfig(path=str(cifar(root / "folders", shared_data)), image_size=16)
    for split in ("train", "val"):
        pack(config.build(split), root / "shards", split, size=20_480)
    return [f"dataset.path={root / 'shards'}"]


def cub(root: Path, shared_data) -> list[str]:
    return [f"dataset.path={shared_data / 'cub10'}"]


def hugging_face(root: Path, shared_data) -> list[str]:
    datasets = pytest.importorskip("datasets", reason="needs the extra hf: pip install -e '.[hf]'")
    config = ImageFolderConfig(path=str(cifar(root / "folders", shared_data)), image_size=16)
    splits = {}
    for split in ("train", "val"):
        source = config.build(split)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(source.classes))})
        rows = [{"image": {"bytes": source.encoded(i)[0]}, "label": source[i]["label"]} for i in range(len(source))]  # type: ignore[attr-defined]
        splits[split] = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(root / "arrow"))
    return [f"dataset.path={root / 'arrow'}"]


FORMATS = {f.__name__: f for f in (image_folder, webdataset, cub, hugging_face)}


@pytest.mark.parametrize("name", FORMATS)
def test_a_killed_run_ends_in_the_same_bits_and_two_ranks_see_what_one_sees(name: str, shared_data, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    overrides = [f"dataset={name}", *FORMATS[name](tmp_path / "data", shared_data), *RUN]
    assert finish([start(tmp_path / "unbroken", [*overrides, "dataset.num_workers=0"])]) == [0], logs(tmp_path / "unbroken")
    killed = tmp_path / "killed"
    process = start(killed, [*overrides, "dataset.num_workers=2"])
    end = time.monotonic() + 60
    while not (killed / "checkpoints" / "last.pt").exists() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    assert finish([process]) == [-signal.SIGKILL], f"the kill came too late to interrupt it\n{logs(killed)}"
    assert 0 < last(killed)["step"] < 18
    assert finish([start(killed, [*overrides, "dataset.num_workers=1"])]) == [0], logs(killed)
    assert_same_run(tmp_path / "unbroken", killed)
    ranks = tmp_path / "ranks"
    assert finish(start_ranks(ranks, [*overrides, "dataset.num_workers=0"], 2)) == [0, 0], logs(ranks)
    np.testing.assert_allclose(losses(ranks), losses(tmp_path / "unbroken"), atol=1e-4)
