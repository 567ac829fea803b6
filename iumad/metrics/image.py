"""Image-level scores of an anomaly map, and their AUROC."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iumad.metrics.ranking import auroc, checked_scores

IMAGE_SCORES = ("pool_max", "std", "mean")
POOL = 16


def image_score(score_maps: ArrayLike, how: str = "pool_max") -> NDArray[np.float64]:
    """One number an image from maps (N, H, W), or a 0-d array from one map (H, W).

    ``pool_max``: largest mean over a 16 x 16 window, stride 1 (UniAD's and the default, paper.md A22);
    ``std`` and ``mean``: over the whole map.
    """
    maps = checked_scores(score_maps).astype(np.float64)
    if maps.ndim not in (2, 3):
        raise ValueError(f"score_maps are {maps.shape}, expected (N, H, W) or (H, W)")
    if how == "mean":
        return np.asarray(maps.mean(axis=(-2, -1)))
    if how == "std":
        return np.asarray(maps.std(axis=(-2, -1)))
    if how != "pool_max":
        raise ValueError(f"how is {how!r}, expected one of {', '.join(IMAGE_SCORES)}")
    if min(maps.shape[-2:]) < POOL:
        raise ValueError(
            f"score_maps are {maps.shape}, expected at least {POOL} x {POOL} pixels to pool over"
        )
    return np.asarray(_window_mean(_window_mean(maps, -1), -2).max(axis=(-2, -1)))


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """AUROC of one score an image against its label (above 0: defective); NaN unless both labels occur."""
    return auroc(scores, labels)


def _window_mean(maps: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    windows = np.lib.stride_tricks.sliding_window_view(maps, POOL, axis=axis)
    return np.asarray(windows.mean(axis=-1))
