"""Divergence of two linear heads from their inputs, without the logits of all rows ever existing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from iumad_kernels import reference
from iumad_kernels.backend import implement, select
from iumad_kernels.ops.autocast import to_autocast_dtype
from iumad_kernels.ops.checks import check_floating, check_shape
from iumad_kernels.ops.derivatives import may_need_gradients, only_once
from iumad_kernels.ops.kl_bottleneck import REDUCTIONS

_SUM = REDUCTIONS.index("sum")
# Logits per chunk and side: on a CPU 16 MB of float32, rows enough for efficient products. Every chunk reads the weights again,
# which on a GPU takes longer than its products below some 300 rows (bfloat16 on an H100).
_CHUNK_LOGITS, _CHUNK_LOGITS_GPU = 2**22, 2**24

implement("fused_linear_kl", "cpu", torch_op="kl_divergence")


def fused_linear_kl(
    features_t: Tensor,
    weight_t: Tensor,
    features_s: Tensor,
    weight_s: Tensor,
    *,
    bias_t: Tensor | None = None,
    bias_s: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.0,
    reduction: str = "batchmean",
    detach_teacher: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    """:func:`kl_divergence` of a student's from a teacher's linear head, chunk by chunk of rows.

    The value of ``kl_divergence(linear(features_s, weight_s, bias_s), linear(features_t, weight_t, bias_t), ...)``, for heads
    with so many rows (tokens, pixels) or classes that their logits do not fit.

    Args:
        features_t, features_s: (..., dim_t) and (..., dim_s), the same leading dimensions (rows).
        weight_t, weight_s: (classes, dim_t) and (classes, dim_s), as in ``nn.Linear``. bias_t, bias_s: (classes,).
        temperature, beta: as in :func:`kl_divergence`. reduction: ``"sum"``, ``"mean"`` or ``"batchmean"``.
        detach_teacher: no gradient to features_t, weight_t and bias_t (and none of the work for it).
        chunk_rows: rows at a time; None takes about 4 million logits, 16 million on a GPU.

    Returns:
        float32 scalar (float64 for float64), differentiable once, to every tensor.

    A side's tensors have one dtype; the two sides may differ, but float64 goes with float64 only; autocast casts them as it does
    for ``linear``. Products run at that dtype, the divergence in float32, sums of weight gradients over chunks in float32.
    Gradients are computed together with the value, so that a chunk's logits are needed once; beside them, memory is four arrays
    of (chunk_rows, classes). The matrix products are torch's: with one number of threads runs are bitwise equal, across numbers
    of threads as far as torch's products are.

    Raises TypeError or ValueError naming the argument. Source: paper.md 3.1 (L_IB).

    >>> features, weight = torch.randn(5, 4), torch.randn(100, 4)
    >>> fused_linear_kl(features, weight, features, weight)
    tensor(0.)
    """
    op = "fused_linear_kl"
    features_t, weight_t, bias_t = to_autocast_dtype(features_t, weight_t, bias_t)
    features_s, weight_s, bias_s = to_autocast_dtype(features_s, weight_s, bias_s)
    sides = (("t", features_t, weight_t, bias_t), ("s", features_s, weight_s, bias_s))
    for side, features, weight, bias in sides:
        for name, t in ((f"features_{side}", features), (f"weight_{side}", weight)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        check_floating(op, **{f"features_{side}": features, f"weight_{side}": weight, f"bias_{side}": bias})
        if features.dim() < 1:
            raise ValueError(f"{op}: features_{side} is a scalar, expected (..., dim)")
        check_shape(op, f"weight_{side}", weight, (None, features.shape[-1]), legend=f"(classes, dim_{side})")
        check_shape(op, f"bias_{side}", bias, (weight.shape[0],), legend="(classes,)")
        for name, other in ((f"weight_{side}", weight), (f"bias_{side}", bias)):
            if other is not None and other.dtype != features.dtype:
                raise TypeError(
                    f"{op}: {name} has dtype {other.dtype}, but features_{side} has {features.dtype}"
                )
    check_floating(op, features_t=features_t, features_s=features_s)
    if features_t.shape[:-1] != features_s.shape[:-1]:
        raise ValueError(
            f"{op}: features_s has rows {tuple(features_s.shape[:-1])}, "
            f"expected those of features_t, {tuple(features_t.shape[:-1])}"
        )
    if weight_t.shape[0] != weight_s.shape[0]:
        raise ValueError(
            f"{op}: weight_s has {weight_s.shape[0]} classes, but weight_t has {weight_t.shape[0]}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature = {temperature}, expected a finite number > 0")
    if not 0 <= beta <= 1:
        raise ValueError(f"{op}: beta = {beta}, expected a number from 0 to 1")
    if reduction not in REDUCTIONS[_SUM:]:
        raise ValueError(f"{op}: reduction = {reduction!r}, expected 'sum', 'mean' or 'batchmean'")
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"{op}: chunk_rows = {chunk_rows!r}, expected an integer >= 1")

    if select(op, features_t.device) == "reference":
        return reference.fused_linear_kl(
            features_t, weight_t, features_s, weight_s, bias_t=bias_t, bias_s=bias_s,
            temperature=temperature, beta=beta, reduction=reduction, detach_teacher=detach_teacher,
        )  # fmt: skip
    teacher, student = (features_t, weight_t, bias_t), (features_s, weight_s, bias_s)
    if detach_teacher:
        teacher = features_t.detach(), weight_t.detach(), None if bias_t is None else bias_t.detach()
    rows, classes = features_t.shape[:-1].numel(), weight_t.shape[0]
    count = {"sum": 1, "mean": rows * classes, "batchmean": rows}[reduction]
    chunk_logits = _CHUNK_LOGITS_GPU if features_t.is_cuda else _CHUNK_LOGITS
    p, q = (student, teacher) if beta == 1 else (teacher, student)
    return torch.ops.iumad.fused_linear_kl(
        *_flat(rows, *p),
        *_flat(rows, *q),
        temperature,
        0.0 if beta == 1 else beta,
        1 / max(count, 1),
        chunk_rows or max(16, chunk_logits // max(classes, 1)),
        may_need_gradients(*p),
        may_need_gradients(*q),
    )[0]


@torch.library.custom_op("iumad::fused_linear_kl", mutates_args=())
def _fused_linear_kl(
    features_p: Tensor,
    weight_p: Tensor,
    bias_p: Tensor | None,
    features_q: Tensor,
    weight_q: Tensor,
    bias_q: Tensor | None,
    temperature: float,
    beta: float,
    scale: float,
    chunk_rows: int,
    need_p: bool,
    need_q: bool,
) -> list[Tensor]:
    """Scale times the sum of the rows' divergences; its gradients to p's features, weight, bias; to q's (empty if not needed)."""
    p, q = _Side(features_p, weight_p, bias_p, need_p), _Side(features_q, weight_q, bias_q, need_q)
    total = features_p.new_zeros((), dtype=_compute_dtype(features_p))
    one = torch.ones_like(total)
    for first in range(0, features_p.shape[0], chunk_rows):
        rows = slice(first, first + chunk_rows)
        P, Q = p.logits(rows), q.logits(rows)
        loss, stats = torch.ops.iumad.kl_divergence(P, Q, None, temperature, beta, _SUM, need_p or need_q)
        total += loss
        if need_p or need_q:
            dP, dQ = torch.ops.iumad.kl_bottleneck_backward(
                None, scale * one, None, None, P, Q, None, None, stats, temperature, beta, _SUM, 0.0, 0.0, True, need_p, need_q
            )  # fmt: skip
            p.backward(rows, dP)
            q.backward(rows, dQ)
    return [total * scale, *p.gradients(), *q.gradients()]


