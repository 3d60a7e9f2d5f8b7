"""The verbs that work on a trained run: what they say is what was measured, by other means too."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from tests.test_exact import MODELS, run
from trainer import load_model
from trainer.errors import ConfigError, DataError, StorageError
from trainer.launch import evaluate, predict
from trainer.launch.compose import compose_run
from trainer.rundir import RunDirectory

NETWORK = [*MODELS["vit"], "dataset.num_workers=0", "loop.ema_decay=0.5"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small transformer that has seen 1,200 digits. Read only: tests that write copy it."""
    directory = tmp_path_factory.mktemp("runs") / "s0-00000000"
    run(directory, *NETWORK, "loop.samples_per_epoch=400", "optimizer.lr=1e-3", "loop.log_every=25")
    return directory


@pytest.fixture(scope="module")
def truth(trained: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N] and probabilities [N, C] of the validation set, by `load_model` alone."""
    model: Any = load_model(trained)
    source = compose_run(*NETWORK).dataset.build("val")
    with torch.inference_mode():
        logits = model(model.transform([source[i]["image"] for i in range(len(source))]))
    labels = source.labels()
    assert labels is not None
    return labels, logits.softmax(1).numpy()


def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / trained.name))


def measured(directory: Path, *words: str) -> tuple[dict[str, Any], Path]:
    """The scores, and where the answer lies."""
    assert evaluate.main([str(directory), *words, "--name", "it"]) == 0
    out = directory / "evaluations" / "it"
    return json.loads((out / "scores.json").read_text()), out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_everything_is_measured_and_written(trained, truth, tmp_path, capsys):
    directory = copied(trained, tmp_path)
    labels, probabilities = truth
    scores, out = measured(directory)
    assert scores["num_samples"] == len(labels) == 359, "a limit that saved time in training is none here"
    assert scores["val/top1"] == pytest.approx((probabilities.argmax(1) == labels).mean(), abs=1e-12)
    assert scores["val/loss"] == pytest.approx(-np.log(probabilities[np.arange(len(labels)), labels]).mean(), rel=1e-5)
    predictions = rows(out / "predictions.csv")
    assert [int(r["predicted"]) for r in predictions] == probabilities.argmax(1).tolist()
    assert [float(r["confidence"]) for r in predictions] == pytest.approx(probabilities.max(1).tolist(), abs=1e-5)
    assert predictions[3]["file"] == compose_run(*NETWORK).dataset.build("val").name(3)
    counts = [[int(r[str(c)]) for c in range(10)] for r in rows(out / "confusion.csv")]
    assert counts == confusion_matrix(labels, probabilities.argmax(1), labels=range(10)).tolist()
    for c, row in enumerate(rows(out / "classes.csv")):
        assert float(row["recall"]) == pytest.approx((probabilities.argmax(1) == labels)[labels == c].mean())
    with Image.open(out / "confusion.png") as picture:
        assert picture.width > 300
    said = capsys.readouterr().out
    assert f"{100 * scores['val/top1']:.2f} %" in said and "mistaken for" in said and str(out) in said


def test_the_runs_own_validation_is_repeated_to_the_last_bit(trained, tmp_path):
    directory = copied(trained, tmp_path)
    scores, _ = measured(directory, "loop.max_validation_batches=2")
    best = json.loads((directory / "result.json").read_text())["best"]
    assert {k: v for k, v in scores.items() if k.startswith("val/")} == {
        k: v for k, v in best.items() if k.startswith("val/") and k != "val/seconds"
    }


def test_two_ranks_measure_what_one_does(trained, tmp_path, monkeypatch):
    directory = copied(trained, tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    two, out = measured(directory, "loop.batch_size=60", "distributed=local", "distributed.processes=2")
    assert [int(r["index"]) for r in rows(out / "predictions.csv")] == list(range(359)), "each once, whichever rank had it"
    one, _ = measured(directory, "loop.batch_size=30")
    assert {k: v for k, v in one.items() if k.startswith("val/")} == pytest.approx(
        {k: v for k, v in two.items() if k.startswith("val/")}, rel=1e-6
    )


def test_only_some_classes_compete(trained, truth, tmp_path):
    directory = copied(trained, tmp_path)
    labels, probabilities = truth
    scores, out = measured(directory, "classes=3,5,8")
    mine = np.isin(labels, [3, 5, 8])
    best = np.array([3, 5, 8])[probabilities[mine][:, [3, 5, 8]].argmax(1)]
    assert scores["val/top1"] == pytest.approx((best == labels[mine]).mean())
    assert scores["num_samples"] == mine.sum() and {r["predicted"] for r in rows(out / "predictions.csv")} <= {"3", "5", "8"}
    (tmp_path / "names.txt").write_text("3\n5\n8\n")
    assert measured(directory, f"classes={tmp_path / 'names.txt'}")[0]["val/top1"] == scores["val/top1"]


def folder(root: Path, truth: tuple[np.ndarray, np.ndarray], classes: list[str]) -> list[int]:
    """The validation images of some classes as files, one folder a class; their rows."""
    source, chosen = compose_run(*NETWORK).dataset.build("val"), []
    for i, label in enumerate(truth[0]):
        if str(label) in classes:
            (root / str(label)).mkdir(parents=True, exist_ok=True)
            source[i]["image"].save(root / str(label) / f"{i:04d}.png")
            chosen.append(i)
    return chosen


@pytest.mark.parametrize("layout", ["flat", "val"])
def test_other_data_with_fewer_classes_are_matched_by_name(layout, trained, truth, tmp_path):
    """Folders 7 and 9 are labels 0 and 1 of their own data set, and 7 and 9 of the network."""
    directory = copied(trained, tmp_path)
    chosen = folder(tmp_path / "images" / ("val" if layout == "val" else ""), truth, ["7", "9"])
    scores, out = measured(directory, "dataset=image_folder", f"dataset.path={tmp_path / 'images'}")
    labels, probabilities = truth[0][chosen], truth[1][chosen]
    assert scores["val/top1"] == pytest.approx((probabilities.argmax(1) == labels).mean())
    assert scores["image_size"] == 16, "what the network is used to, not what the other data come with"
    assert {r["label"] for r in rows(out / "predictions.csv")} == {"7", "9"}


def test_another_size_resamples_what_follows_from_it(trained, tmp_path):
    directory = copied(trained, tmp_path)
    scores, _ = measured(directory, "dataset.image_size=24")
    assert scores["image_size"] == 24 and scores["val/top1"] > 0.15


@pytest.mark.parametrize("views", ["flip", "crops"])
def test_views_of_an_image_are_averaged(views, trained, truth, tmp_path):
    directory = copied(trained, tmp_path)
    scores, out = measured(directory, f"task.tta={views}")
    if views == "flip":
        model: Any = load_model(trained)
        source = compose_run(*NETWORK).dataset.build("val")
        with torch.inference_mode():
            images = model.transform([source[i]["image"] for i in range(len(source))])
            mean = (model(images).softmax(1) + model(images.flip(-1)).softmax(1)) / 2
        assert scores["val/top1"] == pytest.approx((mean.argmax(1).numpy() == truth[0]).mean())
        assert [float(r["confidence"]) for r in rows(out / "predictions.csv")] == pytest.approx(mean.max(1).values.tolist(), abs=1e-5)
    assert 0 < scores["val/top1"] < 1


def test_every_label_that_is_right_counts(trained, truth, tmp_path):
    directory = copied(trained, tmp_path)
    labels, probabilities = truth
    source = compose_run(*NETWORK).dataset.build("val")
    names = [source.name(i) for i in range(len(labels))]
    right = {Path(name).name: [] if i % 3 == 0 else ["3", int(label)] for i, (name, label) in enumerate(zip(names, labels, strict=True))}
    (tmp_path / "real.json").write_text(json.dumps(right))
    scores, _ = measured(directory, f"real_labels={tmp_path / 'real.json'}")
    kept = np.arange(len(labels)) % 3 != 0
    best = probabilities.argmax(1)
    assert scores["val/real_top1"] == pytest.approx(((best == labels) | (best == 3))[kept].mean())
    (tmp_path / "list.json").write_text(json.dumps([right[name] for name in sorted(right)]))
    assert measured(directory, f"real_labels={tmp_path / 'list.json'}")[0]["val/real_top1"] == scores["val/real_top1"]


def test_the_default_name_tells_questions_apart(trained):
    before = RunDirectory(trained).read_config()
    plain = {"checkpoint": "best", "split": "val", "classes": "", "real_labels": ""}

    def name(*overrides: str, **own: str) -> str:
        return evaluate.default_name(before, evaluate.checked(before, overrides), plain | own)

    assert name() == "best" and name(checkpoint="last") == "last" and name("dataset.num_workers=2") == "best"
    assert len({name(), name("task.tta=flip"), name("dataset.image_size=24"), name(split="train"), name(classes="1,2")}) == 5


BAD = {
    "no key": (["task.labelsmoothing=1"], "task.labelsmoothing=1: there is no such key"),
    "another architecture": (["model=resnet50"], "model=resnet50: the weights are those of the run's own"),
    "a part of it": (["model.patch_size=8"], "the weights are those of the run's own"),
    "another task": (["task=classification"], "the weights are those of the run's own"),
    "a whole recipe": (["debug=tiny"], "for a run that is yet to begin"),
    "no split": (["split=test"], "split=test: is train or val"),
    "no checkpoint": (["checkpoint=epoch-0099"], "checkpoint=epoch-0099: .*epoch-0003, last"),
    "no class": (["classes=7,eleven"], "the network knows no class eleven"),
    "no data": (["dataset=image_folder", "dataset.path=nowhere"], "dataset.path=nowhere: no such directory"),
    "no labels": (["dataset=digit_scenes"], "dataset=DigitScenesConfig: its samples have no label"),
    "a size that does not fit": (["dataset.image_size=18"], "dataset.image_size=18: .*multiple of 4"),
    "no real labels": (["real_labels=nowhere.json"], "real_labels=nowhere.json: cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_questions_are_told_with_a_way_out(case, trained):
    arguments, message = BAD[case]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        evaluate.main([str(trained), *arguments])


def test_data_with_classes_that_the_network_does_not_know(trained, tmp_path):
    for name in ("7", "seven"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / name / "a.png")
    with pytest.raises(ConfigError, match="1 classes that the network does not know: seven"):
        evaluate.main([str(trained), "dataset=image_folder", f"dataset.path={tmp_path / 'images'}"])


@pytest.mark.parametrize("verb", [evaluate.main, lambda arguments: predict.main([*arguments, "."])], ids=["evaluate", "predict"])
def test_a_directory_that_is_no_run_or_has_no_weights(verb, trained, tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        verb([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match=f"no such directory\n    try: .*{trained.name}"):
        verb([str(trained)[:-1] + "1"])
    with pytest.raises(ConfigError, match=r"holds no config\.yaml, so it is not a run"):
        verb([str(tmp_path)])
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained / "config.yaml", bare)
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        verb([str(bare)])
    damaged = copied(trained, tmp_path)
    (damaged / "checkpoints" / "best.pt").write_bytes(b"torn")
    with pytest.raises(StorageError, match="has changed since it was written"):
        verb([str(damaged)])


def test_a_checkpoint_that_has_other_keys(trained, tmp_path):
    """As after an edit of the network's code: said with the names, not loaded in part."""
    directory = copied(trained, tmp_path)
    content = torch.load(directory / "checkpoints" / "best.pt", weights_only=True)
    for kind in ("task", "ema"):
        content[kind]["model.extra.weight"] = content[kind].pop("model.head.weight")
    torch.save(content, directory / "checkpoints" / "edited.pt")
    with pytest.raises(ConfigError, match=r"missing: model\.head\.weight.*unknown: model\.extra\.weight"):
        evaluate.main([str(directory), "checkpoint=edited"])


