"""What every launcher of this package needs: the launch itself, the type kernels compute in, and strides by dimension.

A launcher is a plain function of tensors with the signature of the op's torch schema. It runs on whatever Triton runs on: CUDA
tensors, or CPU tensors under ``TRITON_INTERPRET=1``, which is how the tests prove the kernels without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Contracting a * b + c into one fma is safe here and what nvcc does too; stated because Triton's default is about to change.
_OPTIONS = {"enable_fp_fusion": True}


def launch(
    kernel: Any, programs: int, device_of: Tensor, *args: Any, num_warps: int = 4, **constants: Any
) -> None:
    """Start ``programs`` programs of ``kernel`` on the device of ``device_of``; none at all is fine.

    The grid has one dimension: the x axis alone takes more than 65535 programs, so no size of a batch is out of reach.
    """
    if programs > 0:
        with torch.cuda.device_of(device_of):
            kernel[(programs,)](*args, num_warps=num_warps, **_OPTIONS, **constants)


def compute_type(t: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """The type kernels compute in, for torch and for Triton: float64 for float64, else float32."""
    return (torch.float64, tl.float64) if t.dtype == torch.float64 else (torch.float32, tl.float32)


def pow2(n: int, at_most: int = 1 << 30) -> int:
    """The smallest power of two that is at least ``n``, but no more than ``at_most``: the size of a block."""
    return min(triton.next_power_of_2(max(n, 1)), at_most)


def as_rows(t: Tensor) -> Tensor:
    """(..., columns) as (rows, columns): a view where the strides allow one."""
    return t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty((0, t.shape[-1]))


def laid_out_as(like: Tensor, t: Tensor) -> Tensor:
    """Contiguous ``t`` with the strides that torch.empty_like gives ``like``."""
    result = torch.empty_like(like)
    return t if result.stride() == t.stride() else result.copy_(t)
