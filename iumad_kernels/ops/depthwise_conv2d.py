"""Depthwise 2-D convolution + bias + SiLU, and the torch op behind it and the causal 1-D convolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iumad_kernels import reference
from iumad_kernels.backend import implement, select
from iumad_kernels.ops.checks import check_floating, check_shape
from iumad_kernels.ops.derivatives import differentiable_op, gradient_op
from iumad_kernels.ops.grids import empty_grid
from iumad_kernels.reference.depthwise_conv2d import same_padding

PADDINGS = ("symmetric", "tf_same")

implement("depthwise_conv2d", "cpu")


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: str = "symmetric",
    activation: str | None = None,
) -> Tensor:
    """Depthwise 2-D convolution, bias and SiLU in one pass: every channel is filtered with its own k x k kernel.

    Args:
        x: (batch, channels, H, W). Any strides; ``torch.channels_last`` is the fast layout.
        weight: (channels, 1, k, k), k odd, as that of a depthwise ``torch.nn.Conv2d``. bias: (channels,).
        stride: 1 or 2.
        padding: zeros around the image: ``"symmetric"`` k // 2 on every side, or ``"tf_same"`` as TensorFlow's SAME
            (the smaller half before; differs from symmetric only for stride 2).
        activation: None or ``"silu"``.

    Returns:
        (batch, channels, ceil(H / stride), ceil(W / stride)) in x's dtype; channels-last where x is (where its channels
        have stride 1), else contiguous.

    float32, bfloat16 and float16 may be mixed (sums run in float32; autocast changes nothing); float64 only with
    float64. Memory traffic is one read of x and one write of the result, forward; backward keeps x, computes the value
    before the SiLU again, and reads x and the gradient once and writes the gradient of x. Results do not depend on the
    thread count. Raises TypeError or ValueError naming the argument.

    >>> x = torch.randn(2, 8, 14, 14).contiguous(memory_format=torch.channels_last)
    >>> depthwise_conv2d(x, torch.randn(8, 1, 3, 3), torch.randn(8), stride=2, activation="silu").shape
    torch.Size([2, 8, 7, 7])
    """
    op = "depthwise_conv2d"
    check_floating(op, x=x, weight=weight, bias=bias)
    check_shape(op, "x", x, (None, None, None, None), legend="(batch, channels, H, W)")
    channels = x.shape[1]
    check_shape(op, "weight", weight, (channels, 1, None, None), legend="(channels, 1, k, k)")
    check_shape(op, "bias", bias, (channels,), legend="(channels,)")
    kernel = weight.shape[-1]
    if weight.shape[-2] != kernel or kernel % 2 == 0:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (channels, 1, k, k), k odd")
    if stride not in (1, 2):
        raise ValueError(f"{op}: stride = {stride!r}, expected 1 or 2")
    if padding not in PADDINGS:
        raise ValueError(f"{op}: padding = {padding!r}, expected one of {', '.join(map(repr, PADDINGS))}")
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation = {activation!r}, expected None or 'silu'")

    if select(op, x.device) == "reference":
        return reference.depthwise_conv2d(
            x, weight, bias, stride=stride, padding=padding, activation=activation
        )
    top, left = (same_padding(n, kernel, stride, padding)[0] for n in x.shape[2:])
    return conv_op(x, weight, bias, None, None, stride, top, left, activation == "silu")


class Arguments(NamedTuple):
    """Those of torch.ops.iumad.depthwise_conv2d, in its order; its backward has the gradient of the result before them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    history: Tensor | None
    sequence: Tensor | None
    stride: int
    pad_top: int
    pad_left: int
    silu: bool

    @property
    def out_size(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        return -(-self.x.shape[2] // self.stride), -(-self.x.shape[3] // self.stride)


@torch.library.register_fake("iumad::depthwise_conv2d")
def _fake(*arguments: Any) -> Tensor:
    conv = Arguments(*arguments)
    return empty_grid(conv.x, *conv.out_size)


@torch.library.register_fake("iumad::depthwise_conv2d_backward")
def _fake_backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias, history = Arguments(*arguments)[:4]
    return (
        empty_grid(x, x.shape[2], x.shape[3]),
        weight.new_empty(weight.shape),
        x.new_empty((0,)) if bias is None else bias.new_empty(bias.shape),
        x.new_empty((0,)) if history is None else empty_grid(history, 1, history.shape[3]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.flags = inputs[5:]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    _, _, bias, history, _ = tensors = ctx.saved_tensors
    dx, dweight, dbias, dhistory = _gradients(grad_out, *tensors, *ctx.flags)
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if history is None else dhistory,
        *(None,) * 5,
    )


_gradients = gradient_op("depthwise_conv2d_backward")
conv_op = differentiable_op(torch.ops.iumad.depthwise_conv2d.default, _setup_context, _backward)
