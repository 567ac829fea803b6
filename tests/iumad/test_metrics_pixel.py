from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis.extra import numpy as hnp

from iumad.metrics import PixelMetrics, aupro, aupro_100, auroc, average_precision, f1_max

TOLERANCE = {"rtol": 0, "atol": 1e-12}


# The definitions by brute force: try every threshold, count every pixel.


def regions_by_flood_fill(mask):
    """8-connected regions as lists of (row, column)."""
    todo = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    regions = []
    while todo:
        front = [todo.pop()]
        region = []
        while front:
            row, column = front.pop()
            region.append((row, column))
            for neighbour in [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                if neighbour in todo:
                    todo.remove(neighbour)
                    front.append(neighbour)
        regions.append(region)
    return regions


def pro_curve(maps, masks):
    """Points (FPR, PRO) for "score > t", t over all scores and below them, FPR ascending."""
    background = [float(v) for m, g in zip(maps, masks) for v in m[~g]]
    regions = [
        [float(m[p]) for p in region] for m, g in zip(maps, masks) for region in regions_by_flood_fill(g)
    ]
    thresholds = sorted({float(v) for m in maps for v in m.ravel()}, reverse=True) + [-np.inf]
    points = []
    for t in thresholds:
        fpr = sum(v > t for v in background) / len(background)
        pro = float(np.mean([sum(v > t for v in region) / len(region) for region in regions]))
        points.append((fpr, pro))
    return points


def brute_aupro(maps, masks, limit):
    area, points = 0.0, pro_curve(maps, masks)
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 >= limit or x1 == x0:
            continue
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        area += (y0 + y1) / 2 * (x1 - x0)
    return area / limit


def brute_auroc(scores, labels):
    """Share of (positive, negative) pairs in the right order, ties at half."""
    positive, negative = scores[labels].astype(float), scores[~labels].astype(float)
    higher = (positive[:, None] > negative[None]).sum()
    equal = (positive[:, None] == negative[None]).sum()
    return (higher + 0.5 * equal) / (len(positive) * len(negative))


def brute_average_precision(scores, labels):
    total, recall_before = 0.0, 0.0
    for t in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= t
        recall = (chosen & labels).sum() / labels.sum()
        total += (recall - recall_before) * (chosen & labels).sum() / chosen.sum()
        recall_before = recall
    return total


def brute_f1_max(scores, labels):
    best = 0.0
    for t in set(scores.tolist()):
        chosen = scores >= t
        best = max(best, 2 * (chosen & labels).sum() / (chosen.sum() + labels.sum()))
    return best


def brute_aupro_100(maps, masks, limit=0.3, thresholds=100):
    """The thresholded estimator of the MVTec 3D-AD evaluation, point by point."""
    background = sorted(float(v) for m, g in zip(maps, masks) for v in m[~g])
    regions = [
        [float(m[p]) for p in region] for m, g in zip(maps, masks) for region in regions_by_flood_fill(g)
    ]
    points = [(1.0, 1.0)]
    for k in range(thresholds):
        position = int(k * (len(background) - 1) / (thresholds - 1))
        t = background[position]
        pro = float(np.mean([sum(v > t for v in region) / len(region) for region in regions]))
        points.append((1 - (position + 1) / len(background), pro))
    points.reverse()
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 < limit and x1 > x0:
            if x1 > limit:
                x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            area += (y0 + y1) / 2 * (x1 - x0)
    return area / limit


@st.composite
def tiny_sets(draw):
    """One to three tiny images, often with many ties; at least one defect and one background pixel."""
    count, height, width = draw(st.integers(1, 3)), draw(st.integers(2, 6)), draw(st.integers(2, 6))
    levels = draw(st.sampled_from([2, 5, 1000]))
    shape = (count, height, width)
    scores = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, levels)))
    masks = draw(hnp.arrays(np.bool_, shape))
    assume(masks.any() and not masks.all())
    return (scores.astype(np.float32) - levels // 2) * np.float32(0.37), masks


def random_set(seed=0, count=6, size=40):
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), dtype=bool)
    for i in range(1, count):  # image 0 is good
        for _ in range(3):
            r, c = rng.integers(0, size - 8, size=2)
            masks[i, r : r + rng.integers(2, 8), c : c + rng.integers(2, 8)] = True
    scores = rng.normal(size=masks.shape).astype(np.float32) + masks * np.float32(1.5)
    return scores, masks


