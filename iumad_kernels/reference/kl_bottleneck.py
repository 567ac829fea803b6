"""Divergences of categorical distributions given by logits, and the information-bottleneck loss, in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log_softmax(logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Logarithm of softmax(logits / temperature), in float32 or better; -inf for classes the mask leaves out.

    A row with nothing but -inf has no mass: all its log-probabilities are -inf, without a gradient.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if mask is not None:
        x = x.masked_fill(~mask, -math.inf)
    empty = (x == -math.inf).all(-1, keepdim=True)
    return F.log_softmax(x.masked_fill(empty, 0.0), -1).masked_fill(empty, -math.inf)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL[p || q] of each row, with 0 log 0 = 0 and +inf where q lacks mass that p has.

    The gradient to log_q is -p everywhere; a row whose divergence is infinite has none to log_p.
    """
    p, dead = log_p.exp(), log_p == -math.inf
    infinite = (~dead & (log_q == -math.inf)).any(-1)
    cross_entropy = -torch.where(dead, 0.0, p.detach() * log_q).sum(-1)
    live_p = torch.where(dead, 0.0, log_p)
    fixed_q = torch.where(log_q == -math.inf, 0.0, log_q.detach())  # finite also in rows that do not use it
    through_p = (p * (live_p - fixed_q) + p.detach() * fixed_q).sum(-1)
    return cross_entropy + torch.where(infinite, 0.0, through_p)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Divergence beta KL[p || m] + (1 - beta) KL[q || m] of each row, m = beta p + (1 - beta) q."""
    dead_p, dead_q = log_p == -math.inf, log_q == -math.inf
    both = dead_p & dead_q
    a, b = (torch.where(both, 0.0, x) for x in (log_p + math.log(beta), log_q + math.log1p(-beta)))
    log_m = torch.logaddexp(a, b)
    towards_p = torch.where(dead_p, 0.0, log_p.exp() * (torch.where(dead_p, 0.0, log_p) - log_m)).sum(-1)
    towards_q = torch.where(dead_q, 0.0, log_q.exp() * (torch.where(dead_q, 0.0, log_q) - log_m)).sum(-1)
    return beta * towards_p + (1 - beta) * towards_q


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 0.0,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    detach_teacher: bool = False,
) -> Tensor:
    """The definition of :func:`iumad_kernels.kl_divergence`; same arguments, shapes and results."""
    student = log_softmax(student_logits, mask, temperature)
    teacher = log_softmax(teacher_logits.detach() if detach_teacher else teacher_logits, mask, temperature)
    if beta == 0:
        rows = forward_kl(teacher, student)
    elif beta == 1:
        rows = forward_kl(student, teacher)
    else:
        rows = jensen_shannon(teacher, student, beta)
    return reduce(rows, reduction, student_logits.shape, mask)


def reduce(rows: Tensor, reduction: str, shape: torch.Size, mask: Tensor | None) -> Tensor:
    """One of the reductions of :func:`kl_divergence`; a mean over nothing is 0."""
    if reduction == "none":
        return rows
    if mask is None:
        elements, count = shape.numel(), rows.numel()
    else:
        mask = mask.expand(shape)
        elements, count = int(mask.sum()), int(mask.any(-1).sum())
    return rows.sum() / max({"sum": 1, "mean": elements, "batchmean": count}[reduction], 1)


def kl_bottleneck(
    fused_logits: Tensor,
    bottleneck_logits: Tensor,
    labels: Tensor | None = None,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
    detach_teacher: bool = True,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of :func:`iumad_kernels.kl_bottleneck`: total, KL, cross-entropy of the fused and the bottleneck head."""
    kl = kl_divergence(
        bottleneck_logits, fused_logits, temperature=temperature, mask=mask, detach_teacher=detach_teacher
    )
    fused_ce, bottleneck_ce = (
        torch.zeros_like(kl) if labels is None else _cross_entropy(logits, labels, mask)
        for logits in (fused_logits, bottleneck_logits)
    )
    total = torch.zeros_like(kl)
    if kl_weight != 0:
        total = total + kl_weight * kl
    if ce_weight != 0:
        total = total + ce_weight * (fused_ce + bottleneck_ce)
    return total, kl, fused_ce, bottleneck_ce


def _cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of -log softmax(logits)_label over the rows that take part."""
    rows = -log_softmax(logits, mask).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if mask is not None:
        rows = torch.where(mask.expand(logits.shape).any(-1), rows, 0.0)
    return reduce(rows, "batchmean", logits.shape, mask)
