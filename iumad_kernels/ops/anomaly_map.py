"""Anomaly map and image score from two feature grids."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from iumad_kernels import reference as plain
from iumad_kernels.backend import implement, select
from iumad_kernels.ops.checks import check_floating, check_shape
from iumad_kernels.ops.derivatives import differentiable_op, gradient_op
from iumad_kernels.ops.grids import empty_grid

implement("anomaly_map", "cpu")


def anomaly_map(
    features: Tensor, reference: Tensor, size: int | tuple[int, int], *, pool: int = 16, sigma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Distance of two feature grids at every location, brought to image size, and its largest window mean.

    The L2 norm of ``features - reference`` over the channels, interpolated bilinearly (``align_corners=True``) and, where
    asked, smoothed by a Gaussian; the score of an image is the maximum of the pool x pool stride-1 average of its map.

    Args:
        features, reference: (batch, channels, h, w), h and w >= 1. Any strides; both contiguous is the fast layout.
        size: (H, W) of the map in pixels, or one number for both.
        pool: side of the averaging window in pixels, 1 <= pool <= min(H, W).
        sigma: of the Gaussian in pixels of the map, 0: none. Cut off at round(4 sigma) pixels, borders mirrored with the
            border pixel repeated, as ``scipy.ndimage.gaussian_filter`` does.

    Returns:
        map (batch, H, W) and score (batch,), both float32 (float64 for float64 inputs), both differentiable. The gradient of the
        score goes to one window, the first (row by row) of those that reach the maximum; that of the norm is 0 where the
        distance is 0.

    float32, bfloat16 and float16 may be mixed (autocast changes nothing); float64 only with float64. One read of both inputs
    and one write of the map; no other array of the map's size exists. Kept for backward: the inputs, the (batch, h, w) distances
    and the place of the window. Results do not depend on the thread count. Raises TypeError or ValueError naming the argument.
    Source: paper.md 2.3 (E10) and 1.6.

    >>> maps, scores = anomaly_map(torch.randn(2, 8, 14, 14), torch.randn(2, 8, 14, 14), 224)
    >>> maps.shape, scores.shape
    (torch.Size([2, 224, 224]), torch.Size([2]))
    """
    op = "anomaly_map"
    check_floating(op, features=features, reference=reference)
    check_shape(op, "features", features, (None, None, None, None), legend="(batch, channels, h, w)")
    check_shape(op, "reference", reference, tuple(features.shape), legend="the shape of features")
    if 0 in features.shape[2:]:
        raise ValueError(f"{op}: features has shape {tuple(features.shape)}, expected h >= 1 and w >= 1")
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"{op}: size = {size!r}, expected numbers >= 1")
    if not 1 <= pool <= min(height, width):
        raise ValueError(
            f"{op}: pool = {pool!r}, expected 1 <= pool <= {min(height, width)}, the side of the map"
        )
    if not 0 <= sigma < math.inf:
        raise ValueError(f"{op}: sigma = {sigma!r}, expected a finite number >= 0")

    if select(op, features.device) == "reference":
        return plain.anomaly_map(features, reference, (height, width), pool=pool, sigma=sigma)
    full, score, _, _ = _anomaly_map(features, reference, height, width, pool, float(sigma))
    return full, score


@torch.library.register_fake("iumad::anomaly_map")
def _fake(
    features: Tensor, reference: Tensor, height: int, width: int, pool: int, sigma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, h, w = features.shape
    compute = torch.promote_types(features.dtype, torch.float32)
    return (
        features.new_empty((batch, height, width), dtype=compute),
        features.new_empty((batch,), dtype=compute),
        features.new_empty((batch, h, w), dtype=compute),
        features.new_empty((batch,), dtype=torch.int64),
    )


@torch.library.register_fake("iumad::anomaly_map_backward")
def _fake_backward(
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
    h, w = features.shape[2:]

    def gradient(t: Tensor, needed: bool) -> Tensor:
        return empty_grid(t, h, w) if needed else t.new_empty((0, 0, 0, 0))

    return gradient(features, needs_features), gradient(reference, needs_reference)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    features, reference, *ctx.options = inputs
    _, _, distance, peak = output
    ctx.save_for_backward(features, reference, distance, peak)
    ctx.mark_non_differentiable(distance, peak)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_map: Tensor | None, grad_score: Tensor | None, *_: None) -> tuple[Any, ...]:
    needs_features, needs_reference = ctx.needs_input_grad[:2]
    dfeatures, dreference = _gradients(
        grad_map, grad_score, *ctx.saved_tensors, *ctx.options, needs_features, needs_reference
    )
    return (dfeatures if needs_features else None, dreference if needs_reference else None, *(None,) * 4)


_gradients = gradient_op("anomaly_map_backward")
_anomaly_map = differentiable_op(torch.ops.iumad.anomaly_map.default, _setup_context, _backward)
