"""What `load_model` gives back is the network that was validated, fed what it was validated on."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import trainer
from tasks.classification.config import ClassificationConfig
from trainer import load_model
from trainer.checkpoint import CheckpointError, Writer
from trainer.config import DebugConfig, LoggerConfig, LoopConfig, Mode, PrecisionConfig, RunConfig, SchedulerConfig
from trainer.config.augmentation import Basic
from trainer.config.loop import Progressing
from trainer.config.model import TimmModel
from trainer.config.optimizer import AdamW
from trainer.config.plain import to_plain
from trainer.config.run import DistributedConfig
from trainer.config.scheduler import Constant
from trainer.data.loader import validation_loader
from trainer.data.schemas.embedded import DigitsConfig, SyntheticConfig
from trainer.data.schemas.folders import ImageFolderConfig
from trainer.ema import Ema
from trainer.errors import ConfigError, DataError
from trainer.rundir import RunDirectory
from trainer.state import TrainState, portrait
from trainer.task import DataInfo

TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2}


@dataclass
class Alone:
    rank = 0
    size = 1
    device = torch.device("cpu")


def a_run(tmp_path: Path, dataset=None) -> RunConfig:
    return RunConfig(
        name="trial",
        version="s0",
        runs_dir=str(tmp_path),
        task=ClassificationConfig(),
        model=TimmModel(name="vit_tiny_patch16_224", patch_size=8, args=TINY),
        dataset=dataset or DigitsConfig(image_size=32, mean=[0.3] * 3, std=[0.4] * 3),
        augmentation=Basic(hflip=0.5, crop_scale=[0.5, 1.0], val_crop=0.875),
        optimizer=AdamW(lr=1e-3, weight_decay=0.05),
        scheduler=SchedulerConfig(),
        precision=PrecisionConfig(autocast=None, tf32=False),
        distributed=DistributedConfig(mode=Mode.auto),
        loop=LoopConfig(),
        logger=LoggerConfig(),
        debug=DebugConfig(),
    )


def save_run(run: RunConfig, path: Path, *, ema: bool = False) -> tuple[nn.Module, Path]:
    """A run directory as training leaves it, without training: random weights. Returns the network that was saved."""
    source = run.dataset.build("train")
    info = DataInfo(len(source), 10, source.classes, source.channels, 10.0, 20)
    torch.manual_seed(3)
    task = run.task.build(run, info)
    average = Ema(task, 0.5) if ema else None
    if average is not None:
        with torch.no_grad():
            for tensor in average.averages:
                tensor.add_(0.25)
    state = TrainState(
        task, [run.optimizer.build([{"params": list(task.parameters()), "lr": 1e-3, "weight_decay": 0.0}])], None, average, step=7
    )
    directory = RunDirectory(path)
    directory.write_config(run)
    with Writer(directory.checkpoints) as writer:
        writer.save({**state.state_dict(), **portrait(to_plain(run), info)}, ["last", "best"])
    if average is not None:
        for name, tensor in average.state_dict().items():
            task.state_dict()[name].copy_(tensor)
    return task.network().eval(), directory.path


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ema", [False, True])
def test_the_weights_are_those_that_were_validated(tmp_path, images, ema):
    network, path = save_run(a_run(tmp_path), tmp_path / "r", ema=ema)
    model: Any = load_model(path)
    assert isinstance(model, nn.Module) and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), network.state_dict().values()))
    with torch.no_grad():
        assert torch.equal(model(images), network(images))
    assert model.classes == list("0123456789")


def test_a_file_alone_is_enough(tmp_path, images):
    network, path = save_run(a_run(tmp_path), tmp_path / "r")
    shutil.move(path / "checkpoints" / "best.pt", tmp_path / "alone.pt")
    shutil.rmtree(path)
    model: Any = load_model(tmp_path / "alone.pt")
    with torch.no_grad():
        assert torch.equal(model(images), network(images))


def test_which_checkpoint(tmp_path, caplog):
    _, path = save_run(a_run(tmp_path), tmp_path / "r")
    for name in ("best", "last", path / "checkpoints" / "last.pt"):
        load_model(path, checkpoint=name)
    load_model(path / "checkpoints", checkpoint="last")
    with pytest.raises(ConfigError, match="best, last"):
        load_model(path, checkpoint="epoch-0003")
    (path / "checkpoints" / "best.pt").unlink()
    load_model(path)
    assert "last.pt" in caplog.text  # said, not silent
    with pytest.raises(ConfigError, match="no such run"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no checkpoints"):
        load_model(tmp_path / "empty")
    torch.save({"weights": torch.ones(1)}, tmp_path / "foreign.pt")
    with pytest.raises(ConfigError, match="init_from"):
        load_model(tmp_path / "foreign.pt")
    (path / "checkpoints" / "last.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="changed"):
        load_model(path, checkpoint="last")


def test_nothing_is_fetched_and_no_random_number_is_used_up(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    _, path = save_run(run, tmp_path / "r")
    pretrained = replace(run, model=replace(run.model, pretrained=True))  # type: ignore[call-arg]
    content = torch.load(path / "checkpoints" / "best.pt", weights_only=True)
    torch.save({**content, "config": to_plain(pretrained)}, tmp_path / "pretrained.pt")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_model(tmp_path / "pretrained.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_that_has_changed_since_is_named(tmp_path):
    _, path = save_run(a_run(tmp_path), tmp_path / "r")
    content = torch.load(path / "checkpoints" / "best.pt", weights_only=True)
    del content["task"]["model.pos_embed"]
    torch.save(content, tmp_path / "less.pt")
    with pytest.raises(ConfigError, match="pos_embed"):
        load_model(tmp_path / "less.pt")


def folder_of_jpegs(root: Path) -> Path:
    """Two classes of photographs-like pictures, large enough to be decoded at a smaller scale."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((320 - 40 * i, 240), Image.Resampling.BICUBIC).save(root / split / name / f"{i}.jpg")
    return root


