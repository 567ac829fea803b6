"""selective_scan against every implementation of the same scan that runs on a CPU.

    taskset -c 1 python benchmarks/selective_scan.py            # one thread
    python benchmarks/selective_scan.py --threads 2

Peers: the loop over tokens of Mamba's reference (our plain-PyTorch text of it), mambapy's parallel scan, JAX `lax.scan`
under jit with its tensors laid out as suits it best, torch's associative scan compiled. All compute u, delta, A, B, C, D,
delta_bias with softplus, from and to float32 (bfloat16 where named). Interleaved, each finds the caches emptied by the one
before; back to back, its data where its last call left them.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iumad_kernels import _C, reference, selective_scan

try:
    from harness import OURS, Case, Run, main
except ImportError:  # collected by pytest
    from benchmarks.harness import OURS, Case, Run, main

SHAPES = [(24, 512, 49, 16), (8, 512, 196, 16)]  # batch, dim, length, N
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
TOKENS = ("u", "delta", "B", "C")  # those with a length


def inputs(
    batch: int, dim: int, length: int, states: int, layout: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def tokens(width: int) -> Tensor:
        if layout == "channels-last":
            return torch.randn(batch, length, width, generator=generator).transpose(1, 2)
        return torch.randn(batch, width, length, generator=generator)

    return {
        "u": tokens(dim).to(dtype),
        "delta": tokens(dim).to(dtype),
        "A": -torch.arange(1.0, states + 1).repeat(dim, 1),
        "B": tokens(states).to(dtype),
        "C": tokens(states).to(dtype),
        "D": torch.randn(dim, generator=generator),
        "delta_bias": torch.randn(dim, generator=generator) - 3,
    }


def ours(**t: Tensor) -> Tensor:
    out = selective_scan(
        *(t[name] for name in ("u", "delta", "A", "B", "C", "D")), None, t["delta_bias"], True
    )
    assert isinstance(out, Tensor)
    return out


def mamba_loop(**t: Tensor) -> Tensor:
    out = reference.selective_scan(
        *(t[name] for name in ("u", "delta", "A", "B", "C", "D")), None, t["delta_bias"], True
    )
    assert isinstance(out, Tensor)
    return out


def prepared(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decay and input of every token and state, (batch, length, dim, N), as parallel scans need them; and u, C by token."""
    u, B, C = (t[name].transpose(1, 2) for name in ("u", "B", "C"))
    delta = F.softplus(t["delta"].transpose(1, 2) + t["delta_bias"])
    decay = torch.exp(delta.unsqueeze(-1) * t["A"])
    return decay, (delta * u).unsqueeze(-1) * B.unsqueeze(2), u, C


def mambapy_scan(**t: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    decay, x, u, C = prepared(t)
    return ((pscan(decay, x) @ C.unsqueeze(-1)).squeeze(3) + t["D"] * u).transpose(1, 2)


def associative_scan_compiled() -> Callable[..., Tensor]:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def scan(**t: Tensor) -> Tensor:
        decay, x, u, C = prepared(t)
        _, h = associative_scan(combine, (decay, x), dim=1, combine_mode="generic")
        return ((h @ C.unsqueeze(-1)).squeeze(3) + t["D"] * u).transpose(1, 2)

    return torch.compile(scan)


def jax_functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The scan and its gradient; tensors with tokens are (length, batch, dim), which saves JAX all transpositions."""
    import jax
    import jax.numpy as jnp

    def scan(p: dict[str, Any]) -> Any:
        def step(h: Any, token: Any) -> Any:
            u, delta, B, C = token
            dt = jax.nn.softplus(delta + p["delta_bias"])
            h = jnp.exp(dt[..., None] * p["A"]) * h + (dt * u)[..., None] * B[:, None, :]
            return h, (h * C[:, None, :]).sum(-1) + p["D"] * u

        h0 = jnp.zeros((*p["u"].shape[1:], p["A"].shape[1]), p["u"].dtype)
        return jax.lax.scan(step, h0, tuple(p[name] for name in TOKENS))[1]

    def loss(p: dict[str, Any], weight: Any) -> Any:
        return (scan(p) * weight).sum()

    return jax.jit(scan), jax.jit(jax.grad(loss))


class TokensFirst:
    """A result (length, batch, dim) that turns into (batch, dim, length) only when it is read."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        import numpy

        return numpy.moveaxis(numpy.asarray(self.array), 0, 2)


def torch_run(function: Callable[..., Tensor], t: dict[str, Tensor], weight: Tensor | None) -> Run:
    if weight is None:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [function(**t)]

        return forward
    leaves = {
        name: x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for name, x in t.items()
    }

    def forward_backward() -> list[Tensor]:
        return list(torch.autograd.grad(function(**leaves), [leaves[name] for name in NAMES], weight))

    return forward_backward


def contenders(t: dict[str, Tensor], weight: Tensor | None, notes: list[str]) -> dict[str, Run]:
    result = {OURS: torch_run(ours, t, weight)}
    if t["u"].dtype != torch.float32:
        full = {name: x.float() for name, x in t.items()}
        result["iumad float32"] = torch_run(ours, full, None if weight is None else weight.float())
        return result
    result["mamba reference loop"] = torch_run(mamba_loop, t, weight)
    try:
        import mambapy.pscan  # noqa: F401

        result["mambapy 1.2.0 pscan"] = torch_run(mambapy_scan, t, weight)
    except ImportError:
        notes.append("mambapy is not installed")
    try:
        import jax
        import jax.numpy as jnp

        scan, grad = jax_functions()

        def array(x: Tensor) -> Any:
            return jnp.asarray((x.permute(2, 0, 1) if x.dim() == 3 else x).contiguous().numpy())

        p = {name: array(x) for name, x in t.items()}
        if weight is None:
            result["JAX lax.scan, jit"] = lambda: TokensFirst(jax.block_until_ready(scan(p)))
        else:
            w = array(weight)

            def gradients() -> list[Any]:
                g = jax.block_until_ready(grad(p, w))
                return [TokensFirst(g[name]) if name in TOKENS else g[name] for name in NAMES]

            result["JAX lax.scan, jit"] = gradients
    except ImportError:
        notes.append("JAX is not installed")
    if weight is None:
        result["torch associative_scan, compiled"] = torch_run(associative_scan_compiled(), t, None)
    return result


def expected(t: dict[str, Tensor], weight: Tensor | None) -> list[Tensor]:
    wide = {name: x.double() for name, x in t.items()}
    return torch_run(mamba_loop, wide, None if weight is None else weight.double())()


def exponential_floor(count: int) -> float:
    """Milliseconds of a loop that evaluates as many exponentials of float32 and does nothing else.

    Those that bfloat16 makes do with are an instruction or two shorter.
    """
    _C.evaluate_exponentials(count)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        _C.evaluate_exponentials(count)
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[2]


def cases() -> list[Case]:
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for layout in ("channels-last", "length-last"):
                for backward in (False, True):
                    what = "forward + backward" if backward else "forward"
                    notes: list[str] = []

                    def build(
                        shape=shape, layout=layout, dtype=dtype, backward=backward, notes=notes
                    ) -> dict[str, Run]:
                        t = inputs(*shape, layout, dtype)
                        return contenders(t, torch.ones_like(t["u"]) if backward else None, notes)

                    def want(shape=shape, layout=layout, dtype=dtype, backward=backward) -> list[Tensor]:
                        t = inputs(*shape, layout, dtype)
                        return expected(t, torch.ones_like(t["u"]) if backward else None)

                    def floor(shape=shape) -> float:
                        return exponential_floor(shape[0] * shape[1] * shape[2] * shape[3])

                    first = dtype == torch.float32 and layout == "channels-last" and backward
                    result.append(
                        Case(
                            name=f"{shape} {layout} {str(dtype).removeprefix('torch.')} {what}",
                            build=build,
                            expected=want,
                            tolerance=1e-5 if dtype == torch.float32 else 2e-2,
                            floor=None if backward else floor,
                            back_to_back=True,
                            memory=(OURS, "mambapy 1.2.0 pscan", "JAX lax.scan, jit") if first else (),
                            notes=notes,
                        )
                    )
    return result


if __name__ == "__main__":
    main("selective_scan", cases, __file__)
