"""causal_conv1d + bias + SiLU against torch's conv1d followed by its SiLU.

    taskset -c 1 python benchmarks/causal_conv1d.py            # one thread
    python benchmarks/causal_conv1d.py --threads 2

torch gets the input in the layout named, and cuts off the width - 1 extra tokens by a view, which costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iumad_kernels import causal_conv1d

try:
    from harness import OURS, Case, Run, main
except ImportError:  # collected by pytest
    from benchmarks.harness import OURS, Case, Run, main

# batch, dim, length, width, layout
SHAPES = [
    *((2, 384, 784, width, layout) for layout in ("channels-last", "length-last") for width in (2, 3, 4)),
    (2, 192, 196, 4, "channels-last"),
]


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = causal_conv1d(x, weight, bias, activation="silu")
    assert isinstance(out, Tensor)
    return out


def torch_ops(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dim, width = weight.shape
    return F.silu(F.conv1d(x, weight.unsqueeze(1), bias, padding=width - 1, groups=dim)[..., : x.shape[2]])


def case(shape: tuple[int, int, int, int, str], backward: bool) -> Case:
    batch, dim, length, width, layout = shape
    generator = torch.Generator().manual_seed(0)

    def tokens() -> Tensor:
        if layout == "channels-last":
            return torch.randn(batch, length, dim, generator=generator).transpose(1, 2)
        return torch.randn(batch, dim, length, generator=generator)

    tensors = [
        tokens(),
        torch.randn(dim, width, generator=generator),
        torch.randn(dim, generator=generator),
        tokens(),
    ]

    def run(f: Any, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Any:
        if not backward:
            with torch.no_grad():
                return f(x, weight, bias)
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        out = f(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def build() -> dict[str, Run]:
        return {OURS: lambda: run(ours, *tensors), "torch conv1d + silu": lambda: run(torch_ops, *tensors)}

    def expected() -> list[Tensor]:
        result = run(torch_ops, *(t.double() for t in tensors))
        return result if backward else [result]

    name = f"{tuple(shape[:3])} width {width} {layout}"
    return Case(f"{name} {'forward + backward' if backward else 'forward'}", build, expected, 1e-5)


def cases() -> list[Case]:
    return [case(shape, backward) for shape in SHAPES for backward in (False, True)]


if __name__ == "__main__":
    main("causal_conv1d", cases, __file__)
