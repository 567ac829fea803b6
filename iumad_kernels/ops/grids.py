"""The layout of results on a grid."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_grid(like: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Channels-last where the channels of ``like`` are neighbours in memory, else contiguous (as csrc/torch/common.h does)."""
    batch, channels = like.shape[:2]
    if like.stride(1) != 1:
        return like.new_empty((batch, channels, height, width), dtype=dtype)
    return like.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)
