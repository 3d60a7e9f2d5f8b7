"""How good found parts are: against classes, groups, outlines and named parts. Pure functions of whole, gathered arrays."""

from __future__ import annotations

import numpy as np

# scikit-learn takes a second to import, so each function does it when it is called.


def worst_group(hits: np.ndarray, groups: np.ndarray) -> float:
    """The least accuracy of any group that is there; `hits` and `groups` [N]."""
    return min(float(hits[groups == group].mean()) for group in np.unique(groups))


def auroc(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Area under the ROC curve, labels [N], probabilities [N, C]: of the second of two classes, or the mean over classes,
    each against all others. None where only one class is there."""
    from sklearn.metrics import roc_auc_score

    classes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    there = [c for c in classes if 0 < (labels == c).sum() < len(labels)]
    if not there:
        return None
    return float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in there]))


def agreement(found: np.ndarray, known: np.ndarray) -> dict[str, float]:
    """Normalised mutual information (arithmetic mean) and adjusted Rand index of two labellings [M] of the same places."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    if not len(known):
        return {}
    return {"nmi": float(normalized_mutual_info_score(known, found)), "ari": float(adjusted_rand_score(known, found))}


def in_box(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Points [N, P, 2] in units of their image's box [N, 4]: (0, 0) and (1, 1) are its corners."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0)
    return (points - boxes[:, None, :2]) / sides[:, None]


def keypoint_error(
    train: tuple[np.ndarray, np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> float | None:  # fmt: skip
    """Mean distance, in units of the object's box, of named points from where a linear regression on the found parts puts them.

    Both are standardised by the training images, a part that an image does not show counts as 0, and each named point is fitted
    without an intercept on the training images that show it (as in PDiscoNet, arXiv:2309.03173, sec. 4.2).

    Args:
        train, test: centres [N, K, 3] (x, y, active) of found parts; named points [N, P, 3] (x, y, visible); boxes [N, 4].
    """
    (centres, points), (test_centres, test_points) = (_boxed(*of) for of in (train, test))
    mean, deviation = _moments(centres)
    design, test_design = (_standardised(c, mean, deviation) for c in (centres, test_centres))
    errors = []
    for p in range(points.shape[1]):
        seen, asked = points[:, p, 2] > 0, test_points[:, p, 2] > 0
        if seen.sum() < 2 or not asked.any():
            continue
        target = points[seen, p, :2]
        middle, scale = target.mean(0), np.maximum(target.std(0), 1e-12)
        weights = np.linalg.lstsq(design[seen], (target - middle) / scale, rcond=None)[0]
        predicted = test_design[asked] @ weights * scale + middle
        errors.append(np.linalg.norm(predicted - test_points[asked, p, :2], axis=1))
    return float(np.concatenate(errors).mean()) if errors else None


def _boxed(centres: np.ndarray, points: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    boxed = [np.concatenate([in_box(xyv[..., :2], boxes), xyv[..., 2:]], axis=2) for xyv in (centres, points)]
    return boxed[0], boxed[1]


def _moments(centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [K, 2] of each part's centre over the images that show it."""
    active = centres[..., 2:] > 0
    count = np.maximum(active.sum(0), 1)
    mean = (centres[..., :2] * active).sum(0) / count
    deviation = np.sqrt((np.square(centres[..., :2] - mean) * active).sum(0) / count)
    return mean, np.where(deviation > 1e-12, deviation, 1.0)


def _standardised(centres: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """[N, 2 K], zeros where a part is not active."""
    return ((centres[..., :2] - mean) / deviation * (centres[..., 2:] > 0)).reshape(len(centres), -1)


def quantiles(parts: np.ndarray, values: np.ndarray, num_parts: int, fraction: float) -> np.ndarray:
    """For each part the value [K] that `fraction` of its own places do not reach; -inf for a part without places."""
    own = [values[parts == k] for k in range(num_parts)]
    return np.array([np.quantile(v, fraction) if len(v) else -np.inf for v in own])
