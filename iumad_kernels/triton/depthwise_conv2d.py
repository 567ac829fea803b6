"""Depthwise convolution + bias + SiLU in Triton, over grids and (a grid of one row) sequences.

Formulas: csrc/core/depthwise_conv2d.h.
A program takes a tile of pixels and channels and reads the pixel under each tap; from the second tap on they come from the
first-level cache, whose bandwidth is several times what the tile costs. Backward is three kernels: the gradient of the
value before the SiLU (needed at k x k places, so it is written out), that of x, and the partial sums of those of weight
and bias, which are added up in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from iumad_kernels.ops.depthwise_conv2d import Arguments
from iumad_kernels.ops.grids import empty_grid
from iumad_kernels.triton.launch import compute_type, launch, pow2
from iumad_kernels.triton.numerics import sigmoid
from iumad_kernels.triton.tiles import locate, programs, sizes
from iumad_kernels.triton.tuning import tuned


@triton.jit
def _at(t, t_s, row, column):
    return t + row.to(tl.int64) * t_s[2] + column.to(tl.int64) * t_s[3]


@triton.jit
def _tap(
    x,
    x_s,
    history,
    history_s,
    sequence,
    number,
    row,
    column,
    take,
    height,
    width,
    before,
    COMPUTE: tl.constexpr,
):
    """What lies under a tap: x, left of its first column the history, else zeros; zeros too where the sequence is another."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    tile = tl.load(_at(x, x_s, row, column), take & inside, other=0.0).to(COMPUTE)
    if history is not None:
        past = (column < 0) & (column + before >= 0)
        tile += tl.load(_at(history, history_s, row, column + before), take & past, other=0.0).to(COMPUTE)
    if sequence is not None:
        tile = tl.where(tl.load(sequence + column, inside, other=-1) == number, tile, 0.0)
    return tile