@pytest.fixture(params=["digits", "five channels", "one channel", "jpegs"])
def dataset(request, tmp_path):
    if request.param == "digits":
        return DigitsConfig(image_size=32, mean=[0.3] * 3, std=[0.4] * 3)
    if request.param == "jpegs":
        return ImageFolderConfig(path=str(folder_of_jpegs(tmp_path / "data")), image_size=32)
    channels = 5 if request.param == "five channels" else 1
    return SyntheticConfig(
        image_size=32, num_train=20, num_val=10, channels=channels, source_size=48, mean=[0.5] * channels, std=[0.25] * channels
    )


def test_preprocessing_is_validations(tmp_path, dataset):
    _, path = save_run(a_run(tmp_path, dataset), tmp_path / "r")
    model: Any = load_model(path)
    source = dataset.build("val")
    augmentation = a_run(tmp_path, dataset).augmentation.build(dataset, train=False)
    loader = validation_loader(source, augmentation, Alone(), batch_size=4, num_classes=len(source.classes))
    for batch in loader:
        expected = batch["image"].clone()
        pictures = [source[i]["image"] for i in batch["index"].tolist()]
        if isinstance(dataset, ImageFolderConfig):  # validation decodes large JPEGs at a smaller scale
            assert (model.transform(pictures) - expected).abs().mean() < 0.2  # as close as the two decoders
            names = [source.name(i) for i in batch["index"].tolist()]
            assert torch.equal(model.transform(names), expected)
            pictures = [Image.open(io.BytesIO(Path(name).read_bytes())) for name in names]  # opened, not decoded
            assert torch.equal(model.transform(pictures), expected)
            continue
        assert torch.equal(model.transform(pictures), expected)  # many at once
        assert torch.equal(model.transform(pictures[0]), expected[:1])  # one
        assert torch.equal(model.transform([np.asarray(picture) for picture in pictures]), expected)
        cut = torch.stack([torch.as_tensor(augmentation.sample({"image": p}, None)["image"]) for p in pictures])  # type: ignore[arg-type]
        assert torch.equal(model.transform({"image": cut, "label": batch["label"]}), expected)
        assert torch.equal(model.transform(cut), expected)
        with torch.no_grad():
            assert model(model.transform(pictures)).shape == (len(pictures), len(source.classes))


def test_pictures_in_other_modes(tmp_path):
    _, path = save_run(a_run(tmp_path), tmp_path / "r")
    model: Any = load_model(path)
    transform = model.transform
    grey = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32).astype(np.uint8)
    expected = transform(Image.fromarray(grey).convert("RGB"))
    for same in (Image.fromarray(grey), grey, grey[..., None], np.stack([grey] * 3, -1)):
        assert torch.equal(transform(same), expected)
    with pytest.raises(ConfigError, match="3 channel"):
        transform(np.zeros((8, 8, 5), np.uint8))
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(DataError, match=r"text\.jpg"):
        transform(tmp_path / "text.jpg")


def test_importing_trainer_imports_no_torch():
    code = "import sys, trainer; assert 'torch' not in sys.modules; from trainer import load_model; assert 'torch' in sys.modules; print(load_model.__name__)"
    root = Path(trainer.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ, capture_output=True, text=True)
    assert done.stdout == "load_model\n", done.stderr
    with pytest.raises(AttributeError, match="nonsense"):
        trainer.nonsense


def test_a_trained_run_predicts_what_its_result_says(tmp_path):
    """The whole way: train with an average, load, predict the validation set by hand; then start another run from it."""
    from trainer.run import train

    data = SyntheticConfig(image_size=16, num_classes=4, num_train=64, num_val=50, mean=[0.5] * 3, std=[0.25] * 3, num_workers=0)
    run = a_run(tmp_path, data)
    run.augmentation = Basic(hflip=0.0, crop_scale=None, val_crop=1.0)
    run.scheduler = Constant()
    run.loop = LoopConfig(epochs=2, batch_size=16, ema_decay=0.5, progress=Progressing.none)
    run.logger = LoggerConfig(plots=False)
    directory = RunDirectory(tmp_path / "first")
    result = train(run, directory)
    assert {p.name for p in directory.checkpoints.iterdir()} >= {"last.pt", "best.pt", "epoch-0002.pt", "model.safetensors"}
    source = data.build("val")
    for which in ("best", "last"):
        model: Any = load_model(directory.path, checkpoint=which)
        with torch.inference_mode():
            predicted = model(model.transform([source[i]["image"] for i in range(len(source))])).argmax(1)
        hits = (predicted == torch.tensor(source.labels())).double().mean().item()
        assert hits == pytest.approx(result[which]["val/top1"], abs=1e-6)

    second = replace(
        run, init_from=str(directory.path), optimizer=replace(run.optimizer, lr=1e-9), loop=replace(run.loop, epochs=None, steps=1)
    )
    continued = train(second, RunDirectory(tmp_path / "second"))
    assert continued["last"]["val/loss"] == pytest.approx(result["best"]["val/loss"], abs=1e-5)  # the average began there too
