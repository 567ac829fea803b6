"""Thresholds from normal scores alone."""

import numpy as np
import pytest

from iumad.engine.thresholds import threshold


def test_order_statistic():
    scores = [float(x) for x in range(1, 40)]  # 39 scores: k = ceil(40 * 0.95) = 38
    found = threshold(scores, 0.05)
    assert found == {"value": 38.0, "images": 39, "rate": 0.05, "rule": "order statistic"}
    assert threshold(scores[:19], 0.05)["value"] == 19.0  # the smallest n for 5 %


def test_normal_bound_for_few_images():
    found = threshold([1.0, 2.0, 3.0], 0.05)
    assert found["rule"] == "normal bound"
    assert found["value"] == pytest.approx(2 + 2.919985580 * np.sqrt(4 / 3), abs=1e-8)


def test_too_few_images():
    assert threshold([1.0], 0.05) is None
    assert threshold([], 0.05) is None


@pytest.mark.parametrize("n", [5, 30, 200])
def test_rate_is_kept_on_new_scores(n):
    rng = np.random.default_rng(n)
    exceeded = [rng.normal() > threshold(rng.normal(size=n).tolist(), 0.1)["value"] for _ in range(4000)]
    assert np.mean(exceeded) == pytest.approx(0.1, abs=0.02)
