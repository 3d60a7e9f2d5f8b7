"""Shifted images: the padded random crop of small-image recipes, by each sample's own key."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.augment.mixing import shift
from trainer.launch.compose import checked, compose

N, SIZE, REACH = 200, 8, 1


def images() -> Tensor:
    return torch.randint(0, 256, (N, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_it_is_a_window_of_the_image_padded_by_reflection() -> None:
    before, keys = images(), torch.arange(N) * 7919
    after = shift(before, keys, REACH / SIZE)
    padded = F.pad(before.float(), (REACH,) * 4, mode="reflect").to(torch.uint8)
    windows = [padded[:, :, y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)]
    matches = torch.stack([(w == after).flatten(1).all(1) for w in windows])  # [9, N]
    assert matches.any(0).all() and after.dtype == torch.uint8
    counts = matches.sum(1)
    assert (counts > N / 9 / 3).all(), "every place comes about equally often"


def test_it_belongs_to_the_sample_and_not_to_its_batch() -> None:
    before, keys = images(), torch.arange(N) * 7919
    whole = shift(before, keys, 0.25)
    assert torch.equal(whole[50:60], shift(before[50:60], keys[50:60], 0.25))
    assert torch.equal(shift(before, keys, 0.01), before), "less than half a pixel"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["augmentation=cub", "augmentation.shift=0.1"], "augmentation.shift"),
        (["task=classification", "dataset=digit_scenes", "augmentation.shift=0.6"], "augmentation.shift"),
    ],
)
def test_where_it_makes_no_sense(overrides: list[str], key: str) -> None:
    from trainer.validation import problems_of

    run, problems = checked(compose(overrides))
    assert run is not None
    assert key in {p.key for p in [*problems, *problems_of(run)]}
