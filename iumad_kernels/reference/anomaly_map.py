"""Anomaly map and image score (paper.md 2.3, E10) in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_smooth(x: Tensor, sigma: float) -> Tensor:
    """Gaussian over the last two dimensions, cut off at round(4 sigma), borders mirrored (c b a | a b c | c b a).

    These are the defaults of ``scipy.ndimage.gaussian_filter``.
    """
    radius = int(4 * sigma + 0.5)
    steps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(x)
    for dim in (-2, -1):
        n = x.shape[dim]
        position = torch.arange(-radius, n + radius, device=x.device) % (2 * n)
        mirrored = torch.where(position < n, position, 2 * n - 1 - position)
        x = (x.index_select(dim, mirrored).unfold(dim, 2 * radius + 1, 1) * kernel).sum(-1)
    return x


def anomaly_map(
    features: Tensor, reference: Tensor, size: int | tuple[int, int], *, pool: int = 16, sigma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`iumad_kernels.anomaly_map`; same arguments, shapes and results."""
    compute = torch.promote_types(features.dtype, torch.float32)
    height, width = (size, size) if isinstance(size, int) else size
    distance = torch.linalg.vector_norm(features.to(compute) - reference.to(compute), dim=1, keepdim=True)
    full = F.interpolate(distance, size=(height, width), mode="bilinear", align_corners=True)
    if sigma > 0:
        full = gaussian_smooth(full, sigma)
    # max over a dimension, unlike amax, sends the gradient to one place: the first of equals.
    means = F.avg_pool2d(full, pool, stride=1).flatten(1)
    return full.squeeze(1), means.max(dim=1).values
