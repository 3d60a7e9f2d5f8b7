"""Every term of part discovery's loss against values worked out by hand, and the maps they are computed on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.part_discovery import losses
from tasks.part_discovery import maps as m
from tasks.part_discovery.turning import Turn, draw_turn

LOG2 = math.log(2)


def maps(*planes: list[list[float]]) -> Tensor:
    """[1, P, h, w] of one plane a part."""
    return torch.tensor(planes)[None]


def one_hot(owner: Tensor, parts: int) -> Tensor:
    """[N, P, h, w] of [N, h, w]."""
    return F.one_hot(owner, parts).movedim(-1, 1).float()


# Orthogonality


@pytest.mark.parametrize(("axis", "orthogonal", "identical"), [("parts", 0.0, 72 / 81), ("channels", 759 / 768**2, 1 - 1 / 768)])
def test_orthogonality_has_its_closed_values(axis, orthogonal, identical):
    """Nine parts of 768 channels: 0 and 0.8889 as meant; 0.00129 and 0.9987 on the axis that the published code takes."""
    apart = torch.eye(9, 768)[None] * torch.arange(1, 10).view(1, 9, 1)  # lengths do not count
    assert losses.orthogonality(apart, axis=axis).item() == pytest.approx(orthogonal, abs=1e-7)
    alike = torch.randn(1, 1, 768, generator=torch.Generator().manual_seed(0)).expand(2, 9, 768)
    assert losses.orthogonality(alike, axis=axis).item() == pytest.approx(identical, abs=1e-5)
    assert identical == pytest.approx({"parts": 0.8889, "channels": 0.9987}[axis], abs=5e-5)


def test_orthogonality_of_two_parts_at_an_angle():
    """cos = 0.6 between two of two: the Gram matrix differs from the identity by 0.6 twice, so 2 * 0.36 / 4."""
    assert losses.orthogonality(torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])).item() == pytest.approx(0.18)


# Presence

PEAK = [[0.9] * 5 for _ in range(5)]  # its 3 x 3 means are 0.9
SPOT = [[0.0] * 5, [0.0] * 5, [0.0, 0.0, 0.9, 0.0, 0.0], [0.0] * 5, [0.0] * 5]  # 0.9 in one place: means up to 0.1
NONE = [[0.0] * 5 for _ in range(5)]


def two_images() -> Tensor:
    """Part 0 peaks at 0.9 in the first image and 0.1 in the second, part 1 at 0.1 and 0."""
    return torch.cat([maps(PEAK, SPOT, NONE), maps(SPOT, NONE, NONE)])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("original", 1 - (0.9 + 0.1) / 2),
        ("soft_constraint", ((1 - 0.9) * (0.9 * 0.9 + 0.1) + (1 - 0.1) * (0.9 * 0.1 + 0.1)) / 2),
        ("tanh", -(math.log(math.tanh(0.9 + 0.1)) + math.log(math.tanh(0.1 + 0.0))) / 2),
        ("soft_tanh", 1 - (math.tanh(0.9 + 0.1) + math.tanh(0.1 + 0.0)) / 2),
    ],
)
def test_presence_looks_for_each_part_in_the_whole_batch(kind, value):
    assert losses.presence(two_images(), kind).item() == pytest.approx(value, abs=1e-6)


def test_soft_constraint_scales_the_gradient_only():
    """The factor is held fixed: the derivative by the peak is -(0.9 m + 0.1) / K, spread over the nine places of the mean."""
    x = two_images().requires_grad_()
    losses.presence(x, "soft_constraint").backward()
    assert x.grad is not None
    assert x.grad[0, 1].sum().item() == pytest.approx(-(0.9 * 0.1 + 0.1) / 2, rel=1e-5)


def test_presence_ignores_the_background():
    changed = two_images()
    changed[:, -1] = 0.7
    for kind in ("original", "soft_constraint", "tanh", "soft_tanh"):
        assert losses.presence(changed, kind) == losses.presence(two_images(), kind)


def test_enforced_presence_asks_for_background_at_the_border():
    """5 x 5 maps have 3 x 3 means; their weights are 1 in the corners, 1/2 beside them, 0 in the middle."""
    assert losses.border(torch.zeros(3, 3)).tolist() == [[1, 0.5, 1], [0.5, 0, 0.5], [1, 0.5, 1]]
    corner, middle = torch.zeros(1, 2, 5, 5), torch.zeros(1, 2, 5, 5)
    corner[0, 1, :2, :2] = 0.9  # the corner's mean is 4 * 0.9 / 9 = 0.4
    middle[0, 1, 2, 2] = 0.9  # every mean is 0.1, also the corners'
    assert losses.enforced_presence(corner, "enforced_presence").item() == pytest.approx(-math.log(0.4), abs=1e-6)
    assert losses.enforced_presence(middle, "enforced_presence").item() == pytest.approx(-math.log(0.1), abs=1e-6)
    both = losses.enforced_presence(torch.cat([corner, middle]), "enforced_presence").item()
    assert both == pytest.approx(-(math.log(0.4) + math.log(0.1)) / 2, abs=1e-6)


@pytest.mark.parametrize(("kind", "value"), [("log", -math.log(0.25)), ("linear", 0.75), ("mse", 0.5625)])
def test_enforced_presence_anywhere(kind, value):
    x = torch.zeros(1, 2, 4, 4)
    x[0, 1, 1:3, 1:3] = 1  # a quarter of the places
    assert losses.enforced_presence(x, kind).item() == pytest.approx(value, abs=1e-6)


def test_losses_stay_finite_where_there_is_nothing():
    x = torch.zeros(1, 2, 4, 4, requires_grad=True)
    total = losses.enforced_presence(x, "log") + losses.presence(x, "tanh") + losses.entropy(x) + losses.concentration(x)
    total.backward()
    assert total.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


# Smoothness, entropy, concentration, equivariance


def test_total_variation_of_a_step_and_of_a_point():
    """A vertical edge of height 4 and step 1 in both maps: 8 differences over 16 places. A point inside: four neighbours."""
    step = torch.zeros(4, 4, dtype=torch.int64)
    step[:, 2:] = 1
    assert losses.total_variation(one_hot(step[None], 2)).item() == pytest.approx(2 * 4 / 16)
    point = torch.zeros(4, 4, dtype=torch.int64)
    point[1, 1] = 1
    assert losses.total_variation(one_hot(point[None], 2)).item() == pytest.approx(2 * 4 / 16)
    both = one_hot(torch.stack([step, torch.zeros_like(step)]), 2)
    assert losses.total_variation(both).item() == pytest.approx(2 * 4 / 16 / 2), "a mean over images"


def test_entropy_of_certain_and_of_undecided_places():
    assert losses.entropy(one_hot(torch.zeros(1, 2, 2, dtype=torch.int64), 4)).item() == 0
    assert losses.entropy(torch.full((2, 4, 3, 3), 0.25)).item() == pytest.approx(2 * LOG2)
    half = torch.cat([torch.full((1, 2, 1, 1), 0.5), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)], dim=3)
    assert losses.entropy(half).item() == pytest.approx(LOG2 / 2), "a mean over places"


def test_concentration_is_the_variance_of_a_part():
    """Two places, two columns of four apart: each is 1/4 of the width from the middle, so 2 * (1/16) over 16 places."""
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 1, 1] = x[0, 0, 1, 3] = 1
    assert losses.concentration(x).item() == pytest.approx(2 * (1 / 4) ** 2 / 16)
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 2, 1] = 1
    assert losses.concentration(x).item() == pytest.approx(0, abs=1e-12)


def test_equivariance_is_one_less_the_mean_cosine():
    a = maps([[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]])
    b = maps([[3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]], [[9.0, 0.0], [0.0, 0.0]])
    assert losses.equivariance(a, a).item() == pytest.approx(0, abs=1e-6)
    assert losses.equivariance(a, b).item() == pytest.approx(1 - (0.6 + 0) / 2), "the background is left out"


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_a_turn_is_undone_to_the_place(degrees):
    """Right angles move whole places onto whole places, so what comes back is what was there; against torch's own rot90."""
    x = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    turn = Turn(math.radians(degrees), (0.0, 0.0), 1.0)
    turned = turn.apply(x)
    torch.testing.assert_close(turned, torch.rot90(x, -degrees // 90, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(turn.undo(turned), x, atol=1e-5, rtol=0)


def test_a_shift_moves_by_whole_places_and_back():
    x = torch.rand(1, 1, 8, 8)
    turn = Turn(0.0, (2 * 2 / 8, -1 * 2 / 8), 1.0)  # two places right, one up
    turned = turn.apply(x)
    torch.testing.assert_close(turned[..., :-1, 2:], x[..., 1:, :-2], atol=1e-6, rtol=0)
    torch.testing.assert_close(turn.undo(turned)[..., 1:, :-2], x[..., 1:, :-2], atol=1e-6, rtol=0)


def test_turns_agree_with_torchvision():
    """Its affine() turns the same way, about the same middle, by the same zoom and shift in pixels."""
    from torchvision.transforms.v2.functional import InterpolationMode, affine

    x = torch.rand(1, 1, 24, 24)
    turn = Turn(math.radians(30), (3 * 2 / 24, -2 * 2 / 24), 1.2)
    theirs = affine(x, angle=30, translate=[3, -2], scale=1.2, shear=[0, 0], interpolation=InterpolationMode.BILINEAR)
    torch.testing.assert_close(turn.apply(x), theirs, atol=1e-4, rtol=0)


def test_turns_follow_from_seed_and_step_and_stay_in_range():
    options = {"rotation": 90.0, "translation": 0.11, "zoom": [0.8, 1.4]}
    turns = [draw_turn(3, step, 100, **options) for step in range(200)]
    assert turns == [draw_turn(3, step, 100, **options) for step in range(200)]
    assert len(set(turns)) == 200
    assert all(abs(t.angle) <= math.pi / 2 and 0.8 <= t.zoom <= 1.4 for t in turns)
    pixels = [s * 50 for t in turns for s in t.shift]
    assert max(map(abs, pixels)) == 11
    assert all(p == pytest.approx(round(p)) for p in pixels)


# Maps, noise, dropout, masks


def test_logits_are_distances():
    z, p = torch.randn(2, 5, 3, 3), torch.randn(4, 5)
    expected = -(z[:, None] - p[None, :, :, None, None]).square().sum(2)
    torch.testing.assert_close(m.distance_logits(z, p), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(m.similarity_logits(z, p), (z[:, None] * p[None, :, :, None, None]).sum(2), atol=1e-5, rtol=1e-5)


def test_gumbel_noise_is_each_samples_own():
    """Mean Euler's constant, variance pi² / 6; the same for a sample whichever others are in its batch."""
    keys = torch.arange(500) * 7919
    noise = m.gumbel(keys, m.MAP_NOISE, (5, 8, 8))
    assert noise.shape == (500, 5, 8, 8)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert torch.equal(m.gumbel(keys[100:103], m.MAP_NOISE, (5, 8, 8)), noise[100:103])
    assert not torch.equal(m.gumbel(keys, m.MASK_NOISE, (5, 8, 8)), noise)


def test_gumbel_softmax_picks_parts_as_often_as_they_are_likely():
    """The Gumbel-max trick: the largest noisy logit is a draw from the softmax."""
    logits = torch.tensor([0.6, 0.3, 0.1]).log().view(1, 3, 1, 1).expand(20_000, 3, 1, 1)
    drawn = m.soft_maps(logits, 1.0, m.gumbel(torch.arange(20_000), m.MAP_NOISE, (3, 1, 1))).argmax(1).flatten()
    share = torch.bincount(drawn, minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.6, 0.3, 0.1]), atol=0.015, rtol=0)


def test_temperature_sharpens():
    logits = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert m.soft_maps(logits, 0.5)[0, 0].item() == pytest.approx(1 / (1 + math.exp(-2)))


def test_part_features_are_means_over_all_places_or_over_the_parts():
    z = torch.arange(4.0).view(1, 1, 2, 2)  # 0 1 / 2 3
    a = maps([[0.0, 1.0], [0.0, 1.0]], [[0.5, 0.0], [0.0, 0.0]])
    assert m.part_features(z, a, masked_mean=False).flatten().tolist() == pytest.approx([(1 + 3) / 4, 0])
    assert m.part_features(z, a, masked_mean=True).flatten().tolist() == pytest.approx([(1 + 3) / 2, 0])


def test_dropout_leaves_out_whole_parts_as_often_as_it_should():
    stays = m.kept(torch.arange(5000), m.PART_DROPOUT, 4, 0.3)
    assert set(stays.unique().tolist()) == {0.0, 1.0}
    assert stays.mean().item() == pytest.approx(0.7, abs=0.02)
    assert torch.equal(m.kept(torch.arange(10, 12), m.PART_DROPOUT, 4, 0.3), stays[10:12])


def test_a_place_is_seen_where_a_part_beats_the_background():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 3.0, 1.0]]).T.view(1, 3, 1, 3)  # three places, two parts
    mask = m.foreground(logits, 1.0)
    assert mask.hard.flatten().tolist() == [1, 0, 1]
    assert mask.soft[0, 0, 0].item() == pytest.approx(math.exp(2) / (math.exp(2) + 2))
    hidden = m.foreground(logits, 1.0, kept_parts=torch.tensor([[1.0, 0.0]]))
    assert hidden.hard.flatten().tolist() == [1, 0, 1], "the third place still has part 0, no less likely than the background"
    assert m.foreground(logits, 1.0, kept_parts=torch.tensor([[0.0, 1.0]])).hard.flatten().tolist() == [1, 0, 1]
    assert m.foreground(logits, 1.0, kept_parts=torch.zeros(1, 2)).hard.flatten().tolist() == [0, 0, 0]


