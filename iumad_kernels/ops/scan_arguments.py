"""What the selective scans of ops/ share: argument checks, and the form the kernels read arguments in."""

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
    if directions is None:
        shapes: tuple[tuple[int, ...], ...] = ((dim,),)
        A_shapes: tuple[tuple[int | None, ...], ...] = ((dim, None),)
        legend, A_legend = "(dim,)", "(dim, N)"
    else:
        shapes, A_shapes = ((dim,), (directions, dim)), ((dim, None), (directions, dim, None))
        legend, A_legend = "(dim,) or (K, dim)", "(dim, N) or (K, dim, N)"
    check_shape(op, "A", A, *A_shapes, legend=A_legend)
    states = A.shape[-1]
    if states < 1:
        raise ValueError(f"{op}: A has shape {tuple(A.shape)}: N = 0, expected N >= 1")
    check_shape(op, "D", D, *shapes, legend=legend)
    check_shape(op, "delta_bias", delta_bias, *shapes, legend=legend)
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


def parameter(p: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter as the kernels read it: in the compute dtype, contiguous."""
    p = p if p.dtype == dtype else p.to(dtype)  # without a call into torch where nothing changes
    return p if p.is_contiguous() else p.contiguous()


def adjacent(p: Tensor, dim: int) -> Tensor:
    """``p`` with stride 1 in a dimension, copied where it has not: the kernels read a token's states in one piece."""
    if p.stride(dim) == 1 or p.shape[dim] == 1:
        return p
    return p.movedim(dim, -1).contiguous().movedim(-1, dim)
