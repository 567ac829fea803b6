"""Pixel-level metrics of one class from one pass over its test images, exact and mergeable."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iumad.metrics.pro import aupro_exact, aupro_thresholded, region_ids
from iumad.metrics.ranking import Ranking, as_numpy, checked_labels, checked_scores

LIMITS = (0.30, 0.10, 0.05, 0.01)

_SMALLEST_BLOCK = 1 << 16
_LARGEST_BLOCK = 1 << 24


class PixelMetrics:
    """AUROC, AP, best F1 and AUPRO over all pixels of all images given to `update`.

    State: the background scores as float32 (4 bytes a pixel) and the scores of every defect region. Scores
    are only ranked, never transformed; float64 maps are rounded to float32. A region is an 8-connected
    component of one mask; everything outside the regions is background, also in defective images.
    """

    def __init__(self) -> None:
        self._background = _Values()
        self._regions: list[NDArray[np.float32]] = []

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
        self._background.append(image[~defect])
        ids = region_ids(defect)[defect]
        order = np.argsort(ids, kind="stable")
        sizes = np.bincount(ids)[1:]
        self._regions += np.split(image[defect][order], np.cumsum(sizes)[:-1])

    def merge(self, other: PixelMetrics) -> PixelMetrics:
        """Add everything ``other`` has seen, as if its images had been given to this object."""
        for block in other._background.blocks():
            self._background.append(block)
        self._regions += other._regions
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
        background = self._background.sorted()
        if not self._regions:
            if not len(background):
                raise ValueError("no image was given: call update(score_map, mask) before compute()")
            return Ranking(np.empty(0, np.float32), background), np.empty(0)
        scores = np.concatenate(self._regions)
        sizes = np.array([len(region) for region in self._regions])
        weights = np.repeat(1.0 / (sizes * len(sizes)), sizes)
        order = np.argsort(scores, kind="stable")
        return Ranking(scores[order], background), weights[order]


def aupro(score_maps: ArrayLike, masks: ArrayLike, limit: float = 0.3) -> float:
    """Exact AUPRO of maps (N, H, W) or (H, W) up to a false-positive rate of ``limit``; NaN if no defect."""
    return PixelMetrics().update(score_maps, masks).aupro(limit)


def aupro_100(score_maps: ArrayLike, masks: ArrayLike, limit: float = 0.3) -> float:
    """AUPRO with 100 thresholds at equidistant background ranks, for comparison with published numbers."""
    ranking, weights = PixelMetrics().update(score_maps, masks)._ranked()
    return aupro_thresholded(ranking, weights, limit)


class _Values:
    """A growing multiset of float32 values that can be sorted holding hardly more than 4 bytes a value.

    Blocks double up to 64 MiB. Sorting moves them one by one into a single array and frees each at once.
    """

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.float32]] = []
        self._free = 0  # unused places at the end of the last block
        self._is_sorted = True

    def append(self, values: NDArray[np.floating[Any]]) -> None:
        self._is_sorted = False
        while len(values):
            if not self._free:
                last = len(self._blocks[-1]) if self._blocks else 0
                self._free = min(max(2 * last, _SMALLEST_BLOCK), _LARGEST_BLOCK)
                self._blocks.append(np.empty(self._free, dtype=np.float32))
            taken = min(self._free, len(values))
            block = self._blocks[-1]
            start = len(block) - self._free
            block[start : start + taken] = values[:taken]
            self._free -= taken
            values = values[taken:]

    def blocks(self) -> list[NDArray[np.float32]]:
        if not self._free:
            return list(self._blocks)
        return [*self._blocks[:-1], self._blocks[-1][: -self._free]]

    def sorted(self) -> NDArray[np.float32]:
        if not self._is_sorted or len(self._blocks) > 1 or self._free:
            filled = self.blocks()
            self._blocks = []
            merged = np.empty(sum(map(len, filled)), dtype=np.float32)
            end = len(merged)
            while filled:
                block = filled.pop()
                merged[end - len(block) : end] = block
                end -= len(block)
            merged.sort()
            self._blocks, self._free, self._is_sorted = [merged], 0, True
        return self._blocks[0] if self._blocks else np.empty(0, dtype=np.float32)
