"""AUROC, average precision and best F1 as closed-form sums over the ranks of the positives.

Only the positives are ranked: each is looked up among the sorted negatives. No threshold is ever chosen and
no score is transformed, so every value is unchanged by a strictly increasing map of the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scores = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Ranking:
    """Sorted positives, and negatives as any number of sorted runs, over which ranks add up.

    Every metric is NaN if there are no positives or no negatives.
    """

    positives: Scores
    negatives: Sequence[Scores]

    @cached_property
    def negative_count(self) -> int:
        """Number of negatives in all runs."""
        return sum(len(run) for run in self.negatives)

    @cached_property
    def below(self) -> NDArray[np.int64]:
        """For each positive, the number of negatives with a smaller score."""
        return self._counts[0]

    @cached_property
    def not_above(self) -> NDArray[np.int64]:
        """For each positive, the number of negatives with a smaller or equal score."""
        return self._counts[1]

    @cached_property
    def _counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        below = np.zeros(len(self.positives), dtype=np.int64)
        not_above = below.copy()
        for run in filter(len, self.negatives):
            left = np.searchsorted(run, self.positives, side="left")
            below += left
            not_above += left
            # Ties are rare; only they need the second search.
            tied = np.flatnonzero(run[np.minimum(left, len(run) - 1)] == self.positives)
            not_above[tied] += np.searchsorted(run, self.positives[tied], side="right") - left[tied]
        return below, not_above

    @property
    def is_degenerate(self) -> bool:
        """Whether there is nothing to separate."""
        return len(self.positives) == 0 or self.negative_count == 0

    def auroc(self) -> float:
        """Area under the ROC curve: mean mid-rank of the positives among the negatives."""
        if self.is_degenerate:
            return float("nan")
        # An integer sum is exact, whatever the number of pixels.
        doubled = int(self.below.sum()) + int(self.not_above.sum())
        return doubled / (2 * len(self.positives) * self.negative_count)

    def average_precision(self) -> float:
        """Sum of recall steps times precision (step-wise, no interpolation), over distinct scores."""
        if self.is_degenerate:
            return float("nan")
        true_positives, false_positives = self._confusion
        gained = -np.diff(true_positives, append=0)
        return float(
            np.sum(gained * (true_positives / (true_positives + false_positives))) / len(self.positives)
        )

    def f1_max(self) -> float:
        """Largest F1 over all thresholds. It is reached at the score of a positive."""
        if self.is_degenerate:
            return float("nan")
        true_positives, false_positives = self._confusion
        return float(np.max(2 * true_positives / (true_positives + false_positives + len(self.positives))))

    @cached_property
    def _confusion(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """True and false positives of "score >= s" for each distinct score s of a positive, s ascending."""
        first = np.flatnonzero(np.diff(self.positives, prepend=np.nan) != 0)
        return len(self.positives) - first, self.negative_count - self.below[first]


def rank(scores: ArrayLike, labels: ArrayLike) -> Ranking:
    """Split scores by label (any shape, equal shapes; label > 0 is positive) and sort both halves."""
    values, positive = checked_scores(scores).ravel(), checked_labels(labels).ravel()
    if values.shape != positive.shape:
        raise ValueError(
            f"scores have {values.size} values but labels {positive.size}, expected equal numbers"
        )
    return Ranking(np.sort(values[positive]), [np.sort(values[~positive])])


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve, ties at half; NaN unless both labels occur; NaN or inf scores raise."""
    return rank(scores, labels).auroc()


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Average precision, scikit-learn's definition; NaN unless both labels occur."""
    return rank(scores, labels).average_precision()


def f1_max(scores: ArrayLike, labels: ArrayLike) -> float:
    """Largest F1 over all thresholds; NaN unless both labels occur."""
    return rank(scores, labels).f1_max()


def checked_scores(scores: ArrayLike) -> NDArray[np.floating[Any]]:
    """Scores as a float array; ValueError on NaN or infinity, which have no rank."""
    values = as_numpy(scores)
    if values.dtype.kind not in "fiu":
        raise TypeError(f"scores are {values.dtype}, expected numbers")
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    with np.errstate(all="ignore"):
        total = values.sum()  # one cheap pass: NaN and infinities survive in it
    if not np.isfinite(total) and not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise ValueError(
            f"scores hold {bad} NaN or infinite of {values.size} values, expected finite numbers"
        )
    return values


def checked_labels(labels: ArrayLike) -> NDArray[np.bool_]:
    """Labels or mask as bool: above 0 is a defect, be it 1, 255 or a class id; soft values raise."""
    values = as_numpy(labels)
    if values.dtype == bool:
        return values
    if values.dtype.kind not in "fiu":
        raise TypeError(f"labels are {values.dtype}, expected bool or numbers")
    if values.dtype.kind == "f" and not np.array_equal(values, np.floor(values)):
        raise ValueError("labels hold fractions or NaN, expected whole numbers (binarise soft masks first)")
    if values.dtype.kind != "u" and values.size and values.min() < 0:
        raise ValueError(f"labels hold {values.min()}, expected no negative value")
    positive: NDArray[np.bool_] = values > 0
    return positive


def as_numpy(values: Any) -> NDArray[Any]:
    """A NumPy view or copy of anything array-like, including torch tensors of any device or dtype."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
    return np.asarray(values)
