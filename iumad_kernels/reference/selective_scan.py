"""Selective scan (Mamba, arXiv 2312.00752, section 3) in plain PyTorch, one token at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """The definition of :func:`iumad_kernels.selective_scan`; same arguments, shapes and results."""
    compute = torch.promote_types(u.dtype, torch.float32)
    (batch, dim, length), states = u.shape, A.shape[1]
    dtype, u, A = u.dtype, u.to(compute), A.to(compute)
    delta = delta.to(compute).repeat_interleave(dim // delta.shape[1], dim=1)
    if delta_bias is not None:
        delta = delta + delta_bias.to(compute)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (_per_channel(p.to(compute), batch, dim, length) for p in (B, C))

    h = u.new_zeros(batch, dim, states) if initial_state is None else initial_state.to(compute)
    outputs: list[Tensor] = [u.new_zeros(batch, dim)] * length
    for t in reversed(range(length)) if reverse else range(length):
        dt = delta[:, :, t, None]
        h = torch.exp(dt * A) * h + dt * B[..., t] * u[:, :, t, None]
        outputs[t] = (h * C[..., t]).sum(-1)
    y = torch.stack(outputs, dim=-1) if length else u
    if D is not None:
        y = y + D.to(compute)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(compute))
    y = y.to(dtype)
    return (y, h) if return_last_state else y


def _per_channel(p: Tensor, batch: int, dim: int, length: int) -> Tensor:
    """B or C in any of its forms as (batch, dim, N, length)."""
    if p.dim() == 2:
        return p[None, :, :, None].expand(batch, dim, p.shape[1], length)
    if p.dim() == 3:
        p = p[:, None]
    return p.repeat_interleave(dim // p.shape[1], dim=1)


def scan_order(scheme: str, rows: int, columns: int, step: int = 2) -> list[Tensor]:
    """The flat pixel numbers (row * columns + column) each direction visits, in order, as index tensors."""
    pixels = torch.arange(rows * columns).view(rows, columns)
    row, column = pixels.flatten(), pixels.t().flatten()
    if scheme == "row":
        return [row]
    if scheme == "bidirectional":
        return [row, row.flip(0)]
    if scheme == "cross":
        return [row, column, row.flip(0), column.flip(0)]
    if scheme == "es2d":
        grids = [pixels[i::step, j::step] for j in range(step) for i in range(step)]
        return [(grid.t() if k % 2 else grid).flatten() for k, grid in enumerate(grids)]
    raise ValueError(f"unknown scheme {scheme!r}")


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
    """The definition of :func:`iumad_kernels.selective_scan_2d`: gather each direction's pixels, scan, add back at
    the same pixels.
    """
    compute = torch.promote_types(u.dtype, torch.float32)
    rows, columns = u.shape[2:]
    y = torch.zeros_like(u, dtype=compute).flatten(2)
    for k, index in enumerate(scan_order(scheme, rows, columns, step)):

        def tokens(p: Tensor, plain_dims: int, k: int = k, index: Tensor = index) -> Tensor:
            p = p if p.dim() == plain_dims else p[:, k if p.shape[1] > 1 else 0]
            return p.flatten(-2)[..., index]

        def direction(p: Tensor | None, plain_dims: int, k: int = k) -> Tensor | None:
            return p if p is None or p.dim() == plain_dims else p[k]

        A_k, D_k, bias_k = direction(A, 2), direction(D, 1), direction(delta_bias, 1)
        assert A_k is not None
        scanned = selective_scan(
            tokens(u, 4).to(compute),
            tokens(delta, 4).to(compute),
            A_k,
            tokens(B, 4),
            tokens(C, 4),
            D_k,
            delta_bias=bias_k,
            delta_softplus=delta_softplus,
        )
        assert isinstance(scanned, Tensor)
        y = y.index_add(2, index.to(u.device), scanned)
    return y.unflatten(2, (rows, columns)).to(u.dtype)


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
    """The definition of :func:`iumad_kernels.selective_state_update`: one token, ``state`` updated in place."""
    compute = torch.promote_types(x.dtype, torch.float32)
    if has_heads := state.dim() == 4:
        heads = state.shape[1]
    else:
        heads = 1
        x, dt, z = x[:, None], dt[:, None], None if z is None else z[:, None]
        A, D, dt_bias = A[None], None if D is None else D[None], None if dt_bias is None else dt_bias[None]
    B, C = (p.unsqueeze(1) if p.dim() == 2 else p for p in (B, C))
    rows = state if state_batch_indices is None else state[state_batch_indices]
    h = (rows if has_heads else rows[:, None]).to(compute)
    step = dt.to(compute) + (0 if dt_bias is None else dt_bias.to(compute))
    step = (F.softplus(step) if dt_softplus else step)[..., None]
    if has_heads:
        B, C = (p.to(compute).repeat_interleave(heads // p.shape[1], dim=1)[:, :, None] for p in (B, C))
    else:
        B, C = (p.to(compute).repeat_interleave(x.shape[2] // p.shape[1], dim=1)[:, None] for p in (B, C))
    h = torch.exp(step * A.to(compute)) * h + step * B * x.to(compute)[..., None]
    y = (h * C).sum(-1)
    if D is not None:
        y = y + D.to(compute) * x.to(compute)
    if z is not None:
        y = y * F.silu(z.to(compute))
    new = (h if has_heads else h[:, 0]).to(state.dtype)
    if state_batch_indices is None:
        state.copy_(new)
    else:
        state[state_batch_indices] = new
    return (y if has_heads else y[:, 0]).to(x.dtype)
