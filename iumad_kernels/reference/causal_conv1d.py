"""Causal depthwise 1-D convolution + bias + SiLU in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of :func:`iumad_kernels.causal_conv1d`; same arguments, shapes and results."""
    compute = torch.promote_types(x.dtype, torch.float32)
    (batch, dim, length), width = x.shape, weight.shape[1]
    before = x.new_zeros(batch, dim, width - 1) if initial_states is None else initial_states.to(x.dtype)
    padded = torch.cat([before, x], dim=2)
    y = torch.zeros_like(x, dtype=compute)
    for k in range(width):
        tap = padded[..., k : k + length].to(compute)
        if seq_idx is not None:
            same = F.pad(seq_idx, (width - 1, 0), value=-1)[:, k : k + length] == seq_idx
            tap = tap.where(same[:, None], 0)
        y = y + weight[:, k, None].to(compute) * tap
    if bias is not None:
        y = y + bias[:, None].to(compute)
    if seq_idx is not None:
        y = y.where(seq_idx[:, None] >= 0, 0)
    y = (y if activation is None else F.silu(y)).to(x.dtype)
    return (y, padded[..., length:]) if return_final_states else y
