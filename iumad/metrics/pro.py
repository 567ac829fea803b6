"""Per-region overlap: the mean share of a defect region that is found, as a function of the false-positive
rate.

Each defect pixel weighs 1 / (pixels of its region * number of regions), so PRO is a weighted recall, and the
area under its curve is a sum of one ramp per defect pixel (ecosystem.md 3.5). Exact for any limit, with no
list of thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label

from iumad.metrics.ranking import Ranking, Scores


def region_sizes(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """For each defect pixel of a mask (H, W), row by row, the size of its region; and the number of regions.

    Regions are 8-connected; touching defects of two kinds are one.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    window = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ids = label(window, connectivity=2)[window]
    sizes = np.bincount(ids)
    return sizes[ids], len(sizes) - 1


def aupro_exact(ranking: Ranking, weights: NDArray[np.float64], limit: float) -> float:
    """Area under PRO over FPR in [0, limit], divided by limit.

    ``weights`` belong to ``ranking.positives`` and sum to 1. The curve is linear between the points of
    distinct scores, hence a pixel tied with background enters along a ramp from ``start`` to ``end``.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"limit is {limit}, expected a false-positive rate in (0, 1]")
    if ranking.is_degenerate:
        return float("nan")
    count = ranking.negative_count
    # Scores ascend, so the pixels found before the limit are the last ones.
    first = int(np.searchsorted(ranking.not_above, count * (1 - limit), side="right"))
    start = (count - ranking.not_above[first:]) / count
    end = (count - ranking.below[first:]) / count
    tied = end > start
    inside = np.clip(limit - start, 0, None)
    width = np.where(tied, end - start, 1.0)
    # Integral of a ramp that reaches 1 at `end`: quadratic up to `end`, then linear.
    on_ramp = np.minimum(inside, width) ** 2 / (2 * width) + np.clip(limit - end, 0, None)
    return float(np.sum(weights[first:] * np.where(tied, on_ramp, inside)) / limit)


def aupro_thresholded(
    ranking: Ranking, weights: NDArray[np.float64], limit: float, thresholds: int = 100
) -> float:
    """AUPRO as most papers compute it: `thresholds` background scores at equidistant ranks.

    Kept to compare with the literature only: it is biased low (ecosystem.md 3.3) and counts background pixels
    tied with a threshold as rejected.
    """
    if ranking.is_degenerate:
        return float("nan")
    count = ranking.negative_count
    positions = np.linspace(0, count - 1, num=thresholds, dtype=np.int64)
    missed = np.searchsorted(ranking.positives, _order_statistics(ranking.negatives, positions), side="right")
    cumulative = np.concatenate([[0.0], np.cumsum(weights)])
    overlap = np.concatenate([[1.0], 1.0 - cumulative[missed]])[::-1]
    rate = np.concatenate([[1.0], 1.0 - (positions + 1) / count])[::-1]
    inside = rate <= limit
    x = np.append(rate[inside], limit)
    y = np.append(overlap[inside], np.interp(limit, rate, overlap))
    return _trapezoid(x, y) / limit


def _order_statistics(runs: Sequence[Scores], positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """Values at the given positions of the runs' sorted union, by bisection over the float32 numbers.

    Read as integers, with the order of the negative ones turned around, floats keep their order.
    """

    def as_key(bits: NDArray[np.int64]) -> NDArray[np.int64]:  # its own inverse
        return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    ends = np.array([[run[0], run[-1]] for run in runs if len(run)], dtype=np.float32)
    keys = as_key(ends.view(np.int32).astype(np.int64))
    low, high = np.full(len(positions), keys.min()), np.full(len(positions), keys.max())
    while (low < high).any():
        middle = (low + high) // 2
        values = as_key(middle).astype(np.int32).view(np.float32)
        not_above = sum(np.searchsorted(run, values, side="right") for run in runs)
        reached = not_above > positions
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    return as_key(low).astype(np.int32).view(np.float32)


def _trapezoid(x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]]) -> float:
    return float(np.sum(0.5 * (y[1:] + y[:-1]) * np.diff(x)))
