"""Depthwise 2-D convolution with its bias and activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iumad_kernels.ops.depthwise_conv2d import depthwise_conv2d


class DepthwiseConv2d(nn.Module):
    """A k x k filter per channel, then bias and SiLU, in one pass.

    Parameters and their initial values are those of a depthwise ``torch.nn.Conv2d``, whose state dict loads.

    Args:
        channels: of input and output. kernel_size: k, odd. stride: 1 or 2.
        padding: ``"symmetric"`` or ``"tf_same"``. bias: add one. activation: None or ``"silu"``.

    Shapes: (batch, channels, H, W) -> (batch, channels, ceil(H / stride), ceil(W / stride)); ``torch.channels_last`` is
    the fast layout. See :func:`iumad_kernels.depthwise_conv2d`.

    >>> DepthwiseConv2d(8, 3, activation="silu")(torch.randn(2, 8, 14, 14)).shape
    torch.Size([2, 8, 14, 14])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: str = "symmetric",
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"DepthwiseConv2d: kernel_size = {kernel_size}, expected an odd number")
        self.stride, self.padding, self.activation = stride, padding, activation
        bound = 1 / kernel_size  # 1 / sqrt(k * k), the number of inputs of an output
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Filter every channel of x."""
        return depthwise_conv2d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        channels, _, kernel_size, _ = self.weight.shape
        options = f"stride={self.stride}, padding={self.padding!r}, activation={self.activation!r}"
        return f"{channels}, {kernel_size}, {options}, bias={self.bias is not None}"
