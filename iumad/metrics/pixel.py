"""Pixel-level metrics of one class from one pass over its test images, exact and mergeable."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iumad.metrics.pro import aupro_exact, aupro_thresholded, region_sizes
from iumad.metrics.ranking import Ranking, as_numpy, checked_labels, checked_scores

LIMITS = (0.30, 0.10, 0.05, 0.01)

_SMALLEST_RUN = 1 << 20
_NOT_BACKGROUND = np.float32(np.inf)  # above every score, since scores are finite


class PixelMetrics:
    """AUROC, AP, best F1 and AUPRO over all pixels of all images given to `update`.

    State: the background scores as float32 (4 bytes a pixel), score and region size of every defect pixel.
    Scores are only ranked, never transformed; float64 maps are rounded to float32. A region is an 8-connected
    component of one mask; everything outside the regions is background, also in defective images.
    """

    def __init__(self) -> None:
        self._background = _Values()
        self._defects: list[tuple[NDArray[np.float32], NDArray[np.float64]]] = []
        self._region_count = 0

    def update(self, score_map: ArrayLike, mask: ArrayLike) -> PixelMetrics:
        """Add one image (H, W) or a batch (N, H, W) of score maps with its masks (above 0: defect).

        Errors: ValueError on NaN or infinite scores, shapes that differ, soft or negative mask values.
        """
        shape, mask_shape = as_numpy(score_map).shape, as_numpy(mask).shape
        if shape != mask_shape or len(shape) not in (2, 3):
            raise ValueError(
                f"score_map is {shape} and mask {mask_shape}, expected both (H, W) or both (N, H, W)"
            )
        with np.errstate(over="ignore"):
            scores = checked_scores(np.asarray(as_numpy(score_map), dtype=np.float32))
        defects = checked_labels(mask)
        if scores.ndim == 2:
            scores, defects = scores[None], defects[None]
        for image, defect in zip(scores, defects, strict=True):
            self._add_image(image, defect)
        return self

    def _add_image(self, image: NDArray[np.floating[Any]], defect: NDArray[np.bool_]) -> None:
        if not defect.any():
            self._background.append(image.ravel())
            return
        # Marking the defect pixels is faster than leaving them out: the marks sort to the end and are cut there.
        background = image.copy()
        background[defect] = _NOT_BACKGROUND
        self._background.append(background.ravel())
        sizes, count = region_sizes(defect)
        self._defects.append((np.asarray(image[defect], dtype=np.float32), 1.0 / sizes))
        self._region_count += count

    def merge(self, other: PixelMetrics) -> PixelMetrics:
        """Add everything ``other`` has seen, as if its images had been given to this object."""
        for run in other._background.runs():
            self._background.append(run)
        self._defects += other._defects
        self._region_count += other._region_count
        return self

    def compute(self) -> dict[str, float]:
        """``p_auroc, p_ap, p_f1max, aupro_30, aupro_10, aupro_05, aupro_01, aupro_100``, all in [0, 1].

        ``aupro_LL`` integrates up to a false-positive rate of LL per cent and is exact; ``aupro_100`` is the
        100-threshold estimate at 30 per cent of the literature. All are NaN where undefined: no defect pixel,
        or no background pixel. Errors: ValueError if no image was given.
        """
        ranking, weights = self._ranked()
        result = {
            "p_auroc": ranking.auroc(),
            "p_ap": ranking.average_precision(),
            "p_f1max": ranking.f1_max(),
        }
        for limit in LIMITS:
            result[f"aupro_{round(limit * 100):02d}"] = aupro_exact(ranking, weights, limit)
        result["aupro_100"] = aupro_thresholded(ranking, weights, LIMITS[0])
        return result

    def aupro(self, limit: float) -> float:
        """Exact AUPRO up to any false-positive rate in (0, 1]; NaN where undefined."""
        ranking, weights = self._ranked()
        return aupro_exact(ranking, weights, limit)

    def _ranked(self) -> tuple[Ranking, NDArray[np.float64]]:
        runs = self._background.sorted_runs()
        background = [run[: np.searchsorted(run, _NOT_BACKGROUND)] for run in runs]
        if not self._defects:
            if not runs:
                raise ValueError("no image was given: call update(score_map, mask) before compute()")
            return Ranking(np.empty(0, np.float32), background), np.empty(0)
        scores = np.concatenate([scores for scores, _ in self._defects])
        weights = np.concatenate([weights for _, weights in self._defects])
        order = np.argsort(scores)
        return Ranking(scores[order], background), weights[order] / self._region_count


def aupro(score_maps: ArrayLike, masks: ArrayLike, limit: float = 0.3) -> float:
    """Exact AUPRO of maps (N, H, W) or (H, W) up to a false-positive rate of ``limit``; NaN if no defect."""
    return PixelMetrics().update(score_maps, masks).aupro(limit)


def aupro_100(score_maps: ArrayLike, masks: ArrayLike, limit: float = 0.3) -> float:
    """AUPRO with 100 thresholds at equidistant background ranks, for comparison with published numbers."""
    ranking, weights = PixelMetrics().update(score_maps, masks)._ranked()
    return aupro_thresholded(ranking, weights, limit)


class _Values:
    """A growing multiset of float32 values, sorted in place: 4 bytes a value, also while sorting.

    It is a list of runs, each four times as long as the one before: few of them, and none is ever copied.
    """

    def __init__(self) -> None:
        self._runs: list[NDArray[np.float32]] = []
        self._free = 0  # unused places at the end of the last run
        self._is_sorted = True

    def append(self, values: NDArray[np.floating[Any]]) -> None:
        while len(values):
            if not self._free:
                self._free = 4 * len(self._runs[-1]) if self._runs else _SMALLEST_RUN
                self._runs.append(np.empty(self._free, dtype=np.float32))
            taken = min(self._free, len(values))
            run = self._runs[-1]
            start = len(run) - self._free
            run[start : start + taken] = values[:taken]
            self._free -= taken
            values = values[taken:]
            self._is_sorted = False

    def runs(self) -> list[NDArray[np.float32]]:
        if not self._free:
            return list(self._runs)
        return [*self._runs[:-1], self._runs[-1][: -self._free]]

    def sorted_runs(self) -> list[NDArray[np.float32]]:
        runs = self.runs()
        if not self._is_sorted:
            for run in runs:
                run.sort()
            self._is_sorted = True
        return runs
