"""depthwise_conv2d + bias + SiLU against torch's convolution followed by its SiLU.

    taskset -c 1 python benchmarks/depthwise_conv2d.py            # one thread
    python benchmarks/depthwise_conv2d.py --threads 2

Channels-last tensors unless "contiguous" is named; the project's blocks use (6, 512, 14, 14) with k = 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iumad_kernels import depthwise_conv2d

try:
    from harness import OURS, Case, Run, main
except ImportError:  # collected by pytest
    from benchmarks.harness import OURS, Case, Run, main

# batch, channels, side, kernel, stride, layout, dtype
SHAPES: list[tuple[int, int, int, int, int, str, torch.dtype]] = [
    (6, 512, 14, 3, 1, "channels-last", torch.float32),
    (6, 512, 14, 3, 1, "contiguous", torch.float32),
    (6, 512, 14, 3, 1, "channels-last", torch.bfloat16),
    (1, 512, 14, 3, 1, "channels-last", torch.float32),
    (2, 96, 112, 3, 2, "channels-last", torch.float32),
    (2, 144, 56, 5, 1, "channels-last", torch.float32),
]


def ours(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    return depthwise_conv2d(x, weight, bias, stride=stride, activation="silu")


def torch_ops(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1])
    return F.silu(y)


def case(shape: tuple[int, int, int, int, int, str, torch.dtype], backward: bool) -> Case:
    batch, channels, side, kernel, stride, layout, dtype = shape
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    x = torch.randn(batch, channels, side, side, generator=generator)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator)
    bias = torch.randn(channels, generator=generator)
    grad = torch.randn(batch, channels, -(-side // stride), -(-side // stride), generator=generator)
    tensors = [t.to(dtype) for t in (x, weight, bias, grad)]
    tensors[0], tensors[3] = (tensors[i].contiguous(memory_format=memory_format) for i in (0, 3))

    def run(f: Any, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Any:
        if not backward:
            with torch.no_grad():
                return f(x, weight, bias, stride)
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        out = f(*leaves, stride)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def build() -> dict[str, Run]:
        return {OURS: lambda: run(ours, *tensors), "torch conv2d + silu": lambda: run(torch_ops, *tensors)}

    def expected() -> list[Tensor]:
        result = run(torch_ops, *(t.double() for t in tensors))
        return result if backward else [result]

    name = f"{tuple(shape[:3]) + (side,)} k {kernel} stride {stride} {layout} {str(dtype)[6:]}"
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return Case(f"{name} {'forward + backward' if backward else 'forward'}", build, expected, tolerance)


def cases() -> list[Case]:
    return [case(shape, backward) for shape in SHAPES for backward in (False, True)]


if __name__ == "__main__":
    main("depthwise_conv2d", cases, __file__)
