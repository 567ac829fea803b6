"""cross_attention against torch's own scaled_dot_product_attention.

    taskset -c 1 python benchmarks/cross_attention.py           # one thread
    python benchmarks/cross_attention.py --threads 2

The floor is the time of the matrix products alone (two forward, five more backward) at the rate this core reaches on large
ones (torch.mm, in float32 where the CPU cannot multiply bfloat16; printed at the end), so `1 / ratio` is the share of that rate
which attention reaches, softmax included. Dropout: each side draws its own mask, so the error printed for torch there only says
that the masks differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from iumad_kernels import _C, cross_attention, reference

try:
    from harness import OURS, Case, Run, main, now
except ImportError:  # collected by pytest
    from benchmarks.harness import OURS, Case, Run, main, now

# (batch, heads, Lq, Lk, E): the project's fusion layer, one image of it, larger maps.
SHAPES = [(6, 8, 196, 196, 32), (1, 8, 196, 196, 32), (2, 8, 784, 784, 64), (1, 12, 784, 784, 64)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@cache
def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per millisecond of large matrix products, on the threads in use."""
    size = 1024 if dtype == torch.float32 else 2048
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    times = []
    for _ in range(10):
        start = now()
        a @ b
        times.append(1e3 * (now() - start))
    return 2 * size**3 / min(times)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value as a projection leaves them (tokens before heads in memory), and the output's gradient."""
    batch, heads, queries, keys, dim = shape
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, keys, keys, queries)
    tokens = [
        torch.randn(batch, n, heads, dim, generator=generator).to(dtype).transpose(1, 2) for n in lengths
    ]
    return [t.requires_grad_() for t in tokens[:3]] + [tokens[3]]


def forward(attend: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return attend(*tensors[:3])


def forward_backward(attend: Callable[..., Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attend(*tensors[:3]), tensors[:3], tensors[3])


def build(shape: tuple[int, ...], dtype: torch.dtype, dropout: float, backward: bool) -> dict[str, Run]:
    tensors = inputs(shape, dtype)
    run = forward_backward if backward else forward
    ours = partial(cross_attention, dropout_p=dropout, seed=1)
    return {
        OURS: partial(run, ours, tensors),
        "torch": partial(run, partial(F.scaled_dot_product_attention, dropout_p=dropout), tensors),
    }


def expected(shape: tuple[int, ...], dtype: torch.dtype, dropout: float, backward: bool) -> list[Tensor]:
    tensors = [t.detach().double() for t in inputs(shape, dtype)]
    attend = partial(reference.cross_attention, dropout_p=dropout, seed=1)
    if not backward:
        return [forward(attend, tensors)]
    return list(forward_backward(attend, [t.requires_grad_() for t in tensors[:3]] + tensors[3:]))


def work(shape: tuple[int, ...], backward: bool) -> float:
    batch, heads, queries, keys, dim = shape
    products = 7 if backward else 2
    return products * 2 * batch * heads * queries * keys * dim


def multiplied_as(dtype: torch.dtype) -> torch.dtype:
    """Without instructions for bfloat16 the kernels multiply in float32, and torch.mm takes minutes."""
    return dtype if _C.cpu_bf16() != "none" else torch.float32


def floor(shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> float:
    return work(shape, backward) / product_rate(multiplied_as(dtype))


def cases() -> list[Case]:
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        for dropout in (0.0, 0.1):
            for shape in SHAPES if dropout == 0 else SHAPES[:1]:
                for backward in (False, True):
                    arguments = (shape, dtype, dropout, backward)
                    name = f"{shape} {str(dtype)[6:]} {'forward + backward' if backward else 'forward'}"
                    result.append(
                        Case(
                            name + (f", dropout {dropout}" if dropout else ""),
                            partial(build, *arguments),
                            partial(expected, *arguments),
                            TOLERANCE[dtype],
                            partial(floor, shape, dtype, backward),
                            work=work(shape, backward),
                        )
                    )
    return result


if __name__ == "__main__":
    main("cross_attention", cases, __file__)
    for dtype in dict.fromkeys(map(multiplied_as, TOLERANCE)):
        print(f"matrix products alone, {str(dtype)[6:]}: {1e-6 * product_rate(dtype):.0f} GFLOP/s")
