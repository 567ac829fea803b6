"""Divergence of two categorical distributions and the bottleneck loss in Triton. Formulas: csrc/core/kl_bottleneck.h.

A program takes one row and walks its classes three times (maxima, sums, and for Jensen-Shannon the mixture); after the
first time the row comes from the caches. A last program adds the rows up in their order. Labels are not checked on the
GPU, which would have to wait for it: one outside of the classes gives NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iumad_kernels.triton.launch import as_rows, compute_type, laid_out_as, launch, pow2
from iumad_kernels.triton.numerics import LOG2E, double, log1p_unit, split
from iumad_kernels.triton.tuning import tuned

STATS = (
    9  # p_max, p_scale, q_max, q_scale, p_divergence, q_divergence, p_scale_ce, q_scale_ce, taken: RowStats
)
NONE, SUM, MEAN, BATCHMEAN = range(4)  # REDUCTIONS of iumad_kernels/ops/kl_bottleneck.py


@triton.jit
def _load_pair(p, q, mask, p_s, q_s, mask_s, row, j, classes, COMPUTE: tl.constexpr):
    """A stretch of both rows, and which of it takes part; what does not is -inf."""
    taken = j < classes
    if mask is not None:
        taken &= tl.load(mask + row * mask_s[0] + j * mask_s[1], taken, other=0) != 0
    x = tl.load(p + row * p_s[0] + j * p_s[1], taken, other=float("-inf")).to(COMPUTE)
    y = tl.load(q + row * q_s[0] + j * q_s[1], taken, other=float("-inf")).to(COMPUTE)
    return x, y, taken


@triton.jit
def _exp(x, factor):
    """exp(factor x) of a distance to the maximum."""
    return tl.exp2(x * (factor * LOG2E))


@triton.jit
def _log_mixture(log_p, log_q, log_beta, log_rest):
    """log(beta p + (1 - beta) q), finite wherever p or q is not zero."""
    a, b = log_p + log_beta, log_q + log_rest
    high = tl.maximum(a, b)
    return high + log1p_unit(tl.exp(-tl.abs(a - b)))


@triton.jit
def _log_or_zero(mass):
    return tl.log(tl.where(mass == 0.0, 1.0, mass))


@triton.jit
def _inverse(mass):
    return tl.where(mass == 0.0, 0.0, 1.0 / mass)  # a row without mass stays without


@triton.jit
def _forward(
    p, q, labels, mask, stats, losses, p_s, q_s, mask_s, label_stride, classes, inverse_t, beta, log_beta, log_rest,
    MIXED: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    r = double(inverse_t, COMPUTE)
    lanes = tl.arange(0, BLOCK)
    p_top = tl.full([BLOCK], float("-inf"), COMPUTE)
    q_top = tl.full([BLOCK], float("-inf"), COMPUTE)
    count = tl.zeros([BLOCK], tl.int32)
    misses = tl.zeros([BLOCK], tl.int32)
    for first in range(0, classes, BLOCK):
        x, y, taken = _load_pair(p, q, mask, p_s, q_s, mask_s, row, first + lanes, classes, COMPUTE)
        p_top, q_top = tl.maximum(p_top, x), tl.maximum(q_top, y)
        count += taken.to(tl.int32)
        misses += ((y == float("-inf")) & (x != float("-inf"))).to(tl.int32)
    p_max, q_max = tl.max(p_top, 0), tl.max(q_top, 0)
    p_max = tl.where(p_max == float("-inf"), 0.0, p_max)
    q_max = tl.where(q_max == float("-inf"), 0.0, q_max)
    sum_p, sum_q = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    sum_p1, sum_q1 = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    moment = tl.zeros([BLOCK], COMPUTE)
    for first in range(0, classes, BLOCK):
        x, y, _ = _load_pair(p, q, mask, p_s, q_s, mask_s, row, first + lanes, classes, COMPUTE)
        dead = (x == float("-inf")) | (y == float("-inf"))
        x, y = x - p_max, y - q_max
        e = _exp(x, r)
        sum_p += e
        sum_q += _exp(y, r)
        moment += tl.where(dead, 0.0, e * (x - y))
        if labels is not None:
            sum_p1 += _exp(x, 1.0)
            sum_q1 += _exp(y, 1.0)
    p_mass, q_mass = tl.sum(sum_p, 0), tl.sum(sum_q, 0)
    p_log, q_log = _log_or_zero(p_mass), _log_or_zero(q_mass)
    q_divergence = p_mass * 0.0
    if MIXED:
        p_terms, q_terms = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
        for first in range(0, classes, BLOCK):
            x, y, _ = _load_pair(p, q, mask, p_s, q_s, mask_s, row, first + lanes, classes, COMPUTE)
            no_p, no_q = x == float("-inf"), y == float("-inf")
            x, y = x - p_max, y - q_max
            log_p, log_q = x * r - p_log, y * r - q_log
            log_m = _log_mixture(log_p, log_q, double(log_beta, COMPUTE), double(log_rest, COMPUTE))
            p_terms += tl.where(no_p, 0.0, _exp(x, r) * _inverse(p_mass) * (log_p - log_m))
            q_terms += tl.where(no_q, 0.0, _exp(y, r) * _inverse(q_mass) * (log_q - log_m))
        p_divergence, q_divergence = tl.sum(p_terms, 0), tl.sum(q_terms, 0)
        b = double(beta, COMPUTE)
        divergence = b * p_divergence + (1.0 - b) * q_divergence
    else:
        divergence = tl.sum(moment, 0) * _inverse(p_mass) * r - p_log + q_log
        divergence = tl.where(p_mass == 0.0, 0.0, divergence)
        infinite = (tl.sum(misses, 0) > 0) & (p_mass == p_mass) & (q_mass == q_mass)
        divergence = tl.where(infinite, float("inf"), divergence)
        p_divergence = divergence
    stats += row * 9
    tl.store(stats, p_max)
    tl.store(stats + 1, _inverse(p_mass))
    tl.store(stats + 2, q_max)
    tl.store(stats + 3, _inverse(q_mass))
    tl.store(stats + 4, p_divergence)
    tl.store(stats + 5, q_divergence)
    number = tl.sum(count, 0)
    tl.store(stats + 8, number.to(COMPUTE))
    tl.store(stats + 6, _inverse(tl.sum(sum_p1, 0)))
    tl.store(stats + 7, _inverse(tl.sum(sum_q1, 0)))
    losses += row * 3
    tl.store(losses, tl.where(number > 0, divergence, 0.0))
    if labels is not None:
        p_sum, q_sum = tl.sum(sum_p1, 0), tl.sum(sum_q1, 0)
        label = tl.load(labels + row * label_stride)
        valid = (label >= 0) & (label < classes)
        here = tl.where(valid, label, 0)
        x, y, _ = _load_pair(p, q, mask, p_s, q_s, mask_s, row, here + tl.arange(0, 1), classes, COMPUTE)
        nan = tl.where(valid, 0.0, float("nan"))
        p_ce = _log_or_zero(p_sum) - (tl.sum(x, 0) - p_max) + nan
        q_ce = _log_or_zero(q_sum) - (tl.sum(y, 0) - q_max) + nan
        tl.store(losses + 1, tl.where(number > 0, p_ce, 0.0))
        tl.store(losses + 2, tl.where(number > 0, q_ce, 0.0))


@triton.jit
def _total(
    losses, stats, total, kl, p_ce, q_ce, rows, kl_weight, ce_weight,
    REDUCTION: tl.constexpr, LABELS: tl.constexpr, USE_KL: tl.constexpr, USE_CE: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sums of the rows, in float64, divided as the reduction asks: the losses as users see them."""
    lanes = tl.arange(0, BLOCK)
    sum_kl, sum_p, sum_q = (
        tl.zeros([BLOCK], tl.float64),
        tl.zeros([BLOCK], tl.float64),
        tl.zeros([BLOCK], tl.float64),
    )
    count_rows, count = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, rows, BLOCK):
        row = (first + lanes).to(tl.int64)
        inside = row < rows
        sum_kl += tl.load(losses + row * 3, inside, other=0.0)
        if LABELS:
            sum_p += tl.load(losses + row * 3 + 1, inside, other=0.0)
            sum_q += tl.load(losses + row * 3 + 2, inside, other=0.0)
        taken = tl.load(stats + row * 9 + 8, inside, other=0.0)
        count += taken
        count_rows += (taken > 0).to(tl.float64)
    divisor = tl.sum(count_rows, 0) * 0.0 + 1.0
    if REDUCTION == 2:
        divisor = tl.sum(count, 0)
    if REDUCTION == 3:
        divisor = tl.sum(count_rows, 0)
    scale = 1.0 / tl.where(divisor > 0.0, divisor, 1.0)
    mean_kl, mean_p, mean_q = tl.sum(sum_kl, 0) * scale, tl.sum(sum_p, 0) * scale, tl.sum(sum_q, 0) * scale
    tl.store(kl, mean_kl)
    if total is not None:  # a weight of 0 switches a term off, also one that is infinite
        result = mean_kl * double(kl_weight, tl.float64) if USE_KL else scale * 0.0
        if USE_CE:
            result += (mean_p + mean_q) * double(ce_weight, tl.float64)
        tl.store(total, result)
        tl.store(p_ce, mean_p)
        tl.store(q_ce, mean_q)


