"""Variational bottleneck in Triton. Formulas: csrc/core/gaussian_bottleneck.h; the noise: csrc/core/normal.h.

A program takes a block of rows. One Philox counter gives four normals 16 columns apart, so a tile of counters is four tiles
of elements and no word changes lanes. Backward draws the noise again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iumad_kernels.triton.launch import as_rows, compute_type, laid_out_as, launch, pow2
from iumad_kernels.triton.numerics import cos_sin_turns, double, log1p_unit, split
from iumad_kernels.triton.tuning import tuned


@triton.jit
def _box_muller(x, y, COMPUTE: tl.constexpr):
    """Two normals from two words."""
    # From 1/2 on the logarithm comes from 1 - u, which is exact: a GPU's own log loses all digits near 1.
    u = ((x >> 9).to(COMPUTE) + 0.5) * 1.1920928955078125e-07  # 2^-23
    log_u = tl.where(u < 0.5, tl.log(u), log1p_unit(tl.maximum(u - 1.0, -0.5)))
    radius = tl.sqrt(-2.0 * log_u)
    cos, sin = cos_sin_turns((y >> 9).to(COMPUTE) * 1.1920928955078125e-07)
    return radius * cos, radius * sin


@triton.jit
def _normals(seed, row, first, columns, lanes, COMPUTE: tl.constexpr):
    """The noise of columns ``first + at + 16 k``, k = 0 .. 3, of each row, and ``at``: where counter ``lane`` starts."""
    blocks = tl.cdiv(columns, 64)
    counter = 16 * (row * blocks + first // 64)[:, None] + lanes[None, :]
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed), counter)
    e0, e1 = _box_muller(w0.to(tl.uint32, bitcast=True), w1.to(tl.uint32, bitcast=True), COMPUTE)
    e2, e3 = _box_muller(w2.to(tl.uint32, bitcast=True), w3.to(tl.uint32, bitcast=True), COMPUTE)
    return (e0, e1, e2, e3), lanes // 16 * 64 + lanes % 16


@triton.jit
def _load(t, t_s, row, column, take, COMPUTE: tl.constexpr):
    return tl.load(t + row[:, None] * t_s[0] + column * t_s[1], take, other=0.0).to(COMPUTE)


@triton.jit
def _forward(
    mu, logvar, seed, sample, kl, mu_s, logvar_s, rows, columns, mean, scale, offset,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    lanes = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_R, BLOCK_K], COMPUTE)
    for first in range(0, columns, 4 * BLOCK_K):
        noise, at = _normals(seed, row, first, columns, lanes, COMPUTE)
        for k in tl.static_range(4):
            column = (first + at + 16 * k)[None, :].to(tl.int64)
            take = (row < rows)[:, None] & (column < columns)
            x = _load(mu, mu_s, row, column, take, COMPUTE)
            log_variance = _load(logvar, logvar_s, row, column, take, COMPUTE)
            sigma = tl.exp(0.5 * log_variance)
            away = x - double(mean, COMPUTE)
            term = (sigma * sigma + away * away) * double(scale, COMPUTE) + (
                double(offset, COMPUTE) - log_variance
            )
            total += tl.where(take, term, 0.0)
            tl.store(sample + row[:, None] * columns + column, x + sigma * noise[k], take)
    tl.store(kl + row, 0.5 * tl.sum(total, 1), row < rows)


@triton.jit
def _backward(
    dsample, dkl, mu, logvar, seed, dmu, dlogvar, dsample_s, dkl_s, mu_s, logvar_s, rows, columns, mean, scale, offset,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    lanes = tl.arange(0, BLOCK_K)
    g = tl.zeros([BLOCK_R], COMPUTE) if dkl is None else tl.load(dkl + row * dkl_s, row < rows, other=0.0)
    for first in range(0, columns, 4 * BLOCK_K):
        noise, at = _normals(seed, row, first, columns, lanes, COMPUTE)
        for k in tl.static_range(4):
            column = (first + at + 16 * k)[None, :].to(tl.int64)
            take = (row < rows)[:, None] & (column < columns)
            x = _load(mu, mu_s, row, column, take, COMPUTE)
            sigma = tl.exp(0.5 * _load(logvar, logvar_s, row, column, take, COMPUTE))
            to_mu = g[:, None] * ((x - double(mean, COMPUTE)) * double(scale, COMPUTE))
            to_logvar = g[:, None] * (sigma * sigma * double(scale, COMPUTE) - 1.0)
            if dsample is not None:
                ds = _load(dsample, dsample_s, row, column, take, COMPUTE)
                to_mu += ds
                to_logvar += ds * sigma * noise[k]
            at_element = row[:, None] * columns + column
            tl.store(dmu + at_element, to_mu, take)
            tl.store(dlogvar + at_element, 0.5 * to_logvar, take)


def _common(mu: Tensor, logvar: Tensor, seed: Tensor, prior_mean: float, prior_std: float) -> dict[str, Any]:
    """What forward and backward both take. A block is 256 counters: four loads of 16 bytes a thread."""
    rows, rows_logvar = as_rows(mu), as_rows(logvar)
    block_k = 16 * pow2(-(-mu.shape[-1] // 64), at_most=16)
    return {
        "mu": rows, "logvar": rows_logvar, "seed": seed, "mu_s": rows.stride(), "logvar_s": rows_logvar.stride(),
        "rows": rows.shape[0] if mu.shape[-1] else mu.shape[:-1].numel(), "columns": mu.shape[-1],
        "mean": split(prior_mean), "scale": split(prior_std**-2), "offset": split(2 * math.log(prior_std) - 1),
        "COMPUTE": compute_type(mu)[1],
    } | tuned("gaussian_bottleneck", {"BLOCK_R": 256 // block_k, "BLOCK_K": block_k, "num_warps": 2})  # fmt: skip


def _programs(common: dict[str, Any]) -> int:
    return -(-common["rows"] // common["BLOCK_R"])


def forward(
    mu: Tensor, logvar: Tensor, seed: Tensor, prior_mean: float, prior_std: float
) -> tuple[Tensor, Tensor]:
    """torch.ops.iumad.gaussian_bottleneck."""
    common = _common(mu, logvar, seed, prior_mean, prior_std)
    sample = torch.empty_like(mu, memory_format=torch.contiguous_format)
    kl = mu.new_empty(mu.shape[:-1], dtype=compute_type(mu)[0])
    launch(_forward, _programs(common), mu, **common, sample=sample, kl=kl)
    return laid_out_as(mu, sample), kl


def backward(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    prior_mean: float,
    prior_std: float,
) -> tuple[Tensor, Tensor]:
    """torch.ops.iumad.gaussian_bottleneck_backward."""
    common = _common(mu, logvar, seed, prior_mean, prior_std)
    dmu, dlogvar = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (mu, logvar))
    dsample = None if grad_sample is None else as_rows(grad_sample)
    dkl = None if grad_kl is None else grad_kl.reshape(-1)
    launch(
        _backward, _programs(common), mu, **common, dsample=dsample, dkl=dkl, dmu=dmu, dlogvar=dlogvar,
        dsample_s=None if dsample is None else dsample.stride(), dkl_s=0 if dkl is None else dkl.stride(0),
    )  # fmt: skip
    return laid_out_as(mu, dmu), laid_out_as(logvar, dlogvar)
