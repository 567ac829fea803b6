"""The linear maps of the anomaly map as tables for kernels: bilinear interpolation, Gaussian smoothing, means over windows.

All three are one sparse matrix per axis (csrc/core/anomaly_map.h): row ``i`` has its entries in a run of columns
``start[i] ... stop[i] - 1``. Tables depend on sizes alone and are kept: a call costs no transfer to the GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """A matrix by rows: ``weight[i, t]`` stands at column ``start[i] + t``, up to ``stop[i]``."""

    start: Tensor  # int32
    stop: Tensor  # int32
    weight: Tensor  # (rows, most entries of a row)


def _bilinear(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Interpolation with align_corners, and which of its entries count even where they are 0 (0 * inf is NaN, as in torch)."""
    if inputs == outputs:  # a copy, as in torch
        return torch.eye(inputs, dtype=torch.float64), torch.eye(inputs, dtype=torch.bool)
    row = torch.arange(outputs)
    position = row.double() * (inputs - 1) / max(outputs - 1, 1)
    low = position.long()
    high = (low + 1).clamp_max(inputs - 1)
    matrix = torch.zeros(outputs, inputs, dtype=torch.float64)
    matrix[row, high] += position - low
    matrix[row, low] += 1 - (position - low)
    used = torch.zeros_like(matrix, dtype=torch.bool)
    used[row, high] = used[row, low] = True
    return matrix, used


def _smoothed(matrix: Tensor, sigma: float) -> Tensor:
    """A Gaussian over the rows, cut off at round(4 sigma), borders mirrored (the defaults of scipy.ndimage.gaussian_filter)."""
    n, radius = matrix.shape[0], int(4 * sigma + 0.5)
    steps = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (steps.double() / sigma) ** 2)
    result = torch.zeros_like(matrix)
    for step, weight in zip(steps, kernel / kernel.sum()):
        place = (torch.arange(n) + step) % (2 * n)
        result += weight * matrix[torch.where(place < n, place, 2 * n - 1 - place)]
    return result


def _table(matrix: Tensor, used: Tensor, device: torch.device, dtype: torch.dtype) -> Table:
    """The rows' runs of entries in use; every row has some."""
    columns = matrix.shape[1]
    start = used.int().argmax(1)
    stop = columns - used.flip(1).int().argmax(1)
    at = start[:, None] + torch.arange(int((stop - start).max()))
    weight = matrix.gather(1, at.clamp_max(columns - 1)).where(at < stop[:, None], 0.0)
    return Table(start.int().to(device), stop.int().to(device), weight.to(device, dtype))


@functools.lru_cache(maxsize=64)
def tables(
    inputs: int, outputs: int, sigma: float, window: int, device: torch.device, dtype: torch.dtype
) -> tuple[Table, Table, Table]:
    """(the map from the features, the mean over a window from the features, the features' gradient from the map's)."""
    matrix, used = _bilinear(inputs, outputs)
    if sigma > 0:
        matrix = _smoothed(matrix, sigma)
        used = matrix != 0
    means, used_by_means = (t.unfold(0, window, 1) for t in (matrix, used))
    back = used.t().clone()
    back[:, 0] |= ~back.any(1)  # a pixel that no map pixel uses: one entry, of weight 0
    return (
        _table(matrix, used, device, dtype),
        _table(means.mean(-1), used_by_means.any(-1), device, dtype),
        _table(matrix.t().contiguous(), back, device, dtype),
    )
