"""Causal depthwise 1-D convolution with its bias and activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iumad_kernels.ops.causal_conv1d import causal_conv1d


class CausalConv1d(nn.Module):
    """A filter of ``width`` tokens per channel, looking back, then bias and SiLU; see :func:`iumad_kernels.causal_conv1d`.

    Parameters and their initial values are those of the depthwise ``torch.nn.Conv1d`` in Mamba blocks, whose state dict loads.

    Args:
        dim: channels. width: tokens a result depends on. bias: add one. activation: None or ``"silu"``.

    Shapes: x (batch, dim, length) -> (batch, dim, length); ``forward`` passes the keyword arguments seq_idx,
    initial_states and return_final_states on.

    >>> CausalConv1d(8, 4, activation="silu")(torch.randn(2, 8, 20)).shape
    torch.Size([2, 8, 20])
    """

    def __init__(self, dim: int, width: int = 4, *, bias: bool = True, activation: str | None = None) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"CausalConv1d: width = {width}, expected at least 1")
        self.activation = activation
        bound = width**-0.5  # the number of inputs of an output is the width
        self.weight = nn.Parameter(torch.empty(dim, 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound)) if bias else None

    def forward(
        self,
        x: Tensor,
        *,
        seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Filter every channel of x."""
        return causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            seq_idx,
            initial_states,
            return_final_states,
            self.activation,
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        dim, _, width = self.weight.shape
        return f"{dim}, {width}, activation={self.activation!r}, bias={self.bias is not None}"
