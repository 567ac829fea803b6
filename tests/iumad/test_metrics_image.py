from __future__ import annotations

import numpy as np
import pytest
import torch

from iumad.metrics import auroc, image_auroc, image_score


def test_image_scores_match_torch():
    maps = np.random.default_rng(0).normal(size=(5, 40, 33)).astype(np.float32)
    tensor = torch.from_numpy(maps).double()
    pooled = torch.nn.functional.avg_pool2d(tensor[:, None], 16, stride=1).amax(dim=(1, 2, 3))
    np.testing.assert_allclose(image_score(maps), pooled.numpy(), rtol=1e-12)
    np.testing.assert_allclose(image_score(maps, "mean"), tensor.mean(dim=(1, 2)).numpy(), rtol=1e-10)
    np.testing.assert_allclose(
        image_score(maps, "std"), tensor.std(dim=(1, 2), correction=0).numpy(), rtol=1e-12
    )
    assert image_score(maps[0]).shape == ()
    assert image_score(maps[0]) == image_score(maps)[0]


def test_image_auroc():
    assert image_auroc([1.0, 2.0, 3.0, 4.0], [0, 1, 0, 1]) == 0.75
    assert image_auroc([1, 1], [0, 1]) == 0.5
    assert image_auroc([2, 1], [0, 1]) == 0.0, "never flipped above one half"
    assert np.isnan(image_auroc([1.0, 2.0], [0, 0]))


def test_auroc_of_scores_around_100():
    """Scores outside [0, 1] are ranked as they are; no hidden sigmoid."""
    rng = np.random.default_rng(0)
    labels = np.arange(2000) % 2
    scores = 100 + 10 * rng.normal(size=2000) + 8 * labels
    assert auroc(scores, labels) == auroc((scores - 100) / 1000, labels)
    assert 0.65 < auroc(scores, labels) < 0.78


def test_errors():
    with pytest.raises(ValueError, match="how is 'max'"):
        image_score(np.zeros((20, 20)), "max")
    with pytest.raises(ValueError, match="at least 16 x 16"):
        image_score(np.zeros((15, 20)))
    with pytest.raises(ValueError, match="equal numbers"):
        auroc([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="NaN or infinite"):
        auroc([1.0, np.nan], [0, 1])
    with pytest.raises(TypeError, match="expected numbers"):
        auroc(["a", "b"], [0, 1])
