"""Selective scan of a grid in several directions."""

from __future__ import annotations

from torch import Tensor

from iumad_kernels import reference
from iumad_kernels.backend import implement, select
from iumad_kernels.ops.checks import check_floating, check_shape
from iumad_kernels.ops.scan_arguments import (
    SCHEMES,
    adjacent,
    check_groups,
    check_parameters,
    compute_dtype,
    parameter,
)
from iumad_kernels.ops.selective_scan import scan

_DIRECTIONS = {"row": 1, "row_reverse": 1, "bidirectional": 2, "cross": 4}

implement("selective_scan_2d", "cpu", torch_op="selective_scan")


def selective_scan_2d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    scheme: str = "es2d",
    step: int = 2,
) -> Tensor:
    """Selective scan of a grid in K directions; nothing is copied, flipped or padded.

    Every direction is an independent :func:`selective_scan` over its pixels; results land at their own pixels, and
    directions that visit the same pixel add up there.

    Args:
        u: (batch, dim, H, W), read by every direction.
        delta: (batch, rows, H, W) for all directions or (batch, K, rows, H, W); rows is dim or divides it.
        A: (dim, N) or (K, dim, N).
        B, C: (batch, N, H, W) for all directions, (batch, K, N, H, W), or (batch, K, groups, N, H, W).
        D, delta_bias: (dim,) or (K, dim).
        delta_softplus: pass delta through softplus.
        scheme: one of
            ``"es2d"``: step x step interleaved sub-grids, alternately row- and column-major, K = step^2, each pixel in
            exactly one direction (EfficientVMamba, arXiv 2403.09977; paper.md 2.3);
            ``"cross"``: rows, columns, and both reversed, K = 4 (VMamba, arXiv 2401.10166);
            ``"row"``: K = 1;
            ``"bidirectional"``: rows forward and backward, K = 2.
        step: of es2d; any H and W, also such that step does not divide them.

    Returns:
        (batch, dim, H, W) in u's dtype and layout.

    A tensor with a K dimension is read, and gets a gradient, only at the pixels its direction visits. B and C whose N
    has stride 1 are read in place, others are copied once. Dtypes, memory, errors and determinism as
    :func:`selective_scan`.

    >>> u, p = torch.randn(2, 4, 5, 7), torch.randn(2, 8, 5, 7)
    >>> selective_scan_2d(u, torch.rand(2, 4, 5, 7), -torch.rand(4, 4, 8), p, p, scheme="cross").shape
    torch.Size([2, 4, 5, 7])
    """
    op = "selective_scan_2d"
    check_floating(op, u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    K = directions(scheme, step)
    check_shape(op, "u", u, (None, None, None, None), legend="(batch, dim, H, W)")
    batch, dim, H, W = u.shape
    check_shape(
        op,
        "delta",
        delta,
        (batch, None, H, W),
        (batch, K, None, H, W),
        legend="(batch, rows, H, W) or (batch, K, rows, H, W)",
    )
    states = check_parameters(op, dim, delta.shape[-3], A, D, delta_bias, K)
    for name, p in (("B", B), ("C", C)):
        shapes = ((batch, states, H, W), (batch, K, states, H, W), (batch, K, None, states, H, W))
        check_shape(
            op,
            name,
            p,
            *shapes,
            legend="(batch, N, H, W), (batch, K, N, H, W) or (batch, K, groups, N, H, W)",
        )
    check_groups(op, dim, *(p.shape[2] if p.dim() == 6 else 1 for p in (B, C)))

    if select(op, u.device) == "reference":
        return reference.selective_scan_2d(
            u, delta, A, B, C, D, delta_bias, delta_softplus, scheme=scheme, step=step
        )
    compute = compute_dtype(u)
    arguments = (
        u,
        delta if delta.dim() == 5 else delta.unsqueeze(1),
        _per_direction(parameter(A, compute), K, 3),
        _grid_projection(B),
        _grid_projection(C),
        None if D is None else _per_direction(parameter(D, compute), K, 2),
        None,
        None if delta_bias is None else _per_direction(parameter(delta_bias, compute), K, 2),
        None,
    )
    return scan(arguments, scheme, step, delta_softplus, want_last_state=False)[0]


def directions(scheme: str, step: int = 2) -> int:
    """K, the number of directions of a scheme of :func:`selective_scan_2d`."""
    if scheme not in SCHEMES or scheme == "row_reverse":
        raise ValueError(f"scheme = {scheme!r}, expected one of 'es2d', 'cross', 'row', 'bidirectional'")
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"step = {step!r}, expected an integer >= 1")
    return step * step if scheme == "es2d" else _DIRECTIONS[scheme]


def _per_direction(p: Tensor, K: int, dims: int) -> Tensor:
    """A parameter, with or without its K dimension, as (K, ...), contiguous."""
    return p if p.dim() == dims else p.expand(K, *p.shape).contiguous()


def _grid_projection(p: Tensor) -> Tensor:
    """B or C as (batch, K or 1, groups, H, W, N), N with stride 1."""
    if p.dim() == 4:
        p = p[:, None, None]
    elif p.dim() == 5:
        p = p.unsqueeze(2)
    return adjacent(p.movedim(3, -1), -1)