@settings(max_examples=300, deadline=None)
@given(tiny_sets(), st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.77, 1.0]))
def test_equals_brute_force_with_ties(case, limit):
    scores, masks = case
    result = PixelMetrics().update(scores, masks).compute()
    flat, labels = scores.ravel(), masks.ravel()
    np.testing.assert_allclose(result["p_auroc"], brute_auroc(flat, labels), **TOLERANCE)
    np.testing.assert_allclose(result["p_ap"], brute_average_precision(flat, labels), **TOLERANCE)
    np.testing.assert_allclose(result["p_f1max"], brute_f1_max(flat, labels), **TOLERANCE)
    np.testing.assert_allclose(result["aupro_30"], brute_aupro(scores, masks, 0.3), **TOLERANCE)
    np.testing.assert_allclose(result["aupro_01"], brute_aupro(scores, masks, 0.01), **TOLERANCE)
    np.testing.assert_allclose(aupro(scores, masks, limit), brute_aupro(scores, masks, limit), **TOLERANCE)


def test_equals_scikit_learn():
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    scores, masks = random_set()
    flat, labels = scores.ravel(), masks.ravel()
    result = PixelMetrics().update(scores, masks).compute()
    precision, recall, _ = precision_recall_curve(labels, flat)
    best = np.max(2 * precision * recall / (precision + recall))
    np.testing.assert_allclose(result["p_auroc"], roc_auc_score(labels, flat), **TOLERANCE)
    np.testing.assert_allclose(result["p_ap"], average_precision_score(labels, flat), **TOLERANCE)
    np.testing.assert_allclose(result["p_f1max"], best, **TOLERANCE)
    assert result["p_auroc"] == auroc(flat, labels)
    assert result["p_ap"] == average_precision(flat, labels)
    assert result["p_f1max"] == f1_max(flat, labels)


def test_official_toy_set():
    """The MVTec evaluation's toy set: noise maps, one 10 x 10 defect an image; exact AUPRO@0.3 is known."""
    state = np.random.RandomState(1338)  # noqa: NPY002  (the seed belongs to the legacy generator)
    mask = np.zeros((300, 500), dtype=np.uint8)
    mask[:10, :10] = 1
    metrics = PixelMetrics()
    for _ in range(200):
        metrics.update(state.random_sample((300, 500)), mask)
    assert metrics.compute()["aupro_30"] == pytest.approx(0.1510192660, abs=1e-9)


def test_hundred_thresholds_is_the_literature_estimator():
    scores, masks = random_set(seed=3)
    np.testing.assert_allclose(aupro_100(scores, masks), brute_aupro_100(scores, masks), **TOLERANCE)
    # Up to 1 the thresholds below zero count as well.
    np.testing.assert_allclose(
        aupro_100(scores, masks, 1.0), brute_aupro_100(scores, masks, 1.0), rtol=0, atol=1e-12
    )
    coarse = np.round(scores * 2)  # ties, where it differs from the exact value
    np.testing.assert_allclose(aupro_100(coarse, masks), brute_aupro_100(coarse, masks), **TOLERANCE)
    assert abs(aupro_100(coarse, masks) - aupro(coarse, masks)) > 0.01


@settings(max_examples=100, deadline=None)
@given(tiny_sets(), st.sampled_from(["affine", "cube", "sigmoid", "around_100"]))
def test_invariant_under_increasing_transforms(case, name):
    scores, masks = case
    transform = {
        "affine": lambda x: 3 * x - 7,
        "cube": lambda x: x**3,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x / 500)),
        "around_100": lambda x: 100 + x / 100,
    }[name]
    mapped = transform(scores.astype(np.float64)).astype(np.float32)
    assume(len(np.unique(mapped)) == len(np.unique(scores)))  # float32 kept the order strict
    before, after = (PixelMetrics().update(s, masks).compute() for s in (scores, mapped))
    assert before == after


