"""What the selective scans of ops/ share: argument checks, the form the kernels read arguments in, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from iumad_kernels.ops.checks import check_divides, check_shape

# The values of ScanScheme in csrc/core/scan_order.h.
SCHEMES = ("row", "row_reverse", "bidirectional", "cross", "es2d")


def check_parameters(
    op: str,
    dim: int,
    delta_rows: int,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    directions: int | None = None,
) -> int:
    """Checks what depends on dim alone; returns N."""
    if dim:
        check_divides(op, "rows of delta", delta_rows, "dim", dim)
    K: tuple[tuple[int, ...], ...] = ((),) if directions is None else ((), (directions,))
    both = "" if directions is None else " or (K, dim{})"
    check_shape(op, "A", A, *((*k, dim, None) for k in K), legend="(dim, N)" + both.format(", N"))
    states = A.shape[-1]
    if states < 1:
        raise ValueError(f"{op}: A has shape {tuple(A.shape)}: N = 0, expected N >= 1")
    for name, t in (("D", D), ("delta_bias", delta_bias)):
        check_shape(op, name, t, *((*k, dim) for k in K), legend="(dim,)" + both.format(""))
    return states


def check_groups(op: str, dim: int, groups_B: int | None, groups_C: int | None) -> None:
    """Groups split dim evenly, and are as many for B as for C (None: a constant projection has none)."""
    for name, groups in (("groups of B", groups_B), ("groups of C", groups_C)):
        if groups is not None:
            check_divides(op, name, groups, "dim", dim)
    if None not in (groups_B, groups_C) and groups_B != groups_C:
        raise ValueError(f"{op}: B has {groups_B} groups but C has {groups_C}, expected the same number")


def compute_dtype(u: Tensor) -> torch.dtype:
    """The dtype the recurrence runs in."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def parameter(p: Tensor, directions: int, compute: torch.dtype, plain_dims: int = 1) -> Tensor:
    """A parameter, with or without its K dimension, as (K, ...) in the compute dtype, contiguous."""
    p = p.to(compute)
    if p.dim() == plain_dims:
        p = p.unsqueeze(0) if directions == 1 else p.expand(directions, *p.shape)
    return p.contiguous()


def rows_of(p: Tensor, compute: torch.dtype) -> Tensor:
    """The kernels read N, the last dimension, with stride 1, in the compute dtype."""
    p = p.to(compute)
    return p if p.stride(-1) == 1 or p.shape[-1] == 1 else p.contiguous()


def scan(
    tensors: tuple[Tensor | None, ...], scheme: str, step: int, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """torch.ops.iumad.selective_scan: output and last state. Calls without gradients go past the registration of autograd."""
    number = SCHEMES.index(scheme)
    save_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if save_states or torch.compiler.is_compiling():
        out, last_state, _ = torch.ops.iumad.selective_scan(
            *tensors, number, step, delta_softplus, save_states
        )
    else:
        with torch._C._AutoDispatchBelowAutograd():
            out, last_state, _ = torch.ops.iumad.selective_scan(*tensors, number, step, delta_softplus, False)
    return out, last_state