@triton.jit
def _forward(
    x, weight, bias, history, sequence, dout, out, x_s, weight_s, bias_s, history_s, dout_s, out_s,
    channels, height, width, out_height, out_width, pad_top, pad_left,
    SILU: tl.constexpr, STRIDE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, AXIS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The result, or with ``dout`` the gradient of the value before the SiLU."""
    b, p, c = locate(out_height * out_width, channels, BLOCK_P, BLOCK_C, AXIS)
    row, column = p // out_width, p % out_width
    exists = c < channels
    take = exists & (p < out_height * out_width)
    x += b * x_s[0] + c * x_s[1]
    weight += c * weight_s[0]
    if history is not None:
        history += b * history_s[0] + c * history_s[1]
    number = row
    if sequence is not None:
        sequence += b * width
        number = tl.load(sequence + column, column < width, other=-1)
    z = tl.zeros(take.shape, COMPUTE)
    if bias is not None:
        z += tl.load(bias + c * bias_s, exists, other=0.0).to(COMPUTE)
    for i in range(KH):
        for j in range(KW):
            w = tl.load(weight + i * weight_s[2] + j * weight_s[3], exists, other=0.0).to(COMPUTE)
            z += w * _tap(
                x, x_s, history, history_s, sequence, number, row * STRIDE + i - pad_top, column * STRIDE + j - pad_left,
                take, height, width, pad_left, COMPUTE,
            )  # fmt: skip
    if SILU:
        gate = sigmoid(z)
    if dout is None:
        result = z * gate if SILU else z
    else:
        at = _at(dout + b * dout_s[0] + c * dout_s[1], dout_s, row, column)
        result = tl.load(at, take, other=0.0).to(COMPUTE)
        if SILU:
            result *= gate * (1.0 + z * (1.0 - gate))
    if sequence is not None:
        result = tl.where(number < 0, 0.0, result)
    tl.store(_at(out + b * out_s[0] + c * out_s[1], out_s, row, column), result, take)


@triton.jit
def _input_gradient(
    dz, weight, sequence, dx, dhistory, dz_s, weight_s, dx_s, dhistory_s,
    channels, height, width, out_height, out_width, pad_top, pad_left, before,
    STRIDE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, AXIS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Gradients of x and of the ``before`` columns left of it."""
    b, p, c = locate(height * (width + before), channels, BLOCK_P, BLOCK_C, AXIS)
    row, column = p // (width + before), p % (width + before) - before
    exists = c < channels
    take = exists & (p < height * (width + before))
    dz += b * dz_s[0] + c * dz_s[1]
    weight += c * weight_s[0]
    number = row
    if sequence is not None:
        sequence += b * width
        number = tl.load(sequence + column, (column >= 0) & (column < width), other=-1)
    total = tl.zeros(take.shape, COMPUTE)
    for i in range(KH):
        for j in range(KW):
            y, x = row + pad_top - i, column + pad_left - j
            inside = (y >= 0) & (x >= 0) & (y // STRIDE < out_height) & (x // STRIDE < out_width)
            inside &= (y % STRIDE == 0) & (x % STRIDE == 0)
            g = tl.load(_at(dz, dz_s, y // STRIDE, x // STRIDE), take & inside, other=0.0).to(COMPUTE)
            if sequence is not None:
                g = tl.where(tl.load(sequence + x, inside, other=-1) == number, g, 0.0)
            total += tl.load(weight + i * weight_s[2] + j * weight_s[3], exists, other=0.0).to(COMPUTE) * g
    tl.store(_at(dx + b * dx_s[0] + c * dx_s[1], dx_s, row, column), total, take & (column >= 0))
    if dhistory is not None:
        at = _at(dhistory + b * dhistory_s[0] + c * dhistory_s[1], dhistory_s, row, column + before)
        tl.store(at, total, take & (column < 0))


@triton.jit
def _weight_gradient(
    dz, x, history, sequence, dweight, dbias, dz_s, x_s, history_s,
    batch, channels, height, width, out_height, out_width, pad_top, pad_left, parts,
    STRIDE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr, AXIS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A part of the sums over pixels: tiles (taps, pixels, channels) or (taps, channels, pixels), each dz read once."""
    program = tl.program_id(0).to(tl.int64)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    part, rest = program % parts, program // parts
    c = rest % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    taps = (rest // blocks_c).to(tl.int32) * TAPS + tl.arange(0, TAPS)
    tap = taps[:, None, None]
    channel = tl.expand_dims(tl.expand_dims(c, 1 - AXIS), 0)
    pixels = out_height * out_width
    blocks_p = tl.cdiv(pixels, BLOCK_P)
    lane = tl.expand_dims(tl.expand_dims(tl.arange(0, BLOCK_P), AXIS), 0)
    if AXIS == 1:
        total, total_z = tl.zeros([TAPS, BLOCK_P, BLOCK_C], COMPUTE), tl.zeros([1, BLOCK_P, BLOCK_C], COMPUTE)
    else:
        total, total_z = tl.zeros([TAPS, BLOCK_C, BLOCK_P], COMPUTE), tl.zeros([1, BLOCK_C, BLOCK_P], COMPUTE)
    for tile in range(part, batch * blocks_p, parts):
        b = tile // blocks_p
        p = (tile % blocks_p).to(tl.int32) * BLOCK_P + lane
        row, column = p // out_width, p % out_width
        take = (channel < channels) & (p < pixels)
        g = tl.load(_at(dz + b * dz_s[0] + channel * dz_s[1], dz_s, row, column), take, other=0.0).to(COMPUTE)
        total_z += g
        under_history, under_sequence, number = history, sequence, row
        if history is not None:
            under_history += b * history_s[0] + channel * history_s[1]
        if sequence is not None:
            under_sequence += b * width
            number = tl.load(under_sequence + column, p < pixels, other=-1)
        under = _tap(
            x + b * x_s[0] + channel * x_s[1], x_s, under_history, history_s, under_sequence, number,
            row * STRIDE + tap // KW - pad_top, column * STRIDE + tap % KW - pad_left,
            take & (tap < KH * KW), height, width, pad_left, COMPUTE,
        )  # fmt: skip
        total += g * under
    at = (part * channels + c)[None, :] * (KH * KW) + taps[:, None]
    tl.store(dweight + at, tl.sum(total, 2 - AXIS), (c < channels)[None, :] & (taps < KH * KW)[:, None])
    if dbias is not None and rest < blocks_c:  # the first block of taps
        tl.store(dbias + part * channels + c, tl.sum(tl.sum(total_z, 2 - AXIS), 0), c < channels)


def _common(conv: Arguments) -> dict[str, Any]:
    """What all kernels take."""
    x, out_size = conv.x, conv.out_size
    return {
        "sequence": conv.sequence, "channels": x.shape[1], "height": x.shape[2], "width": x.shape[3],
        "out_height": out_size[0], "out_width": out_size[1], "pad_top": conv.pad_top, "pad_left": conv.pad_left,
        "STRIDE": conv.stride, "KH": conv.weight.shape[2], "KW": conv.weight.shape[3], "COMPUTE": compute_type(x)[1],
    }  # fmt: skip


def _value(conv: Arguments, dout: Tensor | None, out: Tensor, op: str) -> None:
    """Fills ``out`` with the result or, given ``dout``, with the gradient of the value before the SiLU."""
    x, weight, bias, history = conv[:4]
    pixels = math.prod(conv.out_size)
    size = tuned(op, sizes(x, pixels) | {"num_warps": 4})
    launch(
        _forward, programs(x.shape[0], pixels, x.shape[1], size), x, **_common(conv), **size, SILU=conv.silu,
        x=x, weight=weight, bias=bias, history=history, dout=dout, out=out,
        x_s=x.stride(), weight_s=weight.stride(), bias_s=0 if bias is None else bias.stride(0),
        history_s=None if history is None else history.stride(), dout_s=None if dout is None else dout.stride(),
        out_s=out.stride(),
    )  # fmt: skip


def forward(*arguments: Any) -> Tensor:
    """torch.ops.iumad.depthwise_conv2d."""
    conv = Arguments(*arguments)
    out = empty_grid(conv.x, *conv.out_size)
    _value(conv, None, out, "depthwise_conv2d")
    return out


def backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.iumad.depthwise_conv2d_backward."""
    op, conv = "depthwise_conv2d_backward", Arguments(*arguments)
    x, weight, bias, history = conv[:4]
    (batch, channels, height, width), dtype = x.shape, compute_type(x)[0]
    common = _common(conv)
    dz = grad_out
    if conv.silu or conv.sequence is not None:
        dz = empty_grid(x, *conv.out_size, dtype)
        _value(conv, grad_out, dz, op)

    dx = empty_grid(x, height, width)
    dhistory = x.new_empty((0,)) if history is None else empty_grid(history, 1, history.shape[3])
    before = 0 if history is None else conv.pad_left
    size = tuned(op, sizes(x, height * (width + before)) | {"num_warps": 4})
    launch(
        _input_gradient, programs(batch, height * (width + before), channels, size), x, **common, **size,
        dz=dz, weight=weight, dx=dx, dhistory=None if history is None else dhistory, before=before,
        dz_s=dz.stride(), weight_s=weight.stride(), dx_s=dx.stride(),
        dhistory_s=None if history is None else dhistory.stride(),
    )  # fmt: skip

    # A thread holds all taps (up to 64 at a time) of so many elements that they fill 64 registers.
    taps, pixels = weight.shape[2] * weight.shape[3], math.prod(conv.out_size)
    block_t = pow2(taps, at_most=64)
    size = tuned(op, sizes(x, pixels, elements=128 * min(64 // block_t, 8)) | {"num_warps": 4})
    columns = -(-channels // size["BLOCK_C"]) * -(-taps // block_t)
    # As many parts as give an H100 four programs per multiprocessor; the device is not asked.
    parts = max(min(batch * -(-pixels // size["BLOCK_P"]), -(-4 * 132 // max(columns, 1))), 1)
    dweight = x.new_empty((parts, *weight.shape), dtype=dtype)
    dbias = x.new_empty((parts, 0 if bias is None else channels), dtype=dtype)
    launch(
        _weight_gradient, parts * columns, x, **common, **size, dz=dz, x=x, history=history, dweight=dweight,
        dbias=None if bias is None else dbias, dz_s=dz.stride(), x_s=x.stride(),
        history_s=None if history is None else history.stride(), batch=batch, parts=parts, TAPS=block_t,
    )  # fmt: skip
    return (
        dx,
        dweight.sum(0).to(weight.dtype),
        dbias.sum(0).to((weight if bias is None else bias).dtype),
        dhistory,
    )