class _Side:
    """One head: its logits chunk by chunk, and the gradients they add up to."""

    def __init__(self, features: Tensor, weight: Tensor, bias: Tensor | None, needed: bool) -> None:
        self.features, self.weight, self.bias, self.needed = features, weight, bias, needed
        if needed:
            self.dfeatures = torch.empty_like(features)
            self.dweight = torch.zeros_like(weight, dtype=_compute_dtype(weight))
            self.dbias = None if bias is None else torch.zeros_like(bias, dtype=_compute_dtype(bias))

    def logits(self, rows: slice) -> Tensor:
        return torch.nn.functional.linear(self.features[rows], self.weight, self.bias)

    def backward(self, rows: slice, dlogits: Tensor) -> None:
        if not self.needed:
            return
        torch.mm(dlogits, self.weight, out=self.dfeatures[rows])
        if self.dweight.dtype == dlogits.dtype:
            self.dweight.addmm_(dlogits.t(), self.features[rows])
        else:
            self.dweight += dlogits.t() @ self.features[rows]
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)

    def gradients(self) -> list[Tensor]:
        if not self.needed:
            return [self.features.new_empty(0) for _ in range(3)]
        dbias = self.features.new_empty(0) if self.dbias is None else self.dbias.to(self.weight.dtype)
        return [self.dfeatures, self.dweight.to(self.weight.dtype), dbias]


def _compute_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _flat(
    rows: int, features: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return features.reshape(rows, features.shape[-1]), weight, bias


@_fused_linear_kl.register_fake
def _fake(
    features_p: Tensor,
    weight_p: Tensor,
    bias_p: Tensor | None,
    features_q: Tensor,
    weight_q: Tensor,
    bias_q: Tensor | None,
    temperature: float,
    beta: float,
    scale: float,
    chunk_rows: int,
    need_p: bool,
    need_q: bool,
) -> list[Tensor]:
    p, q = _Side(features_p, weight_p, bias_p, need_p), _Side(features_q, weight_q, bias_q, need_q)
    return [features_p.new_empty((), dtype=_compute_dtype(features_p)), *p.gradients(), *q.gradients()]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[:6]
    ready = (only_once(g, "fused_linear_kl_backward") for g in ctx.saved_tensors)
    scaled = (grads[0] * g if need else None for g, need in zip(ready, needed))
    return *(None if g is None else g.to(saved.dtype) for g, saved in zip(scaled, ctx.saved_tensors)), *(
        None,
    ) * 6


_fused_linear_kl.register_autograd(_backward, setup_context=_setup_context)