def test_touching_ids_and_diagonals_are_one_region():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2, 2], mask[2, 3], mask[3, 4] = 255, 254, 253  # side by side, then diagonal
    mask[6, 6] = 255
    scores = np.zeros((8, 8), dtype=np.float32)
    scores[2, 2] = scores[6, 6] = 1
    # Two regions found by 1/3 and 1 without false positive; then a ramp to (1, 1): all else is tied at 0.
    found = (1 / 3 + 1) / 2
    at_limit = found + (1 - found) * 0.3
    assert aupro(scores, mask, 0.3) == pytest.approx((found + at_limit) / 2, abs=1e-12)


def test_mask_encodings_agree():
    scores, masks = random_set()
    expected = PixelMetrics().update(scores, masks).compute()
    for encoded in (
        masks.astype(np.uint8),
        masks * np.uint8(255),
        masks * 253.0,
        torch.from_numpy(masks).float(),
    ):
        assert PixelMetrics().update(scores, encoded).compute() == expected


def test_order_batching_and_merging_do_not_matter():
    scores, masks = random_set(count=9)
    whole = PixelMetrics().update(scores, masks).compute()
    one_by_one = PixelMetrics()
    for i in reversed(range(9)):
        one_by_one.update(scores[i], masks[i])
    left, right = PixelMetrics().update(scores[:4], masks[:4]), PixelMetrics().update(scores[4:], masks[4:])
    right.compute()  # computing in between changes nothing
    merged = left.merge(right).merge(PixelMetrics())
    for other in (one_by_one, merged):
        assert other.compute() == pytest.approx(whole, abs=1e-14)
    assert merged.compute() == merged.compute()


def test_updating_after_compute():
    scores, masks = random_set(count=4)
    metrics = PixelMetrics().update(scores[:2], masks[:2])
    metrics.compute()
    expected = PixelMetrics().update(scores, masks).compute()
    assert metrics.update(scores[2:], masks[2:]).compute() == pytest.approx(expected, abs=1e-14)


def test_many_blocks_hold_all_values():
    """More background than the first blocks take, in pieces that straddle their ends."""
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(7, 311, 307)).astype(np.float32)
    masks = np.zeros(scores.shape, dtype=bool)
    masks[:, :9, :9] = True
    metrics = PixelMetrics()
    for s, m in zip(scores, masks):
        metrics.update(s, m)
    from sklearn.metrics import roc_auc_score

    assert metrics.compute()["p_auroc"] == pytest.approx(
        roc_auc_score(masks.ravel(), scores.ravel()), abs=1e-12
    )


def test_does_not_keep_or_change_the_callers_arrays():
    scores, masks = random_set(count=2)
    mine = scores.copy()
    metrics = PixelMetrics().update(mine, masks)
    expected = metrics.compute()
    np.testing.assert_array_equal(mine, scores)
    mine[:] = 0
    assert metrics.compute() == expected


def test_takes_torch_tensors():
    scores, masks = random_set()
    expected = PixelMetrics().update(scores, masks).compute()
    tensor = torch.from_numpy(scores).requires_grad_()
    assert PixelMetrics().update(tensor, torch.from_numpy(masks)).compute() == expected


@pytest.mark.parametrize("fill", [True, False])
def test_undefined_is_nan(fill):
    result = PixelMetrics().update(np.zeros((3, 3)), np.full((3, 3), fill)).compute()
    assert all(np.isnan(value) for value in result.values())


def test_errors_name_the_problem():
    scores, masks = random_set(count=2)
    with pytest.raises(ValueError, match="no image was given"):
        PixelMetrics().compute()
    for bad in (np.nan, np.inf, -np.inf):
        poisoned = scores.copy()
        poisoned[0, 0, 0] = bad
        with pytest.raises(ValueError, match="1 NaN or infinite"):
            PixelMetrics().update(poisoned, masks)
    with pytest.raises(ValueError, match="NaN or infinite"):  # float64 beyond float32
        PixelMetrics().update(np.full((2, 2), 1e300), np.eye(2))
    with pytest.raises(ValueError, match=r"expected both"):
        PixelMetrics().update(scores, masks[:, :-1])
    with pytest.raises(ValueError, match="fractions"):
        PixelMetrics().update(scores, masks * 0.5)
    with pytest.raises(ValueError, match="negative"):
        PixelMetrics().update(scores, masks * -1)
    with pytest.raises(ValueError, match="limit"):
        aupro(scores, masks, 0.0)
