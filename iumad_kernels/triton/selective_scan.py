"""Selective scan in Triton, forward; selective_scan_backward.py is its backward. Formulas: csrc/core/selective_scan.h.

A program takes one direction of one image and ``BLOCK_D`` channels, all N states of them in registers, and walks the
tokens in order: the same arithmetic in the same order as the definition, so any length, any N, inf and NaN behave alike.
(An associative scan would spend several times the operations and lose that.) The parallelism is batch x directions x
channels x states.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iumad_kernels.triton.launch import compute_type, launch, pow2
from iumad_kernels.triton.numerics import LOG2E, sigmoid, softplus
from iumad_kernels.triton.scan_order import advance, direction, longest, overlapping, start
from iumad_kernels.triton.tuning import tuned

# How the states are saved for backward: kScanTile, kScanChunk of csrc/core/selective_scan.h
TILE = 16  # tokens between two saved states
CHUNK = tl.constexpr(16)  # channels whose saved states lie together


@triton.jit
def load_token(tensors, strides, pixel, channel, state):
    """U, delta, B, C and z at one pixel; u again in place of what has no strides: constant B or C, absent z."""
    u, delta, B, C, z = tensors
    u_s, delta_s, B_s, C_s, z_s = strides
    at = pixel.to(tl.int64)
    u_t = tl.load(u + at * u_s[2], channel, other=0.0)
    delta_t = tl.load(delta + at * delta_s[3], channel, other=0.0)
    B_t = tl.load(B + at * B_s[3], state, other=0.0) if B_s is not None else u_t
    C_t = tl.load(C + at * C_s[3], state, other=0.0) if C_s is not None else u_t
    z_t = tl.load(z + at * z_s[2], channel, other=0.0) if z_s is not None else u_t
    return u_t, delta_t, B_t, C_t, z_t


@triton.jit
def time_step(delta_t, bias, SOFTPLUS: tl.constexpr):
    """The step size of a token from its delta and the bias."""
    dt = delta_t.to(bias.dtype) + bias
    return softplus(dt) if SOFTPLUS else dt


@triton.jit
def locate(dim, groups, directions, BLOCK_D: tl.constexpr):
    """What this program works on: (image, direction, group, block of channels in it, the channels, which of them exist)."""
    per_group = dim // groups
    blocks = tl.cdiv(per_group, BLOCK_D)
    program = tl.program_id(0).to(tl.int64)
    block, rest = program % blocks, program // blocks
    group, rest = rest % groups, rest // groups
    in_group = block * BLOCK_D + tl.arange(0, BLOCK_D)
    b, k, d = rest // directions, rest % directions, group * per_group + in_group
    return b, k, group, block, d, in_group < per_group


@triton.jit
def saved_at(scan, d, dim, tiles, N):
    """Where the saved states of channels ``d`` start in (scans, chunks, tiles, N, CHUNK)."""
    return (scan * tl.cdiv(dim, CHUNK) + d // CHUNK) * tiles * N * CHUNK + d % CHUNK


@triton.jit
def _forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, out, last_state, tile_states,
    u_s, delta_s, B_s, C_s, z_s, h_s, out_s, last_s,
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
    h = tl.zeros([BLOCK_D, BLOCK_N], COMPUTE)
    if initial_state is not None:
        h_at = b * h_s[0] + k * h_s[1] + d[:, None] * h_s[2] + n[None, :] * h_s[3]
        h = tl.load(initial_state + h_at, both, other=0.0).to(COMPUTE)

    u += b * u_s[0] + d * u_s[1]
    delta += b * delta_s[0] + k * delta_s[1] + d * delta_rows // dim * delta_s[2]
    if B_s is not None:
        B += b * B_s[0] + k * B_s[1] + group * B_s[2] + n
    if C_s is not None:
        C += b * C_s[0] + k * C_s[1] + group * C_s[2] + n
    if z is not None:
        z += b * z_s[0] + d * z_s[1]
    inputs, steps = (u, delta, B, C, z), (u_s, delta_s, B_s, C_s, z_s)
    out += k * out_s[0] + b * out_s[1] + d * out_s[2]
    if tile_states is not None:
        tile_states += saved_at((b * directions + k), d, dim, tiles, N)[:, None] + n[None, :] * CHUNK

    walk = direction(k.to(tl.int32), rows, columns, step, SCHEME)
    length = walk[0]
    pixel, i = start(0, walk)
    some = tl.where(length > 0, 1, 0)  # without tokens there may be nothing to read
    ahead = load_token(inputs, steps, pixel, channel & (d < some * dim), state & (n < some * N))
    for token in range(length):
        u_t, delta_t, B_t, C_t, z_t = ahead
        here = pixel.to(tl.int64)
        # The next token's loads start before this token's arithmetic, and hide behind it.
        pixel, i = advance(token, pixel, i, walk)
        ahead = load_token(inputs, steps, pixel, channel, state)
        if tile_states is not None and token % TILE == 0:
            tl.store(tile_states, h, both)
            tile_states += N * CHUNK
        u_t = u_t.to(COMPUTE)
        dt = time_step(delta_t, bias, SOFTPLUS)
        B_now = B_t[None, :] if B_s is not None else constant_B
        C_now = C_t[None, :] if C_s is not None else constant_C
        h = tl.exp2(dt[:, None] * A_log2) * h + B_now * (dt * u_t)[:, None]
        y = tl.sum(C_now * h, 1)
        if D is not None:
            y += skip * u_t
        if z is not None:
            z_t = z_t.to(COMPUTE)
            y *= z_t * sigmoid(z_t)
        tl.store(out + here * out_s[3], y, channel)
    if last_state is not None:
        last_at = b * last_s[0] + k * last_s[1] + d[:, None] * last_s[2] + n[None, :] * last_s[3]
        tl.store(last_state + last_at, h, both)


def blocks(op: str, scans: int, channels: int, states: int, least: int) -> dict[str, int]:
    """Sizes for ``scans`` scans of ``states`` states each, ``channels`` of them sharing B and C: BLOCK_D, BLOCK_N, warps.

    A thread holds 16 states; fewer, down to ``least``, where that leaves an H100 with less than 8 warps per multiprocessor:
    the more it holds, the less it repeats of what is done once per channel, and the fewer parts dB and dC have. The device
    is not asked, so the results do not depend on it.
    """
    per_thread = 16
    block_n = pow2(states)
    while per_thread > least and scans * block_n < 132 * 8 * 32 * per_thread:
        per_thread //= 2
    block_d = min(max(32 * per_thread // block_n, 1), pow2(channels))
    warps = pow2(block_d * block_n // (32 * per_thread), at_most=16)
    return {"BLOCK_N": block_n} | tuned(op, {"BLOCK_D": block_d, "num_warps": warps})


def grid_form(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, *states: Tensor | None
) -> tuple[Any, ...]:
    """The arguments of a sequence in the form of those of a grid of one row; ``states`` are (batch, dim, N)."""

    def projection(p: Tensor) -> Tensor:
        if p.dim() == 2:
            return p.unsqueeze(0)
        return (p if p.dim() == 4 else p.unsqueeze(1)).mT[:, None, :, None]

    return (
        u.unsqueeze(2), delta[:, None, :, None], A.unsqueeze(0), projection(B), projection(C),
        None if z is None else z.unsqueeze(2), *(None if s is None else s.unsqueeze(1) for s in states),
    )  # fmt: skip


def flat(t: Tensor) -> Tensor:
    """``t`` with its two dimensions of pixels as one: a view where the strides allow. Constant B and C as they are."""
    row = {4: 2, 5: 3, 6: 3}.get(t.dim())  # (b, c, H, W), (b, k, c, H, W), (b, k, group, H, W, N)
    return t if row is None else t.flatten(row, row + 1)


def strides(t: Tensor | None, direction_dim: int | None = None) -> tuple[int, ...] | None:
    """The strides of ``t`` as kernels take them: 0 where all directions share one slice, None for what has no pixels."""
    if t is None or t.dim() < 3 or direction_dim is not None and t.dim() == 3:
        return None
    return tuple(0 if i == direction_dim and t.shape[i] == 1 else s for i, s in enumerate(t.stride()))


def describe(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> dict[str, Any]:
    """The arguments forward and backward have in common."""
    flat_B, flat_C = flat(B), flat(C)
    K, dim, N = A.shape
    return {
        "u": flat(u), "delta": flat(delta), "A": A, "B": flat_B, "C": flat_C, "z": None if z is None else flat(z),
        "dim": dim, "groups": 1 if B.dim() == C.dim() == 3 else (C if B.dim() == 3 else B).shape[2],
        "delta_rows": delta.shape[2], "rows": u.shape[2], "columns": u.shape[3], "directions": K, "N": N,
        "u_s": flat(u).stride(), "delta_s": strides(flat(delta), 1),
        "B_s": strides(flat_B, 1), "C_s": strides(flat_C, 1), "z_s": None if z is None else flat(z).stride(),
    }  # fmt: skip


def parts(like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Empty (count, *like.shape), every slice laid out as ``like``."""
    layout = torch.empty_like(like, device="meta").stride()
    return torch.empty_strided((count, *like.shape), (like.numel(), *layout), dtype=dtype, device=like.device)


