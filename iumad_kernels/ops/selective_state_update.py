"""The single step of a selective scan, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from iumad_kernels import reference
from iumad_kernels.backend import implement, select
from iumad_kernels.ops.checks import check_divides, check_floating, check_shape
from iumad_kernels.ops.scan_arguments import compute_dtype

implement("selective_state_update", "cpu")


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
    """One token of a selective scan, for generation; ``state`` is updated in place. Semantics of ``mamba_ssm``'s Triton function.

    Args:
        state: (batch, dim, N) or, with heads, (batch, nheads, dim, N); any floating dtype, float32 keeps full accuracy.
        x, dt, z: (batch, dim) or (batch, nheads, dim).
        A: (dim, N) or (nheads, dim, N).
        B, C: (batch, N) or (batch, ngroups, N); ngroups divides nheads (dim where there are no heads).
        D, dt_bias: (dim,) or (nheads, dim).
        dt_softplus: pass dt + dt_bias through softplus.
        state_batch_indices: (batch,) integers: the rows of a larger ``state`` this batch reads and writes (distinct).

    Returns:
        out, as x, in x's dtype. Not differentiable: for gradients call :func:`selective_scan` with length 1 and
        ``initial_state``.

    >>> state, x, A, p = torch.zeros(2, 4, 8), torch.ones(2, 4), -torch.ones(4, 8), torch.ones(2, 8)
    >>> y = selective_state_update(state, x, x, A, p, p)
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
    compute = compute_dtype(x)
    picked = state if state_batch_indices is None else state[state_batch_indices]
    flat = picked.reshape(rows, 1, -1, states)  # a view where the strides allow it
    groups = max(B.shape[1] if B.dim() == 3 else 1, C.shape[1] if C.dim() == 3 else 1)

    def token(t: Tensor) -> Tensor:
        return t.reshape(rows, -1, 1, 1)

    def channelparameter(t: Tensor | None, *tail: int) -> Tensor | None:
        return None if t is None else t.reshape(1, -1, *tail).to(compute).contiguous()

    def projection(t: Tensor) -> Tensor:
        t = t if t.dim() == 3 else t.unsqueeze(1)
        return t.expand(rows, groups, states).to(compute).contiguous()[:, None, :, None, None]

    out = torch.ops.iumad.selective_state_update(
        flat,
        token(x),
        token(dt).unsqueeze(1),
        channelparameter(A, states),
        projection(B),
        projection(C),
        channelparameter(D),
        None if z is None else token(z),
        channelparameter(dt_bias),
        dt_softplus,
    )
    if state_batch_indices is not None:
        state[state_batch_indices] = flat.view_as(picked)
    elif flat.data_ptr() != state.data_ptr():
        state.copy_(flat.view_as(state))
    return out.reshape(x.shape)
