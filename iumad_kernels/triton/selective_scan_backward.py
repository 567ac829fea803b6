"""Backward of the selective scan in Triton. Formulas: csrc/core/selective_scan.h.

A program takes the same block as in the forward pass and walks its tiles of 16 tokens from the last to the first: from
the state saved at the tile's start it recomputes the tile's states into a scratch of its own (small enough to live in the
caches), then runs the adjoint back through them. Sums over tokens stay in registers; sums over channels (for B and C),
images and directions that meet are written as parts and added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iumad_kernels.triton.launch import compute_type, launch
from iumad_kernels.triton.numerics import LN2, LOG2E, sigmoid
from iumad_kernels.triton.scan_order import advance, direction, overlapping, pixel_directions, retreat, start
from iumad_kernels.triton.selective_scan import (
    CHUNK,
    TILE,
    blocks,
    describe,
    finished,
    flat,
    grid_form,
    load_token,
    locate,
    parts,
    saved_at,
    time_step,
)


@triton.jit
def _backward(
    u, delta, A, B, C, D, z, delta_bias, tile_states, dout, dlast,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial, scratch,
    u_s, delta_s, B_s, C_s, z_s, dout_s, dlast_s, du_s, ddelta_s, dB_s, dC_s, dz_s,
    dim, groups, delta_rows, rows, columns, step, directions, tiles, N,
    SCHEME: tl.constexpr, SOFTPLUS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    b, k, group, block, d, channel = locate(dim, groups, directions, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    state, both = n < N, channel[:, None] & (n < N)[None, :]
    kd = k * dim + d
    kdn = kd[:, None] * N + n[None, :]
    A_log2 = tl.load(A + kdn, both, other=0.0) * LOG2E
    none = tl.zeros([BLOCK_D], COMPUTE)
    bias = tl.load(delta_bias + kd, channel, other=0.0) if delta_bias is not None else none
    skip = tl.load(D + kd, channel, other=0.0) if D is not None else none
    constant_B = tl.load(B + kdn, both, other=0.0) if B_s is None else A_log2
    constant_C = tl.load(C + kdn, both, other=0.0) if C_s is None else A_log2
    g = tl.zeros([BLOCK_D, BLOCK_N], COMPUTE)  # the gradient of the state after the token at hand
    sum_A, sum_B, sum_C = tl.zeros_like(g), tl.zeros_like(g), tl.zeros_like(g)
    sum_D, sum_bias = none, none
    if dlast is not None:
        g_at = b * dlast_s[0] + k * dlast_s[1] + d[:, None] * dlast_s[2] + n[None, :] * dlast_s[3]
        g = tl.load(dlast + g_at, both, other=0.0).to(COMPUTE)

    u += b * u_s[0] + d * u_s[1]
    delta += b * delta_s[0] + k * delta_s[1] + d * delta_rows // dim * delta_s[2]
    if B_s is not None:
        B += b * B_s[0] + k * B_s[1] + group * B_s[2] + n
        dB += block * dB_s[0] + k * dB_s[1] + b * dB_s[2] + k * dB_s[3] + group * dB_s[4] + n
    if C_s is not None:
        C += b * C_s[0] + k * C_s[1] + group * C_s[2] + n
        dC += block * dC_s[0] + k * dC_s[1] + b * dC_s[2] + k * dC_s[3] + group * dC_s[4] + n
    if z is not None:
        z += b * z_s[0] + d * z_s[1]
        dz += k * dz_s[0] + b * dz_s[1] + d * dz_s[2]
    inputs, steps = (u, delta, B, C, z), (u_s, delta_s, B_s, C_s, z_s)
    state_steps = (u_s, delta_s, B_s, None, None)  # what the states depend on
    dout += b * dout_s[0] + d * dout_s[1]
    du += k * du_s[0] + b * du_s[1] + d * du_s[2]
    ddelta += k * ddelta_s[0] + b * ddelta_s[1] + k * ddelta_s[2] + d * ddelta_s[3]
    tile_states += saved_at((b * directions + k), d, dim, tiles, N)[:, None] + n[None, :] * CHUNK
    in_block = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]
    scratch += tl.program_id(0).to(tl.int64) * TILE * BLOCK_D * BLOCK_N + in_block

    walk = direction(k.to(tl.int32), rows, columns, step, SCHEME)
    length = walk[0]
    used = tl.cdiv(length, TILE)
    tile_states += used.to(tl.int64) * N * CHUNK
    for tile in range(used):
        tile_states -= N * CHUNK
        first = (used - 1 - tile) * TILE
        last = tl.minimum(first + TILE, length) - 1
        # Forward through the tile: the state before each token goes to this program's scratch.
        h = tl.load(tile_states, both, other=0.0)
        pixel, i = start(first, walk)
        ahead = load_token(inputs, state_steps, pixel, channel, state)
        for token in range(first, last + 1):
            tl.store(scratch + (token - first) * BLOCK_D * BLOCK_N, h)
            u_t, delta_t, B_t, _, _ = ahead
            pixel, i = advance(token, pixel, i, walk)
            ahead = load_token(inputs, state_steps, pixel, channel, state)
            dt = time_step(delta_t, bias, SOFTPLUS)
            B_now = B_t[None, :] if B_s is not None else constant_B
            h = tl.exp2(dt[:, None] * A_log2) * h + B_now * (dt * u_t.to(COMPUTE))[:, None]
        tl.debug_barrier()  # the scratch is written
        # Back through the tile with the adjoint; ``h`` is the state after the token.
        pixel, i = start(last, walk)
        ahead = load_token(inputs, steps, pixel, channel, state)
        dout_next = tl.load(dout + pixel.to(tl.int64) * dout_s[2], channel, other=0.0)
        for token in range(last, first - 1, -1):
            u_t, delta_t, B_t, C_t, z_t = ahead
            dy = dout_next.to(COMPUTE)
            here = pixel.to(tl.int64)
            before = tl.load(scratch + (token - first) * BLOCK_D * BLOCK_N)
            pixel, i = retreat(token, pixel, i, walk)
            ahead = load_token(inputs, steps, pixel, channel, state)
            dout_next = tl.load(dout + pixel.to(tl.int64) * dout_s[2], channel, other=0.0)

            u_t = u_t.to(COMPUTE)
            dt = time_step(delta_t, bias, SOFTPLUS)
            B_now = B_t[None, :] if B_s is not None else constant_B
            C_now = C_t[None, :] if C_s is not None else constant_C
            if z is not None:
                z_t = z_t.to(COMPUTE)
                gate = sigmoid(z_t)
                y = tl.sum(C_now * h, 1) + skip * u_t
                tl.store(dz + here * dz_s[3], dy * y * gate * (1.0 + z_t * (1.0 - gate)), channel)
                dy *= z_t * gate
            dC_t = dy[:, None] * h
            g += dy[:, None] * C_now
            dB_t = g * (dt * u_t)[:, None]
            g_B = tl.sum(g * B_now, 1)
            g *= tl.exp2(dt[:, None] * A_log2)
            flow = g * before  # the gradient of the exponent dt A
            d_dt = tl.sum(flow * A_log2, 1) * LN2 + u_t * g_B
            if SOFTPLUS:
                d_dt *= sigmoid(delta_t.to(COMPUTE) + bias)
            sum_A += flow * dt[:, None]
            sum_D += dy * u_t
            sum_bias += d_dt
            tl.store(du + here * du_s[3], dt * g_B + skip * dy, channel)
            tl.store(ddelta + here * ddelta_s[4], d_dt, channel)
            if B_s is not None:
                tl.store(dB + here * dB_s[5], tl.sum(dB_t, 0), state)
            else:
                sum_B += dB_t
            if C_s is not None:
                tl.store(dC + here * dC_s[5], tl.sum(dC_t, 0), state)
            else:
                sum_C += dC_t
            h = before
        tl.debug_barrier()  # the scratch is read

    bkd = b * directions * dim + kd
    bkdn = bkd[:, None] * N + n[None, :]
    tl.store(dA + bkdn, sum_A, both)
    if B_s is None:
        tl.store(dB + bkdn, sum_B, both)
    if C_s is None:
        tl.store(dC + bkdn, sum_C, both)
    if D is not None:
        tl.store(dD + bkd, sum_D, channel)
    if delta_bias is not None:
        tl.store(dbias + bkd, sum_bias, channel)
    if dinitial is not None:
        tl.store(dinitial + bkdn, g, both)


def backward(
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
    """torch.ops.iumad.selective_scan_backward: gradients of u, delta (all channels), A, B, C, D, z, delta_bias, initial_state."""
    if u.dim() == 3:
        return _sequence_backward(
            grad_out, grad_last_state, u, delta, A, B, C, D, z, delta_bias, tile_states,
            scheme, step, delta_softplus, has_initial_state,
        )  # fmt: skip
    batch, (K, dim, N), pixels = u.shape[0], A.shape, u.shape[2] * u.shape[3]
    dtype, compute = compute_type(u)
    common = describe(u, delta, A, B, C, z)
    meet = overlapping(scheme)
    size = blocks("selective_scan_backward", batch * K * dim, dim // common["groups"], N, least=8)
    count = -(-(dim // common["groups"]) // size["BLOCK_D"])  # blocks of channels in a group

    def new(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=dtype)

    def unvisited(t: Tensor, directions: int) -> Tensor:
        """Zero where not all pixels are visited: a slice of its own for each of several disjoint directions."""
        return t.zero_() if directions > 1 and not meet else t

    def projection(p: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
        if p.dim() == 3:
            return new(batch, K, dim, N), None
        # Disjoint directions share one slice: every pixel belongs to one of them.
        shared = p.shape[1] == 1 or not meet
        part = new(count, K if meet and shared else 1, batch, 1 if shared else K, common["groups"], pixels, N)
        s = part.stride()
        s = (s[0], s[1] if part.shape[1] > 1 else 0, s[2], 0 if shared else s[3], s[4], s[5])
        return part, s

    du = parts(common["u"], K if meet else 1, dtype if meet else u.dtype)
    dz = None if z is None else parts(common["z"], K if meet else 1, dtype if meet else z.dtype)
    delta_directions, all_rows = delta.shape[1], delta.shape[2] == dim
    delta_meet = meet and delta_directions == 1
    like = common["delta"] if all_rows else new(batch, delta_directions, dim, pixels)
    ddelta = parts(like, K if delta_meet else 1, delta.dtype if all_rows and not delta_meet else dtype)
    ddelta = unvisited(ddelta, delta_directions)
    dA = new(batch, K, dim, N)
    dB, dB_s = projection(B)
    dC, dC_s = projection(C)
    dD = None if D is None else new(batch, K, dim)
    dbias = None if delta_bias is None else new(batch, K, dim)
    dinitial = new(batch, K, dim, N) if has_initial_state else None
    programs = batch * K * common["groups"] * count
    scratch = new(programs, TILE, size["BLOCK_D"], size["BLOCK_N"])
    dout = flat(grad_out)
    launch(
        _backward, programs, u, **common,
        D=D, delta_bias=delta_bias, tile_states=tile_states, dout=dout, dlast=grad_last_state,
        du=du, ddelta=ddelta, dA=dA, dB=dB, dC=dC, dD=dD, dz=dz, dbias=dbias, dinitial=dinitial, scratch=scratch,
        dout_s=dout.stride(), dlast_s=None if grad_last_state is None else grad_last_state.stride(),
        du_s=_parted(du, 0), ddelta_s=_parted(ddelta, 0, 2), dB_s=dB_s, dC_s=dC_s, dz_s=None if dz is None else _parted(dz, 0),
        tiles=tile_states.shape[3], step=step, SCHEME=scheme, SOFTPLUS=delta_softplus, TILE=TILE, COMPUTE=compute, **size,
    )  # fmt: skip
    none = new(0)

    def total(part: Tensor | None) -> Tensor:
        return none if part is None else part.sum(0)

    def projection_total(part: Tensor, p: Tensor) -> Tensor:
        if p.dim() == 3:
            return part.sum(0)
        sum_of_parts = part.sum((0, 1))
        if meet or p.shape[1] == 1:
            return sum_of_parts.view(p.shape)
        own = (
            pixel_directions(step, u.shape[2], u.shape[3], u.device)
            == torch.arange(K, device=u.device)[:, None, None]
        )
        at_pixels = sum_of_parts.view(batch, 1, common["groups"], *u.shape[2:], N)
        return torch.where(own[:, None, :, :, None], at_pixels, 0.0)

    ddelta_like = delta if all_rows else new(batch, delta_directions, dim, *u.shape[2:])
    return (
        finished(du, u),
        finished(ddelta, ddelta_like),
        total(dA),
        projection_total(dB, B),
        projection_total(dC, C),
        total(dD),
        none if dz is None or z is None else finished(dz, z),
        total(dbias),
        none if dinitial is None else dinitial,
    )


def _sequence_backward(
    grad_out: Tensor, grad_last_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, tile_states: Tensor,
    scheme: int, step: int, delta_softplus: bool, has_initial_state: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``backward`` of a sequence: the gradients of a grid of one row, in the forms a sequence has."""
    u, delta, A, B_grid, C_grid, z_grid, grad_last_state = grid_form(u, delta, A, B, C, z, grad_last_state)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = backward(
        grad_out.unsqueeze(2), grad_last_state, u, delta, A, B_grid, C_grid, D, z_grid, delta_bias, tile_states,
        scheme, step, delta_softplus, has_initial_state,
    )  # fmt: skip

    def projection(gradient: Tensor, p: Tensor) -> Tensor:
        if p.dim() == 2:
            return gradient.squeeze(0)
        return (gradient[:, 0, :, 0] if p.dim() == 4 else gradient[:, 0, 0, 0]).mT

    return (
        du.squeeze(2), ddelta[:, 0, :, 0], dA.squeeze(0), projection(dB, B), projection(dC, C), dD.flatten(),
        dz if z is None else dz.squeeze(2), dbias.flatten(), dinitial.squeeze(1) if has_initial_state else dinitial,
    )  # fmt: skip


def _parted(t: Tensor, *broadcast: int) -> tuple[int, ...]:
    """Strides, 0 in those of the named dimensions that have size 1."""
    return tuple(0 if i in broadcast and t.shape[i] == 1 else s for i, s in enumerate(t.stride()))