def finished(partial: Tensor, like: Tensor) -> Tensor:
    """The sum of (count, *) over its first dimension, in the shape, type and layout of ``like``."""
    total = (partial.sum(0) if partial.shape[0] > 1 else partial[0]).view(like.shape)
    if total.dtype == like.dtype and total.stride() == like.stride():
        return total
    return torch.empty_like(like).copy_(total)


def forward(
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
    """torch.ops.iumad.selective_scan."""
    last_state = u.new_empty((u.shape[0], *A.shape) if want_last_state else (0,), dtype=compute_type(u)[0])
    wanted = last_state if want_last_state else None
    sequence = u.dim() == 3
    if sequence:
        u, delta, A, B, C, z, initial_state, wanted = grid_form(u, delta, A, B, C, z, initial_state, wanted)
    scan = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    out, tile_states = _run(scan, wanted, scheme, step, delta_softplus, save_states)
    return out.squeeze(2) if sequence else out, last_state, tile_states


def update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """torch.ops.iumad.selective_state_update: a scan of one token, from ``state`` to ``state``."""
    scan = (u, delta, A, B, C, D, z, delta_bias, state)
    out, _ = _run(scan, state, 0, 1, delta_softplus, False)
    return out


def _run(
    scan: tuple[Any, ...],
    last_state: Tensor | None,
    scheme: int,
    step: int,
    delta_softplus: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """Fills ``last_state``, which may be the initial one, or absent; returns the rest.

    Directions that meet at a pixel write parts of their own, added up in order.
    """
    u, delta, A, B, C, D, z, delta_bias, initial_state = scan
    (batch, _, H, W), (K, dim, N) = u.shape, A.shape
    dtype, compute = compute_type(u)
    common = describe(u, delta, A, B, C, z)
    tiles = -(-longest(scheme, step, H, W) // TILE)
    tile_states = u.new_empty(
        (batch, K, -(-dim // CHUNK.value), tiles, N, CHUNK.value) if save_states else (0,), dtype=dtype
    )
    meet = overlapping(scheme)
    out = parts(common["u"], K if meet else 1, dtype if meet else u.dtype)
    size = blocks("selective_scan", batch * K * dim, dim // common["groups"], N, least=4)
    launch(
        _forward, batch * K * common["groups"] * -(-(dim // common["groups"]) // size["BLOCK_D"]), u, **common,
        D=D, delta_bias=delta_bias, initial_state=initial_state, h_s=None if initial_state is None else initial_state.stride(),
        last_state=last_state, last_s=None if last_state is None else last_state.stride(), out=out, out_s=strides(out, 0),
        tile_states=tile_states if save_states else None, tiles=tiles, step=step,
        SCHEME=scheme, SOFTPLUS=delta_softplus, TILE=TILE, COMPUTE=compute, **size,
    )  # fmt: skip
    return finished(out, u), tile_states
