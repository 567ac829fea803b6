"""Selective scan (Mamba S6) of a sequence, and the registration of the torch op behind all selective scans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iumad_kernels import gpu, reference
from iumad_kernels.backend import implement, select
from iumad_kernels.ops.checks import check_floating, check_shape
from iumad_kernels.ops.derivatives import differentiable_op, gradient_op, may_need_gradients
from iumad_kernels.ops.scan_arguments import (
    SCHEMES,
    adjacent,
    check_groups,
    check_parameters,
    compute_dtype,
    parameter,
)

# How the states are saved for backward: kScanTile, kScanChunk in csrc/core/selective_scan.h, kTile in csrc/cuda/selective_scan.h.
_TILE, _CHUNK, _CUDA_TILE = 16, 16, 64

implement("selective_scan", "cpu")


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
        delta: step sizes, (batch, dim, length), or (batch, rows, length) where rows divides dim: dim / rows channels
            share a row.
        A: (dim, N), real.
        B, C: (dim, N), (batch, N, length) or (batch, groups, N, length).
        D: skip weight, (dim,).
        z: gate, as u.
        delta_bias: (dim,), added to delta before the softplus.
        delta_softplus: pass delta through softplus.
        return_last_state: also return the state after the last token.
        initial_state: (batch, dim, N).
        reverse: scan from the last token to the first; the last state is then the one after token 0.

    Returns:
        out, (batch, dim, length), in u's dtype and layout; with ``return_last_state`` also the state, (batch, dim, N),
        in float32 (float64 for float64 inputs). Both are differentiable, as are all tensor arguments.

    float32, bfloat16 and float16 may be mixed: the recurrence runs in float32, autocast changes nothing. float64 goes
    only with float64. For backward the inputs are kept and one state per 16 tokens, batch * dim * N * length / 16
    values; otherwise memory traffic is one read of each input and one write of each output forward, twice that
    backward. Results do not depend on the number of threads.

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
    states = check_parameters(op, dim, delta.shape[1], A, D, delta_bias)
    for name, p in (("B", B), ("C", C)):
        shapes = ((dim, states), (batch, states, length), (batch, None, states, length))
        check_shape(op, name, p, *shapes, legend="(dim, N), (batch, N, length) or (batch, groups, N, length)")
    check_groups(op, dim, *(p.shape[1] if p.dim() == 4 else 1 if p.dim() == 3 else None for p in (B, C)))
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
    compute = compute_dtype(u)
    arguments = (
        u,
        delta,
        parameter(A, compute),
        _projection(B, compute),
        _projection(C, compute),
        None if D is None else parameter(D, compute),
        z,
        None if delta_bias is None else parameter(delta_bias, compute),
        initial_state,
    )
    scheme = "row_reverse" if reverse else "row"
    out, last_state = scan(arguments, scheme, 1, delta_softplus, want_last_state=return_last_state)
    return (out, last_state) if return_last_state else out


def _projection(p: Tensor, compute: torch.dtype) -> Tensor:
    """B or C as the kernels read them: constant ones are parameters."""
    return parameter(p, compute) if p.dim() == 2 else adjacent(p, -2)


def scan(
    tensors: tuple[Tensor | None, ...], scheme: str, step: int, delta_softplus: bool, want_last_state: bool
) -> tuple[Tensor, Tensor]:
    """torch.ops.iumad.selective_scan: output and last state, the latter empty unless wanted."""
    save_states = may_need_gradients(*tensors)
    out, last_state, _ = _scan(
        *tensors, SCHEMES.index(scheme), step, delta_softplus, save_states, want_last_state
    )
    return out, last_state


def _max_length(scheme: int, step: int, pixels: Sequence[int]) -> int:
    return math.prod(-(-n // step) if SCHEMES[scheme] == "es2d" else n for n in pixels)


def _runs_in_cuda(device: torch.device) -> bool:
    """Whether the CUDA C++ kernels run: they save their states in a form of their own."""
    return device.type == "cuda" and "selective_scan" in gpu.activate().cuda_ops


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
    want_last_state: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim, *pixels = u.shape
    *directions, _, N = A.shape
    K = directions[0] if directions else 1
    compute = compute_dtype(u)
    length = _max_length(scheme, step, pixels)
    if not save_states:
        shape: tuple[int, ...] = (0,)
    elif _runs_in_cuda(u.device):
        shape = (batch, K, -(-length // _CUDA_TILE), N, dim)
    else:
        shape = (batch, K, -(-dim // _CHUNK), -(-length // _TILE), N, _CHUNK)
    return (
        torch.empty_like(u),
        u.new_empty((batch, *A.shape) if want_last_state else (0,), dtype=compute),
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
    batch, dim = u.shape[:2]
    rows = _rows(delta)
    compute = compute_dtype(u)

    def new(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=compute)

    def projection(p: Tensor) -> Tensor:
        if u.dim() == 4 or p.dim() == 2:
            return new(*p.shape)
        return new(*p.shape[:-2], p.shape[-1], p.shape[-2]).transpose(-1, -2)

    sparse = SCHEMES[scheme] == "es2d" and A.shape[0] > 1 and delta.shape[1] > 1
    ddelta = (
        torch.empty_like(delta)
        if delta.shape[rows] == dim and not sparse
        else new(*delta.shape[:rows], dim, *delta.shape[rows + 1 :])
    )
    if delta.shape[rows] == dim and sparse:
        ddelta = ddelta.to(delta.dtype)
    return (
        torch.empty_like(u),
        ddelta,
        new(*A.shape),
        projection(B),
        projection(C),
        new(0) if D is None else new(*D.shape),
        new(0) if z is None else torch.empty_like(z),
        new(0) if delta_bias is None else new(*delta_bias.shape),
        new(batch, *A.shape) if has_initial_state else new(0),
    )


def _rows(delta: Tensor) -> int:
    """The dimension of its rows: (batch, rows, length) or (batch, direction, rows, H, W)."""
    return 1 if delta.dim() == 3 else 2


@torch.library.register_fake("iumad::selective_state_update")
def _fake_update(state: Tensor, u: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(u)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, scheme, step, delta_softplus, _, want_last_state = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.flags = (scheme, step, delta_softplus)
    ctx.mark_non_differentiable(*output[2 if want_last_state else 1 :])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None, _: None) -> tuple[Any, ...]:
    u, delta, A, B, C, D, z, delta_bias, initial_state, tile_states = ctx.saved_tensors
    if grad_out is None:
        grad_out = u.new_zeros(()).expand(u.shape)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dh0 = _gradients(
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
        rows = _rows(delta)
        ddelta = ddelta.unflatten(rows, (delta.shape[rows], -1)).sum(rows + 1).to(delta.dtype)
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
        *[None] * 5,
    )


_gradients = gradient_op("selective_scan_backward")
_scan = differentiable_op(torch.ops.iumad.selective_scan.default, _setup_context, _backward)