# --- predict ------------------------------------------------------------------------------------------------------------


def test_images_of_a_folder(trained, truth, tmp_path, capsys):
    chosen = folder(tmp_path / "images", truth, ["2", "4"])[:20]
    for path in sorted((tmp_path / "images").rglob("*.png"))[20:]:
        if int(path.stem) not in chosen:
            path.unlink()
    (tmp_path / "images" / "broken.jpg").write_bytes(b"not a picture")
    (tmp_path / "images" / "notes.txt").write_text("no picture either")
    assert predict.main([str(trained), str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--sheet", "9"]) == 0
    table = rows(tmp_path / "out" / "predictions.csv")
    found = {Path(r["file"]).stem: r for r in table}
    assert "not an image" in found.pop("broken")["error"] and {r["file"] for r in table} >= {f"{truth[0][chosen[0]]}/{chosen[0]:04d}.png"}
    assert len(table) == len(found) + 1, "a row for each image, those that cannot be read too"
    for stem, row in found.items():
        share = truth[1][int(stem)]
        assert row["predicted"] == str(share.argmax()) and float(row["confidence"]) == pytest.approx(share.max(), abs=1e-5)
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.height > 150
    assert "1 cannot be read" in capsys.readouterr().out


def test_one_image_and_some_classes(trained, truth, tmp_path):
    chosen = folder(tmp_path / "images", truth, ["2"])
    path = tmp_path / "images" / "2" / f"{chosen[0]:04d}.png"
    predict.main([str(trained), str(path), "classes=4,6", "--out", str(tmp_path / "out")])
    (row,) = rows(tmp_path / "out" / "predictions.csv")
    share = truth[1][chosen[0]][[4, 6]]
    assert row["predicted"] == "46"[share.argmax()] and float(row["confidence"]) == pytest.approx((share / share.sum()).max(), abs=1e-4)


def test_folders_with_nothing_to_see(trained, tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder or image"):
        predict.main([str(trained), str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no images"):
        predict.main([str(trained), str(tmp_path / "empty")])
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)none of the 1 images .*the file is empty") as caught:
        predict.main([str(trained), str(tmp_path / "empty"), "--out", str(tmp_path / "out")])
    assert caught.value.exit_code == 3


def test_boxes_are_drawn_and_counted():
    found = [
        {"class": "car", "score": 0.75, "x1": 2, "y1": 2, "x2": 12, "y2": 12},
        {"class": "bus", "score": 0.5, "x1": 0, "y1": 0, "x2": 1, "y2": 1},
    ]
    picture = np.zeros((16, 16, 3), dtype=np.uint8)
    sheet = np.asarray(predict.contact_sheet([(picture, found), (picture, [])]))
    assert (sheet == [255, 0, 0]).all(-1).sum() > 100
    assert predict.caption(found) == "car 0.75 +1" and predict.caption([]) == "nothing"
