"""Anomaly map and image score in Triton. Formulas: csrc/core/anomaly_map.h.

Map and window means are linear in the distances (a few per image), so each is computed from those with the tables of
resampling.py: the means never read the map, and their gradient needs one row and one column of a table. No atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iumad_kernels.ops.grids import empty_grid
from iumad_kernels.triton.launch import compute_type, launch, pow2
from iumad_kernels.triton.resampling import Table, tables
from iumad_kernels.triton.tiles import locate, programs, sizes
from iumad_kernels.triton.tuning import tuned

WINDOWS = 512  # of a program that looks for the best of them


@triton.jit
def _difference(features, reference, features_s, reference_s, b, row, column, c, take, COMPUTE: tl.constexpr):
    """``features - reference`` at pixels (rows, columns) and channels c."""
    at = (
        b * features_s[0]
        + c * features_s[1]
        + row.to(tl.int64) * features_s[2]
        + column.to(tl.int64) * features_s[3]
    )
    x = tl.load(features + at, take, other=0.0).to(COMPUTE)
    at = (
        b * reference_s[0]
        + c * reference_s[1]
        + row.to(tl.int64) * reference_s[2]
        + column.to(tl.int64) * reference_s[3]
    )
    return x - tl.load(reference + at, take, other=0.0).to(COMPUTE)


@triton.jit
def _distances(
    features, reference, distance, features_s, reference_s, channels, rows, columns,
    AXIS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    pixels = rows * columns
    b, p, c = locate(pixels, 1, BLOCK_P, BLOCK_C, AXIS)
    row, column = p // columns, p % columns
    total = tl.zeros((p + c).shape, COMPUTE)
    for first in range(0, channels, BLOCK_C):
        take = (p < pixels) & (c + first < channels)
        x = _difference(
            features, reference, features_s, reference_s, b, row, column, c + first, take, COMPUTE
        )
        total += x * x
    sums = tl.expand_dims(tl.sum(total, AXIS), AXIS)
    tl.store(distance + b * pixels + p, tl.sqrt(sums), p < pixels)


@triton.jit
def _resampled(distance, Y, X, y, x, take, columns, COMPUTE: tl.constexpr):
    """sum_ij Y(y, i) X(x, j) distance(i, j) for every pair (y, x)."""
    y_start, y_stop, y_weight, y_most = Y
    x_start, x_stop, x_weight, x_most = X
    i, i_end = tl.load(y_start + y, take, other=0), tl.load(y_stop + y, take, other=0)
    j, j_end = tl.load(x_start + x, take, other=0), tl.load(x_stop + x, take, other=0)
    total = tl.zeros(y.shape, COMPUTE)
    for s in range(y_most):
        line = tl.zeros(y.shape, COMPUTE)
        for t in range(x_most):
            here = (i + s < i_end) & (j + t < j_end)
            w = tl.load(x_weight + x * x_most + t, take, other=0.0)
            line += w * tl.load(distance + (i + s) * columns + j + t, here, other=0.0)
        total += tl.load(y_weight + y * y_most + s, take, other=0.0) * line
    return total


@triton.jit
def _map(distance, Y, X, full, rows, columns, height, width, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    pixels = height * width
    blocks = tl.cdiv(pixels, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    b, p = program // blocks, (program % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    value = _resampled(
        distance + b * rows * columns, Y, X, p // width, p % width, p < pixels, columns, COMPUTE
    )
    tl.store(full + b * pixels + p, value, p < pixels)


@triton.jit
def _first_largest(value, place, take):
    """The largest of the values taken, NaN above all, and the first place that has it."""
    nan = take & (value != value)
    best = tl.max(tl.where(take & (value == value), value, float("-inf")), 0)
    any_nan = tl.max(nan.to(tl.int32), 0) > 0
    chosen = tl.where(any_nan, nan, take & (value == best))
    return tl.where(any_nan, float("nan"), best), tl.min(tl.where(chosen, place, 0x7FFFFFFF), 0)


@triton.jit
def _windows(
    distance, Y, X, values, places, rows, columns, windows_y, windows_x, width,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The best window mean of a block of windows."""
    windows = windows_y * windows_x
    blocks = tl.cdiv(windows, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    b, p = program // blocks, (program % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    y, x = p // windows_x, p % windows_x
    mean = _resampled(distance + b * rows * columns, Y, X, y, x, p < windows, columns, COMPUTE)
    best, place = _first_largest(mean, y * width + x, p < windows)
    tl.store(values + program, best)
    tl.store(places + program, place)


@triton.jit
def _best(values, places, score, peak, blocks, BLOCK: tl.constexpr):
    """The best of an image's blocks."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    value = tl.load(values + b * blocks + lane, lane < blocks, other=0.0)
    place = tl.load(places + b * blocks + lane, lane < blocks, other=0)
    best, first = _first_largest(value, place, lane < blocks)
    tl.store(score + b, best)
    tl.store(peak + b, first.to(tl.int64))


@triton.jit
def _entry(table, row, column):
    """The matrix at (row, column)."""
    start, stop, weight, most = table
    t = column - tl.load(start + row)
    return tl.load(weight + row * most + t, (t >= 0) & (column < tl.load(stop + row)), other=0.0)


@triton.jit
def _distance_gradient(
    dmap, dscore, peak, Yt, Xt, Y_means, X_means, result, dmap_s, dscore_s, rows, columns, width,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Gradient of one distance: the map's pixels that use it, and the best window if that does."""
    program = tl.program_id(0).to(tl.int64)
    b = program // (rows * columns)
    i, j = (program // columns % rows).to(tl.int32), (program % columns).to(tl.int32)
    total = tl.zeros([BLOCK], COMPUTE)
    if dmap is not None:
        y_start, y_stop, y_weight, y_most = Yt
        x_start, x_stop, x_weight, x_most = Xt
        y_first, x_first, x_end = tl.load(y_start + i), tl.load(x_start + j), tl.load(x_stop + j)
        for y in range(y_first, tl.load(y_stop + i)):
            w = tl.load(y_weight + i * y_most + y - y_first)
            for first in range(x_first, x_end, BLOCK):
                x = first + tl.arange(0, BLOCK)
                g = tl.load(dmap + b * dmap_s[0] + y * dmap_s[1] + x * dmap_s[2], x < x_end, other=0.0)
                total += w * tl.load(x_weight + j * x_most + x - x_first, x < x_end, other=0.0) * g
    gradient = tl.sum(total, 0)
    if dscore is not None:
        place = tl.load(peak + b).to(tl.int32)
        share = _entry(Y_means, place // width, i) * _entry(X_means, place % width, j)
        gradient += tl.load(dscore + b * dscore_s) * share
    tl.store(result + program, gradient)


@triton.jit
def _feature_gradients(
    features, reference, distance, gradient, dfeatures, dreference,
    features_s, reference_s, dfeatures_s, dreference_s, channels, rows, columns,
    AXIS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    pixels = rows * columns
    b, p, c = locate(pixels, channels, BLOCK_P, BLOCK_C, AXIS)
    row, column = p // columns, p % columns
    take = (p < pixels) & (c < channels)
    d = tl.load(distance + b * pixels + p, p < pixels, other=0.0)
    factor = tl.load(gradient + b * pixels + p, p < pixels, other=0.0) / d
    factor = tl.where(d == 0.0, 0.0, factor)  # the norm's subgradient
    g = factor * _difference(features, reference, features_s, reference_s, b, row, column, c, take, COMPUTE)
    if dfeatures is not None:
        at = (
            b * dfeatures_s[0]
            + c * dfeatures_s[1]
            + row.to(tl.int64) * dfeatures_s[2]
            + column.to(tl.int64) * dfeatures_s[3]
        )
        tl.store(dfeatures + at, g, take)
    if dreference is not None:
        at = b * dreference_s[0] + c * dreference_s[1] + row.to(tl.int64) * dreference_s[2]
        tl.store(dreference + at + column.to(tl.int64) * dreference_s[3], -g, take)


def _argument(table: Table) -> tuple[Tensor, Tensor, Tensor, int]:
    return *table, table.weight.shape[1]


def _common(features: Tensor, reference: Tensor) -> dict[str, Any]:
    """What the kernels that read features take."""
    return {
        "features": features, "reference": reference, "features_s": features.stride(), "reference_s": reference.stride(),
        "channels": features.shape[1], "rows": features.shape[2], "columns": features.shape[3],
        "COMPUTE": compute_type(features)[1],
    }  # fmt: skip


def forward(
    features: Tensor, reference: Tensor, height: int, width: int, pool: int, sigma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.iumad.anomaly_map."""
    batch, _, h, w = features.shape
    dtype, compute = compute_type(features)
    Y, Y_means, _ = tables(h, height, sigma, pool, features.device, dtype)
    X, X_means, _ = tables(w, width, sigma, pool, features.device, dtype)
    distance = features.new_empty((batch, h, w), dtype=dtype)
    size = tuned("anomaly_map", sizes(features, h * w) | {"num_warps": 4})
    launch(
        _distances,
        programs(batch, h * w, 1, size),
        features,
        **_common(features, reference),
        **size,
        distance=distance,
    )

    full = features.new_empty((batch, height, width), dtype=dtype)
    grid = {"distance": distance, "rows": h, "columns": w, "width": width, "COMPUTE": compute}
    block = pow2(height * width, at_most=512)
    launch(
        _map, batch * -(-height * width // block), features, **grid,
        Y=_argument(Y), X=_argument(X), full=full, height=height, BLOCK=block,
    )  # fmt: skip

    windows_y, windows_x = height - pool + 1, width - pool + 1
    block = pow2(windows_y * windows_x, at_most=WINDOWS)
    blocks = -(-windows_y * windows_x // block)
    values = distance.new_empty((batch, blocks))
    places = distance.new_empty((batch, blocks), dtype=torch.int32)
    launch(
        _windows, batch * blocks, features, **grid, Y=_argument(Y_means), X=_argument(X_means),
        values=values, places=places, windows_y=windows_y, windows_x=windows_x, BLOCK=block,
    )  # fmt: skip
    score, peak = distance.new_empty((batch,)), distance.new_empty((batch,), dtype=torch.int64)
    launch(
        _best,
        batch,
        features,
        values=values,
        places=places,
        score=score,
        peak=peak,
        blocks=blocks,
        BLOCK=pow2(blocks),
    )
    return full, score, distance, peak


def backward(
    grad_map: Tensor | None,
    grad_score: Tensor | None,
    features: Tensor,
    reference: Tensor,
    distance: Tensor,
    peak: Tensor,
    height: int,
    width: int,
    pool: int,
    sigma: float,
    needs_features: bool,
    needs_reference: bool,
) -> tuple[Tensor, Tensor]:
    """torch.ops.iumad.anomaly_map_backward."""
    batch, channels, h, w = features.shape
    dtype, compute = compute_type(features)
    _, Y_means, Yt = tables(h, height, sigma, pool, features.device, dtype)
    _, X_means, Xt = tables(w, width, sigma, pool, features.device, dtype)
    gradient = torch.empty_like(distance)
    launch(
        _distance_gradient, distance.numel(), features, dmap=grad_map, dscore=grad_score, peak=peak,
        Yt=_argument(Yt), Xt=_argument(Xt), Y_means=_argument(Y_means), X_means=_argument(X_means), result=gradient,
        dmap_s=None if grad_map is None else grad_map.stride(), dscore_s=0 if grad_score is None else grad_score.stride(0),
        rows=h, columns=w, width=width, BLOCK=pow2(Xt.weight.shape[1], at_most=128), COMPUTE=compute, num_warps=1,
    )  # fmt: skip
    dfeatures = empty_grid(features, h, w) if needs_features else None
    dreference = empty_grid(reference, h, w) if needs_reference else None
    size = tuned("anomaly_map", sizes(features, h * w) | {"num_warps": 4})
    launch(
        _feature_gradients, programs(batch, h * w, channels, size), features, **_common(features, reference), **size,
        distance=distance, gradient=gradient, dfeatures=dfeatures, dreference=dreference,
        dfeatures_s=None if dfeatures is None else dfeatures.stride(),
        dreference_s=None if dreference is None else dreference.stride(),
    )  # fmt: skip
    return (
        features.new_empty((0, 0, 0, 0)) if dfeatures is None else dfeatures,
        reference.new_empty((0, 0, 0, 0)) if dreference is None else dreference,
    )
