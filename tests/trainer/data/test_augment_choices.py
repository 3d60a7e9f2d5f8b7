"""Every choice of the group `augmentation`: it runs, gives what it says, and is the same for any number of workers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

import trainer.launch.resolvers  # noqa: F401  (what YAML calls)
from tests.trainer.data.sources import Pictures, Rank, batches, equal, global_generators, take
from trainer.config import Facts
from trainer.config.augmentation import AugmentationConfig, Basic, Cub
from trainer.config.schemas import schemas
from trainer.data.augment.turned import Turned, cut_out_of_turned
from trainer.data.loader import validation_loader
from trainer.data.order import Order
from trainer.data.source import Sample
from trainer.random import SampleRandom
from trainer.validation import task_and_augmentation

CONF = Path(__file__).parents[3] / "conf" / "augmentation"
CHOICES = sorted(path.stem for path in CONF.glob("*.yaml"))
SINGLE = [name for name in CHOICES if name != "dino"]


class Dataset:
    image_size = 32
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]
    offers = frozenset({"image", "label"})


class Framed(Dataset):
    offers = frozenset({"image", "label", "boxes", "labels", "mask", "parts"})


class FramedPictures(Pictures):
    def __getitem__(self, index: int) -> Sample:
        image = np.zeros((40, 48, 3), np.uint8)
        image[10:20, 4:20] = 255
        return {
            "image": Image.fromarray(image), "label": 0, "mask": image[..., 0] // 255, "parts": np.array([[5, 11, 1]], np.float32),
            "boxes": np.array([[4, 10, 20, 20]] * (index % 3), np.float32).reshape(-1, 4), "labels": np.zeros(index % 3, np.int64),
        }  # fmt: skip


def configured(name: str, **changes: Any) -> AugmentationConfig:
    own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    run = OmegaConf.create(
        {"augmentation": own, "dataset": {"image_size": Dataset.image_size}, "model": {}}
    )  # some values follow from these
    values: Any = OmegaConf.to_container(run.augmentation, resolve=True)
    chosen = values.pop("defaults")[0].removesuffix("_schema")
    return schemas("augmentation")[chosen](**{**values, **changes})


def built(name: str, dataset: Any = Dataset, train: bool = True, **changes: Any) -> Any:
    return configured(name, **changes).build(dataset(), train=train)


@pytest.mark.parametrize("name", SINGLE)
def test_every_choice_gives_the_same_images_whoever_reads_them(name):
    order = Order(13, 0, 5, drop_last=False)
    before = global_generators()
    two_epochs = batches(6, order, augmentation=built(name))
    alone, again = two_epochs[:3], two_epochs[3:]
    assert global_generators() == before
    assert all(equal(a, b) for a, b in zip(alone, batches(3, order, augmentation=built(name), workers=2), strict=True))
    images = {int(i): image for b in alone for i, image in zip(b["index"], b["image"], strict=True)}
    for rank in range(2):
        for b in batches(3, order, augmentation=built(name), rank=rank, world=2):
            # The blur's convolutions may round differently in a batch of another size.
            assert not b["count"] or all(torch.allclose(x, images[int(i)], atol=1e-4) for i, x in zip(b["index"], b["image"], strict=True))
    assert alone[0]["image"].shape == (5, 3, 32, 32)
    assert alone[0]["image"].dtype == torch.float32
    differs = [not x.equal(images[int(i)]) for b in again for i, x in zip(b["index"], b["image"], strict=True)]
    assert any(differs) == (name != "none")


@pytest.mark.parametrize("name", CHOICES)
def test_validation_is_plain_and_repeats_itself(name):
    first = take(validation_loader(Pictures(), built(name, train=False), Rank(), batch_size=16, seed=1))
    again = take(validation_loader(Pictures(), built(name, train=False), Rank(), batch_size=16, seed=2))
    assert all(a["image"].equal(b["image"]) for a, b in zip(first, again, strict=True))
    assert first[0]["image"].shape == (16, 3, 32, 32)
    assert "target" not in first[0]


@pytest.mark.parametrize("name", [n for n in SINGLE if not configured(n).moves_pixels])
def test_boxes_masks_and_parts_follow_the_pixels(name):
    for batch in batches(4, Order(37, 0, 12), source=FramedPictures(), augmentation=built(name, Framed, hflip=0.5, color_jitter=None)):
        if name != "three_augment":  # which may turn white into black
            sizes = batch.get("size", [batch["image"].shape[2:]] * len(batch["image"]))  # without what pads it
            grey = batch["image"].mean(1)  # [N, H, W]
            shown = [(g[:h, :w], m[:h, :w].bool()) for g, m, (h, w) in zip(grey, batch["mask"], sizes, strict=True)]
            middle = (min(g.min() for g, _ in shown) + max(g.max() for g, _ in shown)) / 2
            wrong = sum(int(((g > middle) != m).sum()) for g, m in shown)
            assert wrong < 0.08 * sum(m.numel() for _, m in shown)
            assert int(batch["mask"].sum()) == sum(int(m.sum()) for _, m in shown), "and nothing beside the picture"
        for box, mask in zip(batch["boxes"], batch["mask"], strict=True):
            if len(box) and mask.any():
                ys, xs = torch.nonzero(mask, as_tuple=True)
                inside = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                assert (box[0].clamp(0, 32) - inside).abs().max() <= 2


def test_what_moves_pixels_otherwise_drops_what_cannot_follow():
    batch = batches(1, Order(37, 0, 12), source=FramedPictures(), augmentation=built("randaugment", Framed))[0]
    assert not {"boxes", "mask", "parts"} & batch.keys()
    assert "label" in batch


def test_mixing_gives_soft_targets_in_training_only():
    mixed = built("basic", mixup=0.2, cutmix=1.0)
    batch = batches(1, Order(37, 0, 12), augmentation=mixed, num_classes=3)[0]
    assert batch["target"].shape == (12, 3)
    assert batch["label"].dtype == torch.int64
    plain = built("basic", train=False, mixup=0.2)
    assert "target" not in take(validation_loader(Pictures(), plain, Rank(), batch_size=4, num_classes=3))[0]


def test_the_whole_image_is_squeezed_where_asked():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    pixels = built("siim_acr", hflip=0.0).sample({"image": image}, SampleRandom(0))["image"]
    assert pixels.equal(tv.resize(tv.pil_to_tensor(image), [32, 32], antialias=True))


@pytest.mark.parametrize(
    ("angle", "shift", "zoom", "corner"), [(0, (0, 0), 1.0, (3, 0)), (30, (5, -3), 1.2, (0, 0)), (-75, (-7, 2), 0.8, (8, 4))]
)
def test_turning_and_cutting_in_one_is_torchvision_s_affine_and_crop(angle, shift, zoom, corner):
    image = Image.fromarray((127 + 100 * np.sin(np.mgrid[:44, :50].sum(0)[..., None] / [4, 7, 9])).astype(np.uint8))
    untyped: Any = image
    turned: Any = tv.affine(untyped, angle, list(shift), zoom, [0.0, 0.0], InterpolationMode.BILINEAR)
    expected = turned.crop((*corner, corner[0] + 32, corner[1] + 32))
    affine = cut_out_of_turned((50, 44), angle, shift, zoom, corner)
    ours = image.transform((32, 32), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(ours, float) - np.asarray(expected, float)).mean() < 1


def test_turned_images_stay_within_their_limits():
    """A white image on a black ground: the share of ground tells how far it was turned and moved."""

    def ground(**limits: Any) -> float:
        cfg = Cub(
            hflip=0, crop_scale=None, val_crop=1.0, planckian=0.0, **{"rotation": 0.0, "translation": 0.0, "zoom": [1.0, 1.0], **limits}
        )  # pyright: ignore[reportArgumentType]
        turned = Turned(cfg, Dataset(), train=True)  # pyright: ignore[reportArgumentType]
        turned.fill = (0, 0, 0)
        image = Image.new("RGB", (60, 60), "white")
        return float(np.mean([(turned.sample({"image": image}, SampleRandom(k))["image"] < 128).float().mean() for k in range(60)]))

    assert ground() == 0
    assert 0.02 < ground(rotation=90.0) < 1 - 2 * (math.sqrt(2) - 1)  # at 45 degrees an octagon is left
    assert 0.1 < ground(translation=0.2) < 0.36
    assert ground(zoom=[1.1, 1.2]) == 0


# Several views


def test_views():
    augmentation = built("dino", local_crops=3, local_size=16)
    order = Order(37, 0, 12)
    a = batches(2, order, augmentation=augmentation)
    b = batches(2, order, augmentation=built("dino", local_crops=3, local_size=16), workers=2)
    assert all(equal(x, y) for x, y in zip(a, b, strict=True))
    assert a[0]["image"].shape == (12, 2, 3, 32, 32)
    assert a[0]["local"].shape == (12, 3, 3, 16, 16)
    views = [a[0]["image"][:, 0], a[0]["image"][:, 1]]
    assert not any(x.equal(y) for x, y in zip(*views, strict=True))
    assert "local" not in batches(1, order, augmentation=built("dino", local_crops=0))[0]


def test_each_view_has_its_own_probabilities():
    def views(**changes: Any) -> dict[str, Any]:
        calm = {"hflip": 0.0, "color_jitter": None, "grayscale": 0.0, "blur": [0.0] * 3, "solarize": [0.0] * 3}
        return batches(1, Order(7, 0, 6), augmentation=built("dino", local_crops=2, local_size=16, **{**calm, **changes}))[0]

    plain = views()
    for field in ("blur", "solarize"):
        for view in range(3):
            changed = views(**{field: [float(i == view) for i in range(3)]})
            found = [changed["image"][:, 0], changed["image"][:, 1], changed["local"]]
            before = [plain["image"][:, 0], plain["image"][:, 1], plain["local"]]
            assert [not x.equal(y) for x, y in zip(found, before, strict=True)] == [i == view for i in range(3)]


# The config


def test_problems():
    def problems(name: str, **changes: Any) -> list[str]:
        return [p.key for p in configured(name, **changes).problems()]

    assert all(problems(name) == [] for name in CHOICES)
    assert problems("basic", crop_scale=[1.0, 0.1]) == ["augmentation.crop_scale"]
    assert problems("basic", color_jitter=[0.1, 0.1, 0.1, 0.7]) == ["augmentation.color_jitter[3]"]
    assert problems("cub", zoom=[1.2, 0.8]) == ["augmentation.zoom"]
    assert problems("dino", mixup=0.2, crop_scale=None, local_scale=[0.5, 0.1]) == [
        "augmentation.local_scale", "augmentation.crop_scale", "augmentation.mixup",
    ]  # fmt: skip


def test_a_choice_says_whether_it_needs_colour():
    assert configured("cub").changes_colour
    assert not configured("basic").changes_colour
    assert Basic(hflip=0, crop_scale=None, val_crop=1, grayscale=0.1).changes_colour


def test_a_task_gets_the_views_it_wants_and_loses_nothing_it_learns_from():
    def problems(name: str, *, views: bool = False, needs: str = "label", channels: int = 3) -> list[str]:
        run: Any = SimpleNamespace(augmentation=configured(name), task=SimpleNamespace(views=views, needs=frozenset({"image", needs})))
        return [p.reason for p in task_and_augmentation(run, Facts(channels=channels))]

    assert problems("basic") == problems("cub") == problems("dino", views=True) == problems("basic", channels=5) == []
    assert "gives several views" in problems("dino")[0]
    assert "gives one view" in problems("basic", views=True)[0]
    assert "boxes cannot follow" in problems("randaugment", needs="boxes")[0]
    assert "5 channels" in problems("three_augment", channels=5)[0]


@pytest.mark.parametrize("name", CHOICES)
def test_the_device_s_part_never_waits_for_the_device(name):
    """On tensors without values: whoever asked for one, or mixed in something from the host's memory, would be refused."""

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    everything: dict[str, Any] = {} if name == "dino" else {"mixup": 0.2, "cutmix": 1.0, "erasing": 0.3}
    augmentation = built(name, hflip=0.5, color_jitter=[0.4, 0.4, 0.2, 0.1], grayscale=0.2, **everything)
    augmentation.num_classes = 3
    views = {"image": empty(4, 2, 3, 32, 32), "local": empty(4, 8, 3, 16, 16)} if name == "dino" else {"image": empty(4, 3, 32, 32)}
    batch = augmentation.batch({**views, "label": empty(4, dtype=torch.int64), "key": empty(4, dtype=torch.int64)})
    assert batch["image"].device.type == "meta"
    assert batch["image"].dtype == torch.float32
    assert name == "dino" or batch["target"].shape == (4, 3)
