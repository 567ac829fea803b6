"""The order in which a scan visits the pixels of a grid: csrc/core/scan_order.h, for Triton.

A direction is a walk of two nested loops over flat pixel numbers (row * columns + column): ``inner`` tokens one step
apart, then a jump.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROW_REVERSE = tl.constexpr(1)
BIDIRECTIONAL = tl.constexpr(2)
CROSS = tl.constexpr(3)
ES2D = tl.constexpr(4)


@triton.jit
def direction(k, rows, columns, step, SCHEME: tl.constexpr):
    """Direction ``k``: (length, tokens of an inner loop, first pixel, pixels per inner step, pixels per outer step)."""
    p = step if SCHEME == ES2D else 1
    i = k % p if SCHEME == ES2D else 0
    j = k // p if SCHEME == ES2D else 0
    r = tl.maximum((rows - i + p - 1) // p, 0)
    c = tl.maximum((columns - j + p - 1) // p, 0)
    by_column = ((SCHEME == CROSS) | (SCHEME == ES2D)) & (k % 2 == 1)
    from_end = ((SCHEME == BIDIRECTIONAL) & (k == 1)) | ((SCHEME == CROSS) & (k >= 2))
    reverse = (SCHEME == ROW_REVERSE) | from_end
    across, down = p, p * columns  # one pixel to the right, one pixel down in the sub-grid
    inner = tl.where(by_column, r, c)
    inner_step = tl.where(by_column, down, across)
    outer_step = tl.where(by_column, across, down)
    first = i * columns + j
    first = tl.where(reverse, first + (r - 1) * down + (c - 1) * across, first)
    sign = tl.where(reverse, -1, 1)
    return r * c, inner, first, sign * inner_step, sign * outer_step


@triton.jit
def start(token, walk):
    """(pixel, place in the inner loop) of a token of direction ``walk``; the grid's first pixel if there are no tokens."""
    i = token % tl.maximum(walk[1], 1)
    pixel = walk[2] + token // tl.maximum(walk[1], 1) * walk[4] + i * walk[3]
    return tl.where(walk[0] > 0, pixel, 0), i


@triton.jit
def advance(token, pixel, i, walk):
    """From ``token`` to the one after it, without a division; the last token stays, so that the result is always a pixel."""
    turn = i + 1 == walk[1]
    step = tl.where(turn, walk[4] - i * walk[3], walk[3])
    return pixel + tl.where(token + 1 < walk[0], step, 0), tl.where(turn, 0, i + 1)


@triton.jit
def retreat(token, pixel, i, walk):
    """From ``token`` to the one before it; token 0 stays."""
    turn = i == 0
    step = tl.where(turn, walk[4] - (walk[1] - 1) * walk[3], walk[3])
    return pixel - tl.where(token > 0, step, 0), tl.where(turn, walk[1] - 1, i - 1)


def directions_of(scheme: int, step: int) -> int:
    """How many directions a scheme has."""
    return {2: 2, 3: 4, 4: step * step}.get(scheme, 1)


def overlapping(scheme: int) -> bool:
    """Whether several directions meet at a pixel: bidirectional and cross."""
    return scheme in (2, 3)


def longest(scheme: int, step: int, rows: int, columns: int) -> int:
    """Tokens of the longest direction."""
    return -(-rows // step) * -(-columns // step) if scheme == 4 else rows * columns


def pixel_directions(step: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Which direction of es2d visits each pixel, (rows, columns)."""
    i, j = (torch.arange(n, device=device) % step for n in (rows, columns))
    return i[:, None] + step * j
