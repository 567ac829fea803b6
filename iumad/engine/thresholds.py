"""Thresholds per class from normal images alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any


def threshold(scores: Sequence[float], rate: float) -> dict[str, Any] | None:
    """The score that a new normal image exceeds with probability of at most ``rate``.

    With n scores of normal images that were not trained on, the k-th smallest with k = ceil((n + 1) * (1 -
    rate)) has this property whatever the distribution. Where n is too small for that (k > n), the upper
    prediction bound of a normal distribution is used: mean + t * deviation * sqrt(1 + 1 / n).

    Returns:
        ``value``, ``images`` (n), ``rate`` and ``rule`` ("order statistic" or "normal bound"); None for n <
        2.
    """
    n = len(scores)
    if n < 2:
        return None
    k = math.ceil((n + 1) * (1 - rate) - 1e-9)
    if k <= n:
        return {"value": float(sorted(scores)[k - 1]), "images": n, "rate": rate, "rule": "order statistic"}
    from scipy.stats import t

    bound = mean(scores) + float(t.ppf(1 - rate, n - 1)) * stdev(scores) * math.sqrt(1 + 1 / n)
    return {"value": bound, "images": n, "rate": rate, "rule": "normal bound"}
