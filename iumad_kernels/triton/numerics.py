"""Functions of the kernels that Triton's language lacks or rounds too coarsely. Float32 or float64 in, the same out."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1, to about 2 units in the last place, also for tiny e: the odd series of 2 atanh(e / (2 + e))."""
    s = e / (2.0 + e)
    s2 = s * s
    # s2 <= 1/9: a term more is worth a factor of 9.
    TERMS: tl.constexpr = 17 if e.dtype == tl.float64 else 8
    series = tl.full(e.shape, 1.0 / (2 * TERMS + 1), e.dtype)
    for k in tl.static_range(TERMS):
        series = series * s2 + 1.0 / (2 * (TERMS - k) - 1)
    return 2.0 * s * series


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow for large x and without cancellation for small."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr, COMPUTE: tl.constexpr):
    """Matrix product of two tiles on tensor cores, added up in COMPUTE."""
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16
        a, b = a.to(COMPUTE), b.to(COMPUTE)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=COMPUTE)


def split(x: float) -> tuple[float, float]:
    """A Python float as two that survive Triton's float32 arguments; a kernel joins them with :func:`double`."""
    high = float(torch.tensor(x, dtype=torch.float32))
    return high, x - high if math.isfinite(x) else 0.0


@triton.jit
def double(parts, COMPUTE: tl.constexpr):
    """The number whose parts :func:`split` made, in float64 or rounded to float32."""
    high, low = parts
    return tl.full((), high, COMPUTE) + tl.full((), low, COMPUTE)