@triton.jit
def _grad(g, COMPUTE: tl.constexpr):
    """A scalar gradient, 0 where there is none."""
    return tl.full((), 0.0, COMPUTE) if g is None else tl.load(g).to(COMPUTE)


@triton.jit
def _backward(
    grad_total, grad_kl, grad_p_ce, grad_q_ce, p, q, labels, mask, stats, divisor, dp, dq,
    p_s, q_s, mask_s, dp_s, dq_s, label_stride, grad_stride, classes,
    inverse_t, beta, log_beta, log_rest, scale, kl_weight, ce_weight,
    MIXED: tl.constexpr, PER_ROW: tl.constexpr, THROUGH_P: tl.constexpr, USE_KL: tl.constexpr, USE_CE: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stats += row * 9
    p_max, p_scale, q_max, q_scale = (
        tl.load(stats),
        tl.load(stats + 1),
        tl.load(stats + 2),
        tl.load(stats + 3),
    )
    p_divergence, q_divergence, taken = tl.load(stats + 4), tl.load(stats + 5), tl.load(stats + 8)
    r, b = double(inverse_t, COMPUTE), double(beta, COMPUTE)
    factor = double(scale, COMPUTE)
    if divisor is not None:
        n = tl.load(divisor).to(COMPUTE)
        factor = 1.0 / tl.where(n > 0.0, n, 1.0)
    if PER_ROW:
        slope = tl.load(grad_kl + row * grad_stride).to(COMPUTE) * r
    else:
        slope = _grad(grad_kl, COMPUTE)
        if USE_KL:
            slope += _grad(grad_total, COMPUTE) * double(kl_weight, COMPUTE)
        slope *= factor * r
    if labels is not None:
        p_ce, q_ce = _grad(grad_p_ce, COMPUTE), _grad(grad_q_ce, COMPUTE)
        if USE_CE:
            p_ce += _grad(grad_total, COMPUTE) * double(ce_weight, COMPUTE)
            q_ce += _grad(grad_total, COMPUTE) * double(ce_weight, COMPUTE)
        p_ce = tl.where(taken > 0.0, p_ce * factor, 0.0)
        q_ce = tl.where(taken > 0.0, q_ce * factor, 0.0)
        label = tl.load(labels + row * label_stride)
        p_scale_ce, q_scale_ce = tl.load(stats + 6), tl.load(stats + 7)
    p_slope = tl.where(p_divergence == float("inf"), 0.0, slope) if THROUGH_P else slope * 0.0
    p_log, q_log = -_log_or_zero(p_scale), -_log_or_zero(q_scale)
    for first in range(0, classes, BLOCK):
        j = first + tl.arange(0, BLOCK)
        x, y, _ = _load_pair(p, q, mask, p_s, q_s, mask_s, row, j, classes, COMPUTE)
        no_p, no_q = x == float("-inf"), y == float("-inf")
        x, y = x - p_max, y - q_max
        probability_p, probability_q = _exp(x, r) * p_scale, _exp(y, r) * q_scale
        log_p, log_q = x * r - p_log, y * r - q_log
        if MIXED:
            log_m = _log_mixture(log_p, log_q, double(log_beta, COMPUTE), double(log_rest, COMPUTE))
            to_p = tl.where(no_p, 0.0, probability_p * (log_p - log_m - p_divergence)) * (b * p_slope)
            to_q = tl.where(no_q, 0.0, probability_q * (log_q - log_m - q_divergence)) * ((1.0 - b) * slope)
        else:
            gap = tl.where(no_p | no_q, 0.0, log_p - log_q)
            distance = tl.where(p_slope == 0.0, 0.0, p_divergence)
            to_p = probability_p * (gap - distance) * p_slope
            to_q = tl.where(p_scale == 0.0, 0.0, probability_q * slope) - tl.where(
                q_scale == 0.0, 0.0, probability_p * slope
            )
        if labels is not None:
            at_label = (j == label).to(COMPUTE)
            to_p += p_ce * (_exp(x, 1.0) * p_scale_ce - at_label)
            to_q += q_ce * (_exp(y, 1.0) * q_scale_ce - at_label)
        if dp is not None:
            tl.store(dp + row * dp_s[0] + j * dp_s[1], to_p, j < classes)
        if dq is not None:
            tl.store(dq + row * dq_s[0] + j * dq_s[1], to_q, j < classes)


def _common(
    p: Tensor, q: Tensor, labels: Tensor | None, mask: Tensor | None, temperature: float, beta: float
) -> dict[str, Any]:
    """What forward and backward both take."""
    p, q, mask = as_rows(p), as_rows(q), None if mask is None else as_rows(mask)
    block = pow2(p.shape[1], at_most=2048)
    return {
        "p": p, "q": q, "labels": labels, "mask": mask, "p_s": p.stride(), "q_s": q.stride(),
        "mask_s": None if mask is None else mask.stride(), "label_stride": 0 if labels is None else labels.stride(0),
        "classes": p.shape[1], "inverse_t": split(1 / temperature), "beta": split(beta),
        "log_beta": split(math.log(beta) if beta else 0.0), "log_rest": split(math.log1p(-beta)),
        "MIXED": beta != 0, "COMPUTE": compute_type(p)[1],
    } | tuned("kl_bottleneck", {"BLOCK": block, "num_warps": max(1, block // 256)})  # fmt: skip


def _run_forward(common: dict[str, Any]) -> tuple[Tensor, Tensor]:
    p = common["p"]
    dtype, _ = compute_type(p)
    stats, losses = p.new_empty((p.shape[0], STATS), dtype=dtype), p.new_empty((p.shape[0], 3), dtype=dtype)
    launch(_forward, p.shape[0], p, stats=stats, losses=losses, **common)
    return stats, losses


def _add_up(
    losses: Tensor, stats: Tensor, reduction: int, labels: bool, *weights: float
) -> tuple[Tensor, ...]:
    kl, *others = (losses.new_empty(()) for _ in range(4 if weights else 1))
    total, p_ce, q_ce = others or (None, None, None)
    kl_weight, ce_weight = weights or (0.0, 0.0)
    launch(
        _total, 1, losses, losses, stats, total, kl, p_ce, q_ce, losses.shape[0], split(kl_weight), split(ce_weight),
        REDUCTION=reduction, LABELS=labels, USE_KL=kl_weight != 0, USE_CE=ce_weight != 0,
        BLOCK=1024, COMPUTE=compute_type(losses)[1],
    )  # fmt: skip
    return (total, kl, p_ce, q_ce) if weights else (kl,)  # type: ignore[return-value]


def divergence(
    p: Tensor,
    q: Tensor,
    mask: Tensor | None,
    temperature: float,
    beta: float,
    reduction: int,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    """torch.ops.iumad.kl_divergence."""
    stats, losses = _run_forward(_common(p, q, None, mask, temperature, beta))
    kept = stats if save_stats else stats.new_empty((0, STATS))
    if reduction == NONE:
        return losses[:, 0].reshape(p.shape[:-1]).clone(), kept
    return _add_up(losses, stats, reduction, False)[0], kept


def bottleneck(
    p: Tensor,
    q: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
    detach_p: bool,
    save_stats: bool,
) -> tuple[Tensor, ...]:
    """torch.ops.iumad.kl_bottleneck."""
    stats, losses = _run_forward(_common(p, q, labels, mask, temperature, 0.0))
    kept = stats if save_stats else stats.new_empty((0, STATS))
    return *_add_up(losses, stats, BATCHMEAN, labels is not None, kl_weight, ce_weight), kept


def backward(
    grad_total: Tensor | None,
    grad_divergence: Tensor | None,
    grad_p_ce: Tensor | None,
    grad_q_ce: Tensor | None,
    p: Tensor,
    q: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    temperature: float,
    beta: float,
    reduction: int,
    kl_weight: float,
    ce_weight: float,
    through_p: bool,
    need_p: bool,
    need_q: bool,
) -> tuple[Tensor, Tensor]:
    """torch.ops.iumad.kl_bottleneck_backward."""
    common = _common(p, q, labels, mask, temperature, beta)
    rows = stats.shape[0]
    divisor = None
    if mask is not None and reduction in (MEAN, BATCHMEAN):
        divisor = stats[:, 8].sum() if reduction == MEAN else (stats[:, 8] > 0).sum()
    count = {MEAN: rows * p.shape[-1], BATCHMEAN: rows}.get(reduction, 1)
    # Contiguous results, which every layout of the logits can be given by one copy.
    dp = torch.empty_like(p, memory_format=torch.contiguous_format) if need_p else None
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if need_q else None
    row_grad = (
        grad_divergence.reshape(-1) if grad_divergence is not None and reduction == NONE else grad_divergence
    )
    flat_p, flat_q = (None if t is None else as_rows(t) for t in (dp, dq))
    launch(
        _backward, rows, stats, grad_total=grad_total, grad_kl=row_grad, grad_p_ce=grad_p_ce, grad_q_ce=grad_q_ce,
        stats=stats, divisor=divisor, dp=flat_p, dq=flat_q,
        dp_s=None if flat_p is None else flat_p.stride(), dq_s=None if flat_q is None else flat_q.stride(),
        grad_stride=row_grad.stride(0) if row_grad is not None and reduction == NONE else 0,
        scale=split(1 / max(count, 1)), kl_weight=split(kl_weight), ce_weight=split(ce_weight),
        PER_ROW=reduction == NONE, THROUGH_P=through_p, USE_KL=kl_weight != 0, USE_CE=ce_weight != 0, **common,
    )  # fmt: skip
    none = p.new_empty(0)
    return none if dp is None else laid_out_as(p, dp), none if dq is None else laid_out_as(q, dq)
