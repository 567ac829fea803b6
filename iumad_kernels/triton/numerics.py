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
    """log(1 + e) for -1/2 <= e <= 1, to about 2 units in the last place, also for tiny e: the series of 2 atanh(e / (2 + e))."""
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
def cos_sin_turns(turns):
    """Cosine and sine of 2 pi ``turns``, 0 <= turns <= 1: Taylor series on the eighth of a turn around each quarter.

    (Triton's own would carry along the reduction of huge angles, and its scratch memory.)
    """
    quarter = tl.floor(4.0 * turns + 0.5)
    x = (turns - 0.25 * quarter) * 6.283185307179586  # the difference is exact
    x2 = x * x
    TERMS: tl.constexpr = 9 if turns.dtype == tl.float64 else 5
    cos, sin = tl.full(x.shape, 1.0, x.dtype), tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(TERMS):
        cos = 1.0 - x2 * cos * (0.5 / ((TERMS - k) * (2 * (TERMS - k) - 1)))
        sin = 1.0 - x2 * sin * (0.5 / ((TERMS - k) * (2 * (TERMS - k) + 1)))
    sin *= x
    q = quarter.to(tl.int32)
    odd, flip_cos, flip_sin = q % 2 == 1, (q == 1) | (q == 2), (q == 2) | (q == 3)
    c, s = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(flip_cos, -c, c), tl.where(flip_sin, -s, s)


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
