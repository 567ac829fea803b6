"""Selective scan (Mamba S6) over sequences and grids, and its single-step form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iumad_kernels import gpu, reference
from iumad_kernels.backend import implement, select
from iumad_kernels.ops.checks import check_divides, check_floating, check_shape

SCHEMES = (
    "row",
    "row_reverse",
    "bidirectional",
    "cross",
    "es2d",
)  # the values of ScanScheme in csrc/core/scan_order.h
_DIRECTIONS = {"row": 1, "row_reverse": 1, "bidirectional": 2, "cross": 4}
# How the states are saved for backward: kScanTile, kScanChunk in csrc/core/selective_scan.h, kTile in csrc/cuda/selective_scan.h.
_TILE, _CHUNK, _CUDA_TILE = 16, 16, 64

implement("selective_scan", "cpu")
implement("selective_scan_2d", "cpu", torch_op="selective_scan")
implement("selective_state_update", "cpu")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan of a sequence; the arguments of ``mamba_ssm``'s ``selective_scan_fn`` in the same order.

    ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t``, ``y_t = C_t . h_t + D u_t``, ``out_t = y_t silu(z_t)`` with
    ``dt = softplus(delta + delta_bias)``.

    Args:
        u: input, (batch, dim, length). Any strides; channels-last and length-last are the fast layouts.
        delta: step sizes, (batch, dim, length), or (batch, rows, length) with rows dividing dim: dim / rows channels share a row.
        A: (dim, N), real. B, C: (dim, N), (batch, N, length) or (batch, groups, N, length).
        D: skip weight, (dim,). z: gate, as u. delta_bias: (dim,), added to delta before the softplus.
        delta_softplus: pass delta through softplus. return_last_state: also return the state after the last token.
        initial_state: (batch, dim, N). reverse: scan from the last token to the first (the last state is then that
        after token 0).

    Returns:
        out (batch, dim, length) in u's dtype and layout; with ``return_last_state`` also the state (batch, dim, N)
        in float32 (float64
        for float64 inputs). Both are differentiable, as are all tensor arguments.

    float32, bfloat16 and float16 may be mixed (the recurrence runs in float32; autocast changes nothing); float64
    only with float64.
    For backward the inputs are kept and one state per 16 tokens, batch * dim * N * length / 16 values; memory
    traffic is otherwise
    one read of each input and one write of each output, forward; twice that, backward. Results do not depend on the thread count.

    Raises TypeError or ValueError naming the argument. Source: Mamba, arXiv 2312.00752, equation 2 with the simplified
    discretisation of its code (dt B u).

    >>> u = torch.randn(1, 4, 9)
    >>> selective_scan(u, torch.rand(1, 4, 9), -torch.rand(4, 8), torch.randn(1, 8, 9), torch.randn(1, 8, 9)).shape
    torch.Size([1, 4, 9])
    """
    op = "selective_scan"
    check_floating(
        op, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state
    )
    check_shape(op, "u", u, (None, None, None), legend="(batch, dim, length)")
    batch, dim, length = u.shape
    check_shape(op, "delta", delta, (batch, None, length), legend="(batch, dim or a divisor of it, length)")
    states = _check_parameters(op, dim, delta.shape[1], A, D, delta_bias)
    for name, p in (("B", B), ("C", C)):
        shapes = ((dim, states), (batch, states, length), (batch, None, states, length))
        check_shape(op, name, p, *shapes, legend="(dim, N), (batch, N, length) or (batch, groups, N, length)")
    _check_groups(op, dim, *(p.shape[1] if p.dim() == 4 else 1 if p.dim() == 3 else None for p in (B, C)))
    check_shape(op, "z", z, (batch, dim, length), legend="(batch, dim, length)")
    check_shape(op, "initial_state", initial_state, (batch, dim, states), legend="(batch, dim, N)")

    if select(op, u.device) == "reference":
        return reference.selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            delta_softplus,
            return_last_state,
            initial_state=initial_state,
            reverse=reverse,
        )
    compute = _compute_dtype(u)
    arguments = (
        u.unsqueeze(2),
        delta[:, None, :, None],
        _parameter(A, 1, compute, plain_dims=2),
        _sequence_projection(B, compute),
        _sequence_projection(C, compute),
        None if D is None else _parameter(D, 1, compute),
        None if z is None else z.unsqueeze(2),
        None if delta_bias is None else _parameter(delta_bias, 1, compute),
        None if initial_state is None else initial_state.unsqueeze(1),
    )
    scheme = SCHEMES.index("row_reverse" if reverse else "row")
    out, last_state, _ = torch.ops.iumad.selective_scan(
        *arguments, scheme, 1, delta_softplus, _needs_grad(*arguments)
    )
    return (out.squeeze(2), last_state.squeeze(1)) if return_last_state else out.squeeze(2)


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

    Every direction is an independent :func:`selective_scan` over its pixels; results land at their own pixels and
    directions that visit
    the same pixel add up there.

    Args:
        u: (batch, dim, H, W), read by every direction.
        delta: (batch, rows, H, W) for all directions or (batch, K, rows, H, W); rows is dim or divides it.
        A: (dim, N) or (K, dim, N). D, delta_bias: (dim,) or (K, dim).
        B, C: (batch, N, H, W) for all directions, (batch, K, N, H, W), or (batch, K, groups, N, H, W).
        scheme: ``"es2d"``: step x step interleaved sub-grids, alternately row- and column-major, K = step^2, each
        pixel in exactly one
            direction (EfficientVMamba, arXiv 2403.09977; paper.md 2.3); ``"cross"``: rows, columns, and both
            reversed, K = 4 (VMamba,
            arXiv 2401.10166); ``"row"``, K = 1; ``"bidirectional"``: rows forward and backward, K = 2.
        step: of es2d; any H and W, also such that step does not divide them.

    Returns:
        (batch, dim, H, W) in u's dtype and layout.

    A tensor with a K dimension is read (and gets a gradient) only at the pixels its direction visits. Dtypes,
    memory, errors and determinism as
    :func:`selective_scan`. B and C whose N has stride 1 are read in place, others are copied once.

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
    states = _check_parameters(op, dim, delta.shape[-3], A, D, delta_bias, K)
    for name, p in (("B", B), ("C", C)):
        shapes = ((batch, states, H, W), (batch, K, states, H, W), (batch, K, None, states, H, W))
        check_shape(
            op,
            name,
            p,
            *shapes,
            legend="(batch, N, H, W), (batch, K, N, H, W) or (batch, K, groups, N, H, W)",
        )
    _check_groups(op, dim, *(p.shape[2] if p.dim() == 6 else 1 for p in (B, C)))

    if select(op, u.device) == "reference":
        return reference.selective_scan_2d(
            u, delta, A, B, C, D, delta_bias, delta_softplus, scheme=scheme, step=step
        )
    compute = _compute_dtype(u)
    arguments = (
        u,
        delta if delta.dim() == 5 else delta.unsqueeze(1),
        _parameter(A, K, compute, plain_dims=2),
        _grid_projection(B, compute),
        _grid_projection(C, compute),
        None if D is None else _parameter(D, K, compute),
        None,
        None if delta_bias is None else _parameter(delta_bias, K, compute),
        None,
    )
    out, _, _ = torch.ops.iumad.selective_scan(
        *arguments, SCHEMES.index(scheme), step, delta_softplus, _needs_grad(*arguments)
    )
    return out


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of a selective scan for generation; ``state`` is updated in place. Semantics of ``mamba_ssm``'s Triton function.

    Args:
        state: (batch, dim, N) or, with heads, (batch, nheads, dim, N); any floating dtype (float32 keeps full accuracy).
        x, dt, z: (batch, dim) or (batch, nheads, dim). A: (dim, N) or (nheads, dim, N). D, dt_bias: (dim,) or (nheads, dim).
        B, C: (batch, N) or (batch, ngroups, N); ngroups divides nheads (dim where there are no heads).
        dt_softplus: pass dt + dt_bias through softplus.
        state_batch_indices: (batch,) integers: the rows of a larger ``state`` this batch reads and writes (distinct).

    Returns:
        out, as x, in x's dtype. Not differentiable: for gradients call :func:`selective_scan` with length 1 and
        ``initial_state``.

    >>> state = torch.zeros(2, 4, 8)
    >>> y = selective_state_update(state, torch.ones(2, 4), torch.ones(2, 4), -torch.ones(4, 8), torch.ones(2, 8),
    torch.ones(2, 8))
    >>> y[0, 0].item(), state[0, 0, 0].item()
    (8.0, 1.0)
    """
    op = "selective_state_update"
    check_floating(op, state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if state.dim() not in (3, 4):
        raise ValueError(
            f"{op}: state has shape {tuple(state.shape)}, expected (batch, dim, N) or (batch, nheads, dim, N)"
        )
    rows = state.shape[0] if state_batch_indices is None else state_batch_indices.shape[0]
    channels, states = tuple(state.shape[1:-1]), state.shape[-1]
    legend = "(batch, dim) or (batch, nheads, dim)"
    for name, t in (("x", x), ("dt", dt), ("z", z)):
        check_shape(op, name, t, (rows, *channels), legend=legend)
    check_shape(op, "A", A, (*channels, states), legend="(dim, N) or (nheads, dim, N)")
    for name, t in (("D", D), ("dt_bias", dt_bias)):
        check_shape(op, name, t, channels, legend="(dim,) or (nheads, dim)")
    for name, t in (("B", B), ("C", C)):
        check_shape(
            op, name, t, (rows, states), (rows, None, states), legend="(batch, N) or (batch, ngroups, N)"
        )
        check_divides(
            op,
            f"ngroups of {name}",
            t.shape[1] if t.dim() == 3 else 1,
            "nheads" if len(channels) == 2 else "dim",
            channels[0],
        )
    if states < 1:
        raise ValueError(f"{op}: state has N = 0, expected N >= 1")
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (state, x, dt, A, B, C, D, z, dt_bias)
    ):
        raise RuntimeError(
            f"{op} is not differentiable: call it under torch.no_grad(), or use selective_scan with length 1"
        )

    if select(op, x.device) == "reference":
        return reference.selective_state_update(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
        )
    compute = _compute_dtype(x)
    picked = state if state_batch_indices is None else state[state_batch_indices]
    flat = picked.reshape(rows, 1, -1, states)  # a view where the strides allow it
    groups = max(B.shape[1] if B.dim() == 3 else 1, C.shape[1] if C.dim() == 3 else 1)

    def token(t: Tensor) -> Tensor:
        return t.reshape(rows, -1, 1, 1)

    def channel_parameter(t: Tensor | None, *tail: int) -> Tensor | None:
        return None if t is None else t.reshape(1, -1, *tail).to(compute).contiguous()

    def projection(t: Tensor) -> Tensor:
        t = t if t.dim() == 3 else t.unsqueeze(1)
        return t.expand(rows, groups, states).to(compute).contiguous()[:, None, :, None, None]

    out = torch.ops.iumad.selective_state_update(
        flat,
        token(x),
        token(dt).unsqueeze(1),
        channel_parameter(A, states),
        projection(B),
        projection(C),
        channel_parameter(D),
        None if z is None else token(z),
        channel_parameter(dt_bias),
        dt_softplus,
    )
    if state_batch_indices is not None:
        state[state_batch_indices] = flat.view_as(picked)
    elif flat.data_ptr() != state.data_ptr():
        state.copy_(flat.view_as(state))
    return out.reshape(x.shape)


def directions(scheme: str, step: int = 2) -> int:
    """K, the number of directions of a scheme of :func:`selective_scan_2d`."""
    if scheme not in SCHEMES or scheme == "row_reverse":
        raise ValueError(f"scheme = {scheme!r}, expected one of 'es2d', 'cross', 'row', 'bidirectional'")
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"step = {step!r}, expected an integer >= 1")
    return step * step if scheme == "es2d" else _DIRECTIONS[scheme]


def _check_parameters(
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


def _check_groups(op: str, dim: int, groups_B: int | None, groups_C: int | None) -> None:
    for name, groups in (("groups of B", groups_B), ("groups of C", groups_C)):
        if groups is not None:
            check_divides(op, name, groups, "dim", dim)
    if None not in (groups_B, groups_C) and groups_B != groups_C:
        raise ValueError(f"{op}: B has {groups_B} groups but C has {groups_C}, expected the same number")


def _compute_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _parameter(p: Tensor, directions: int, compute: torch.dtype, plain_dims: int = 1) -> Tensor:
    """A parameter, with or without its K dimension, as (K, ...) in the compute dtype, contiguous."""
    if p.dim() == plain_dims:
        p = p.expand(directions, *p.shape)
    return p.to(compute).contiguous()


def _rows(p: Tensor, compute: torch.dtype) -> Tensor:
    """The kernels read N with stride 1, in the compute dtype."""
    p = p.to(compute)
    return p if p.stride(-1) == 1 or p.shape[-1] == 1 else p.contiguous()


def _sequence_projection(p: Tensor, compute: torch.dtype) -> Tensor:
    """B or C as (batch, 1, groups, 1, length, N), or (1, dim, N) where constant."""
    if p.dim() == 2:
        return p.unsqueeze(0).to(compute).contiguous()
    p = p.unsqueeze(1) if p.dim() == 3 else p
    return _rows(p.transpose(2, 3), compute)[:, None, :, None]


def _grid_projection(p: Tensor, compute: torch.dtype) -> Tensor:
    """B or C as (batch, K or 1, groups, H, W, N)."""
    if p.dim() == 4:
        p = p[:, None, None]
    elif p.dim() == 5:
        p = p.unsqueeze(2)
    return _rows(p.movedim(3, -1), compute)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _max_length(scheme: int, step: int, H: int, W: int) -> int:
    return -(-H // step) * -(-W // step) if SCHEMES[scheme] == "es2d" else H * W


@torch.library.register_fake("iumad::selective_scan")
def _fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    scheme: int,
    step: int,
    delta_softplus: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim, H, W = u.shape
    K, _, N = A.shape
    compute = _compute_dtype(u)
    length = _max_length(scheme, step, H, W)
    if not save_states:
        shape: tuple[int, ...] = (0,)
    elif u.device.type == "cuda" and "selective_scan" in gpu.activate().cuda_ops:
        shape = (batch, K, -(-length // _CUDA_TILE), N, dim)
    else:
        shape = (batch, K, -(-dim // _CHUNK), -(-length // _TILE), N, _CHUNK)
    return (
        torch.empty_like(u),
        u.new_empty((batch, K, dim, N), dtype=compute),
        u.new_empty(shape, dtype=compute),
    )


@torch.library.register_fake("iumad::selective_scan_backward")
def _fake_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    tile_states: Tensor,
    scheme: int,
    step: int,
    delta_softplus: bool,
    has_initial_state: bool,
) -> tuple[Tensor, ...]:
    batch, dim, H, W = u.shape
    K, _, N = A.shape
    compute = _compute_dtype(u)

    def new(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=compute)

    sparse = SCHEMES[scheme] == "es2d" and K > 1 and delta.shape[1] > 1
    ddelta = (
        torch.empty_like(delta)
        if delta.shape[2] == dim and not sparse
        else new(batch, delta.shape[1], dim, H, W)
    )
    if delta.shape[2] == dim and sparse:
        ddelta = ddelta.to(delta.dtype)
    return (
        torch.empty_like(u),
        ddelta,
        new(K, dim, N),
        new(*B.shape),
        new(*C.shape),
        new(0) if D is None else new(K, dim),
        new(0) if z is None else torch.empty_like(z),
        new(0) if delta_bias is None else new(K, dim),
        new(batch, K, dim, N) if has_initial_state else new(0),
    )


@torch.library.register_fake("iumad::selective_state_update")
def _fake_update(state: Tensor, u: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(u)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, scheme, step, delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.flags = (scheme, step, delta_softplus)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None, _: None) -> tuple[Any, ...]:
    u, delta, A, B, C, D, z, delta_bias, initial_state, tile_states = ctx.saved_tensors
    if grad_out is None:
        grad_out = u.new_zeros(()).expand(u.shape)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dh0 = torch.ops.iumad.selective_scan_backward(
        grad_out,
        grad_last_state,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        tile_states,
        *ctx.flags,
        initial_state is not None,
    )
    if ddelta.shape != delta.shape:  # channels that share a row of delta
        ddelta = ddelta.unflatten(2, (delta.shape[2], -1)).sum(3).to(delta.dtype)
    return (
        du,
        ddelta,
        dA,
        dB,
        dC,
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else dbias,
        None if initial_state is None else dh0.to(initial_state.dtype),
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd("iumad::selective_scan", _backward, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "selective_scan_backward has no derivative of its own: for second derivatives run the scan under "
        'iumad_kernels.backend("reference")'
    )


torch.library.register_autograd("iumad::selective_scan_backward", _no_second_derivative)