def test_the_straight_through_mask_has_hard_values_and_soft_gradients():
    logits = torch.randn(2, 4, 3, 3, requires_grad=True)
    weight = torch.rand(2, 3, 3)
    mask = m.foreground(logits, 1.0, straight_through=True)
    assert set(mask.hard.unique().tolist()) <= {0.0, 1.0}
    (through,) = torch.autograd.grad((mask.hard * weight).sum(), logits)
    (soft,) = torch.autograd.grad((logits.softmax(1)[:, :-1].sum(1) * weight).sum(), logits)
    torch.testing.assert_close(through, soft)


def test_removed_parts_turn_into_background():
    logits = torch.randn(3, 4, 5, 5)
    before, after = logits.argmax(1), m.without(logits, [1]).argmax(1)
    assert torch.equal(after, torch.where(before == 1, torch.tensor(3), before))
    assert m.without(logits, [0, 1, 2]).softmax(1)[:, -1].eq(1).all()
    assert m.without(logits, [1]).softmax(1).isfinite().all()


def test_thresholds_take_places_from_parts():
    similarity = torch.tensor([[5.0, 1.0, 0.0], [0.5, 2.0, 0.0]]).T.view(1, 3, 1, 2)
    logits = m.above_thresholds(similarity, torch.tensor([4.0, 3.0]))
    assert logits.argmax(1).flatten().tolist() == [0, 2], "the second place's part 1 reaches 2 of 3, so it is background"
