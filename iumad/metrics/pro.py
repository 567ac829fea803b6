"""Per-region overlap: the mean share of a defect region that is found, as a function of the false-positive
rate.

Each defect pixel weighs 1 / (pixels of its region * number of regions), so PRO is a weighted recall, and the
area under its curve is a sum of one ramp per defect pixel (ecosystem.md 3.5). Exact for any limit, with no
list of thresholds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label

from iumad.metrics.ranking import Ranking


def region_ids(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number the 8-connected regions of one mask (H, W) from 1; touching defects of two kinds are one."""
    return np.asarray(label(mask, connectivity=2), dtype=np.int64)


def aupro_exact(ranking: Ranking, weights: NDArray[np.float64], limit: float) -> float:
    """Area under PRO over FPR in [0, limit], divided by limit.

    ``weights`` belong to ``ranking.positives`` and sum to 1. The curve is linear between the points of
    distinct scores, hence a pixel tied with background enters along a ramp from ``start`` to ``end``.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"limit is {limit}, expected a false-positive rate in (0, 1]")
    if ranking.is_degenerate:
        return float("nan")
    count = len(ranking.negatives)
    start = (count - ranking.not_above) / count
    end = (count - ranking.below) / count
    tied = end > start
    inside = np.clip(limit - start, 0, None)
    width = np.where(tied, end - start, 1.0)
    # Integral of a ramp that reaches 1 at `end`: quadratic up to `end`, then linear.
    on_ramp = np.minimum(inside, width) ** 2 / (2 * width) + np.clip(limit - end, 0, None)
    return float(np.sum(weights * np.where(tied, on_ramp, inside)) / limit)


def aupro_thresholded(
    ranking: Ranking, weights: NDArray[np.float64], limit: float, thresholds: int = 100
) -> float:
    """AUPRO as most papers compute it: `thresholds` background scores at equidistant ranks.

    Kept to compare with the literature only: it is biased low (ecosystem.md 3.3) and counts background pixels
    tied with a threshold as rejected.
    """
    if ranking.is_degenerate:
        return float("nan")
    count = len(ranking.negatives)
    positions = np.linspace(0, count - 1, num=thresholds, dtype=np.int64)
    missed = np.searchsorted(ranking.positives, ranking.negatives[positions], side="right")
    cumulative = np.concatenate([[0.0], np.cumsum(weights)])
    overlap = np.concatenate([[1.0], 1.0 - cumulative[missed]])[::-1]
    rate = np.concatenate([[1.0], 1.0 - (positions + 1) / count])[::-1]
    inside = rate <= limit
    x = np.append(rate[inside], limit)
    y = np.append(overlap[inside], np.interp(limit, rate, overlap))
    return _trapezoid(x, y) / limit


def _trapezoid(x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]]) -> float:
    return float(np.sum(0.5 * (y[1:] + y[:-1]) * np.diff(x)))
