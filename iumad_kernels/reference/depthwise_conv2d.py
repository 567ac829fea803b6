"""Depthwise 2-D convolution + bias + SiLU in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def same_padding(size: int, kernel: int, stride: int, padding: str) -> tuple[int, int]:
    """Zeros before and after ``size`` pixels; the result has ceil(size / stride) pixels either way.

    ``"symmetric"``: kernel // 2 on both sides, as PyTorch models have it; ``"tf_same"``: as few as TensorFlow's SAME
    needs, the smaller half before.
    """
    if padding == "symmetric":
        return kernel // 2, kernel // 2
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: str = "symmetric",
    activation: str | None = None,
) -> Tensor:
    """The definition of :func:`iumad_kernels.depthwise_conv2d`; same arguments, shapes and results."""
    compute = torch.promote_types(x.dtype, torch.float32)
    rows, columns = (same_padding(n, weight.shape[-1], stride, padding) for n in x.shape[2:])
    padded = F.pad(x.to(compute), (*columns, *rows))
    y = F.conv2d(
        padded, weight.to(compute), None if bias is None else bias.to(compute), stride, groups=x.shape[1]
    )
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)
