"""Tiles of pixels and channels, for ops on grids: the channels run along the axis that lies together in memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from iumad_kernels.triton.launch import pow2

TILE_BYTES = 128 * 16  # one load of 16 bytes for each of 128 threads


@triton.jit
def locate(pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, AXIS: tl.constexpr):
    """What this program works on: (image, pixels, channels), the last two as axes of a tile whose channels are axis ``AXIS``."""
    program = tl.program_id(0).to(tl.int64)
    blocks_p, blocks_c = tl.cdiv(pixels, BLOCK_P), tl.cdiv(channels, BLOCK_C)
    p = (program // blocks_c % blocks_p).to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return program // (blocks_c * blocks_p), tl.expand_dims(p, AXIS), tl.expand_dims(c, 1 - AXIS)


def sizes(like: Tensor, pixels: int, elements: int | None = None) -> dict[str, int]:
    """The tile for a grid laid out as ``like``: up to 64 channels where those are neighbours in memory, else pixels."""
    channels, elements = like.shape[1], elements or TILE_BYTES // like.element_size()
    if like.stride(1) == 1:
        block_c = pow2(channels, at_most=64)
        return {"BLOCK_P": pow2(pixels, at_most=max(elements // block_c, 1)), "BLOCK_C": block_c, "AXIS": 1}
    block_p = pow2(pixels, at_most=elements)
    return {"BLOCK_P": block_p, "BLOCK_C": pow2(channels, at_most=elements // block_p), "AXIS": 0}


def programs(batch: int, pixels: int, channels: int, size: dict[str, int]) -> int:
    """How many tiles there are."""
    return batch * -(-pixels // size["BLOCK_P"]) * -(-channels // size["BLOCK_C"])
