"""Causal depthwise 1-D convolution + bias + SiLU: a grid of one row to the depthwise 2-D convolution."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from iumad_kernels import reference
from iumad_kernels.backend import backend_for, implement, select
from iumad_kernels.ops.checks import check_floating, check_shape
from iumad_kernels.ops.depthwise_conv2d import conv_op

implement("causal_conv1d", "cpu", torch_op="depthwise_conv2d")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``causal_conv1d_fn`` of the package causal-conv1d: token t sees the tokens t - width + 1 ... t of its channel.

    Args:
        x: (batch, dim, length). Any strides; channels-last (dim with stride 1) is the fast layout.
        weight: (dim, width), any width >= 1; 2 to 4 are the fast ones. bias: (dim,).
        seq_idx: (batch, length) integers, the sequence a token belongs to: tokens of others do not count; where it is
            negative the result is 0. Not together with states.
        initial_states: the width - 1 tokens before the first, (batch, dim, width - 1); default zeros.
        return_final_states: also return the last width - 1 tokens, to be the next call's initial_states.
        activation: None, ``"silu"`` or ``"swish"`` (the same).

    Returns:
        (batch, dim, length) in x's dtype and layout; with ``return_final_states`` also (batch, dim, width - 1) in x's
        dtype. Both are differentiable, as are x, weight, bias and initial_states.

    float32, bfloat16 and float16 may be mixed (sums run in float32; autocast changes nothing); float64 only with float64.
    Unlike the package, any width, layout and strides. Memory traffic and what is kept for backward are those of
    :func:`iumad_kernels.depthwise_conv2d`; results do not depend on the thread count. On CUDA the package itself runs
    where it is installed and supports the arguments. Raises TypeError or ValueError naming the argument.

    >>> causal_conv1d(torch.randn(2, 8, 20), torch.randn(8, 4), torch.randn(8), activation="silu").shape
    torch.Size([2, 8, 20])
    """
    op = "causal_conv1d"
    check_floating(op, x=x, weight=weight, bias=bias, initial_states=initial_states)
    check_shape(op, "x", x, (None, None, None), legend="(batch, dim, length)")
    batch, dim, length = x.shape
    check_shape(op, "weight", weight, (dim, None), legend="(dim, width)")
    width = weight.shape[1]
    if width < 1:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (dim, width), width >= 1")
    check_shape(op, "bias", bias, (dim,), legend="(dim,)")
    check_shape(
        op, "initial_states", initial_states, (batch, dim, width - 1), legend="(batch, dim, width - 1)"
    )
    check_shape(op, "seq_idx", seq_idx, (batch, length), legend="(batch, length)")
    if seq_idx is not None:
        if seq_idx.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: seq_idx has dtype {seq_idx.dtype}, expected int32 or int64")
        if seq_idx.device != x.device:
            raise ValueError(f"{op}: seq_idx is on {seq_idx.device}, but x is on {x.device}")
        if initial_states is not None or return_final_states:
            raise ValueError(f"{op}: seq_idx cannot be combined with initial_states or return_final_states")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{op}: activation = {activation!r}, expected None, 'silu' or 'swish'")

    if package := _package(
        x, width, seq_idx is not None or initial_states is not None or return_final_states
    ):
        return package(
            x,
            weight,
            bias,
            seq_idx=None if seq_idx is None else seq_idx.to(torch.int32),
            initial_states=initial_states,
            return_final_states=return_final_states,
            activation=activation,
        )
    if select(op, x.device) == "reference":
        return reference.causal_conv1d(
            x, weight, bias, seq_idx, initial_states, return_final_states, activation
        )
    out = conv_op(
        x.unsqueeze(2),
        weight[:, None, None],
        bias,
        None if initial_states is None or width == 1 else initial_states.unsqueeze(2),
        None if seq_idx is None else seq_idx.to(torch.int32).contiguous(),
        1,
        0,
        width - 1,
        activation is not None,
    ).squeeze(2)
    return (out, _final_states(x, initial_states, width)) if return_final_states else out


def _final_states(x: Tensor, initial_states: Tensor | None, width: int) -> Tensor:
    """The last width - 1 tokens, reaching back into the initial states where x is shorter."""
    missing = width - 1 - x.shape[2]
    if missing <= 0:
        return x[..., -missing:].clone()
    if initial_states is None:
        return torch.nn.functional.pad(x, (missing, 0))
    return torch.cat([initial_states[..., -missing:].to(x.dtype), x], dim=2)


def _package(x: Tensor, width: int, needs_channels_last: bool) -> Callable[..., Any] | None:
    """The function of the package causal-conv1d, where it is installed and supports such arguments."""
    if x.device.type != "cuda" or not 2 <= width <= 4 or x.dtype == torch.float64:
        return None
    channels_last = x.stride(1) == 1 and x.shape[1] % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
    if not channels_last and (needs_channels_last or x.stride(2) != 1):
        return None
    if (
        backend_for("causal_conv1d", x.device).reason.startswith("forced")
        or find_spec("causal_conv1d") is None
    ):
        return None
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn
