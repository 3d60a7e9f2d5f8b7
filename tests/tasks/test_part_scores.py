"""Scores of found parts, on arrays whose scores are known and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import StandardScaler

from tasks.part_discovery import scores
from tasks.part_discovery.evaluation import owner_at
from tasks.part_discovery.pictures import OPACITY, colours, overlay, sheet


def test_the_worst_group_is_the_least_accuracy():
    hits, groups = np.array([1, 1, 0, 1, 0, 0.0]), np.array([0, 0, 0, 2, 2, 7])
    assert scores.worst_group(hits, groups) == 0
    assert scores.worst_group(hits[:5], groups[:5]) == 0.5


def test_the_area_under_the_curve_of_two_and_of_more_classes():
    labels = np.array([0, 0, 1, 1])
    second = np.array([0.1, 0.4, 0.35, 0.8])  # of four pairs, three are in order
    assert scores.auroc(labels, np.stack([1 - second, second], 1)) == pytest.approx(0.75)
    assert scores.auroc(np.zeros(4, int), np.stack([1 - second, second], 1)) is None
    three = np.array([0, 1, 2, 2])
    perfect = np.eye(3)[three] * 0.5 + 0.1
    assert scores.auroc(three, perfect) == 1
    assert scores.auroc(three[:2], perfect[:2]) == 1, "classes that are not there are left out"


def test_agreement_does_not_depend_on_the_names_of_parts():
    known = np.array([0, 0, 1, 1, 2, 2])
    assert scores.agreement((known + 1) % 3, known) == {"nmi": pytest.approx(1), "ari": pytest.approx(1)}
    assert scores.agreement(np.zeros(6), known) == {"nmi": pytest.approx(0), "ari": pytest.approx(0)}
    assert scores.agreement(known[:0], known[:0]) == {}


def test_thresholds_are_quantiles_of_each_parts_own_places():
    parts, values = np.array([0] * 100 + [1] * 3), np.r_[np.arange(100.0), [5.0, 6.0, 7.0]]
    assert scores.quantiles(parts, values, 3, 0.1).tolist() == pytest.approx([9.9, 5.2, -np.inf])


def random_parts(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres of 3 parts, one of them inactive now and then; 2 named points that follow from them; boxes."""
    random = np.random.default_rng(seed)
    boxes = np.column_stack([random.uniform(0, 20, (count, 2)), random.uniform(60, 100, (count, 2))])
    centres = np.concatenate([random.uniform(20, 60, (count, 3, 2)), (random.random((count, 3, 1)) > 0.2)], 2)
    points = centres[:, :2, :2] * 0.7 + centres[:, 1:, :2] * 0.2 + random.normal(0, 1, (count, 2, 2))
    return centres, np.concatenate([points, (random.random((count, 2, 1)) > 0.3)], 2), boxes


def test_keypoint_error_is_that_of_scikit_learns_regression():
    train, test = random_parts(80, 0), random_parts(30, 1)

    def boxed(of, boxes):
        return (of[..., :2] - boxes[:, None, :2]) / (boxes[:, 2:] - boxes[:, :2])[:, None]

    columns = []
    for k in range(3):
        scaler = StandardScaler().fit(boxed(train[0], train[2])[train[0][:, k, 2] > 0, k])
        columns.append([np.where(s[0][:, k, 2:] > 0, scaler.transform(boxed(s[0], s[2])[:, k]), 0) for s in (train, test)])
    x, x_test = (np.concatenate(c, 1) for c in zip(*columns, strict=True))
    errors = []
    for p in range(2):
        seen, asked = train[1][:, p, 2] > 0, test[1][:, p, 2] > 0
        scaler = StandardScaler().fit(boxed(train[1], train[2])[seen, p])
        fit = LinearRegression(fit_intercept=False).fit(x[seen], scaler.transform(boxed(train[1], train[2])[seen, p]))
        predicted = scaler.inverse_transform(fit.predict(x_test[asked]))
        errors.append(np.linalg.norm(predicted - boxed(test[1], test[2])[asked, p], axis=1))
    assert scores.keypoint_error(train, test) == pytest.approx(np.concatenate(errors).mean())


def test_parts_that_are_the_named_points_make_no_error():
    centres, _, boxes = random_parts(50, 2)
    centres[..., 2] = 1
    assert scores.keypoint_error((centres, centres, boxes), (centres[:10], centres[:10], boxes[:10])) == pytest.approx(0, abs=1e-9)
    hidden = np.concatenate([centres[..., :2], np.zeros((50, 3, 1))], 2)
    assert scores.keypoint_error((centres, hidden, boxes), (centres, centres, boxes)) is None


def test_the_owner_of_a_point_is_that_of_the_enlarged_maps():
    maps = torch.rand(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    points = torch.rand(3, 6, 2, generator=torch.Generator().manual_seed(1)) * 40
    large = torch.nn.functional.interpolate(maps, size=(40, 40), mode="bilinear", align_corners=False).argmax(1)
    x, y = points.long().unbind(-1)
    assert torch.equal(owner_at(maps, points, 40), torch.stack([large[i, y[i], x[i]] for i in range(3)]))


def test_pictures_paint_parts_and_leave_the_background():
    images, maps = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 3, 2, 2)
    maps[0, 0, :, 0], maps[0, 2, :, 1] = 1, 1  # part 0 on the left, background on the right
    painted = overlay(images, maps)
    assert painted[0, :, :, 7].eq(0.5).all()
    torch.testing.assert_close(painted[0, :, 0, 0], (1 - OPACITY) * 0.5 + OPACITY * colours(2)[0])
    assert len({tuple(c.tolist()) for c in colours(16)}) == 17
    for count, channels in ((1, 3), (5, 1), (7, 5)):
        picture = sheet(torch.randn(count, channels, 16, 16), torch.rand(count, 3, 2, 2), [0.5], [0.2])
        assert picture.dtype == torch.uint8
        assert picture.shape[0] == 3
