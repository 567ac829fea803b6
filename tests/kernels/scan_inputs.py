"""What the tests of the selective scans share: float64 arguments, and the comparison with the float64 definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import iumad_kernels
from iumad_kernels import _C, reference

ISAS = pytest.mark.parametrize("isa", _C.cpu_isas(), indirect=True)
FORWARD, GRADIENT = 2e-6, 1e-5  # RMS ratio to the float64 reference in float32 (design: tolerances)


def rms(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    scale = want.norm()
    if (
        want.numel() <= 4
    ):  # a sum or two of many terms of order one: what is left of it can be arbitrarily small
        scale = scale.clamp_min(1.0)
    return ((got - want).norm() / (scale if scale > 0 else 1)).item()


def inputs(
    batch: int,
    dim: int,
    length: int,
    states: int,
    groups: int | None = 1,
    optional: str = "D z delta_bias initial_state",
) -> dict[str, Tensor]:
    """Float64 arguments; groups None makes B and C constant."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    projection = (dim, states) if groups is None else (batch, groups, states, length)
    arguments = {
        "u": randn(batch, dim, length),
        "delta": 0.5 * randn(batch, dim, length),
        "A": -4 * torch.rand(dim, states, dtype=torch.float64) - 0.1,
        "B": randn(*projection),
        "C": randn(*projection),
        "D": randn(dim),
        "z": randn(batch, dim, length),
        "delta_bias": randn(dim),
        "initial_state": randn(batch, dim, states),
    }
    wanted = {"u", "delta", "A", "B", "C", *optional.split()}
    return {name: t for name, t in arguments.items() if name in wanted}


def grid_inputs(
    scheme: str,
    step: int,
    H: int,
    W: int,
    dim: int = 20,
    states: int = 5,
    shared: bool = False,
    groups: int = 1,
) -> dict[str, Tensor]:
    K = step * step if scheme == "es2d" else {"row": 1, "bidirectional": 2, "cross": 4}[scheme]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    if shared:
        delta, A, B, C, D = (
            randn(2, dim, H, W),
            (dim, states),
            randn(2, states, H, W),
            randn(2, states, H, W),
            randn(dim),
        )
    else:
        delta, A, D = randn(2, K, dim, H, W), (K, dim, states), randn(K, dim)
        B, C = (randn(2, K, groups, states, H, W) for _ in "BC")
    return {
        "u": randn(2, dim, H, W),
        "delta": 0.5 * delta,
        "A": -torch.rand(*A, dtype=torch.float64) * 4,
        "B": B,
        "C": C,
        "D": D,
        "delta_bias": torch.randn_like(D),
    }


def grads(
    function: Callable[..., Any], arguments: dict[str, Tensor], weights: list[Tensor], **flags: Any
) -> tuple[list[Tensor], Any]:
    """Outputs and gradients of sum(weight * output)."""
    leaves = {name: t.detach().requires_grad_() for name, t in arguments.items()}
    outputs = function(**leaves, **flags)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not weights:
        weights.extend(torch.randn(o.shape, dtype=torch.float64) for o in outputs)
    total = sum((o.double() * w).sum() for o, w in zip(outputs, weights))
    return outputs, torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)


def compare(
    arguments: dict[str, Tensor], dtype: torch.dtype = torch.float32, op: str = "selective_scan", **flags: Any
) -> None:
    """Outputs and every gradient of the op in `dtype` against the definition in float64 on the same (rounded) values."""
    if not flags.get("delta_softplus"):  # negative steps make the states grow beyond any precision
        arguments = {n: t.abs() if n in ("delta", "delta_bias") else t for n, t in arguments.items()}
    keep = ("A", "D", "delta_bias") if dtype in (torch.bfloat16, torch.float16) else ()
    low = {name: t.to(torch.float32 if name in keep else dtype) for name, t in arguments.items()}
    wide = {name: t.double() for name, t in low.items()}
    if op == "selective_scan":
        flags.setdefault("return_last_state", True)
    weights: list[Tensor] = []
    want, want_grads = grads(getattr(reference, op), wide, weights, **flags)
    got, got_grads = grads(getattr(iumad_kernels, op), low, weights, **flags)
    forward, gradient = FORWARD, GRADIENT
    if dtype != torch.float32:
        plain, plain_grads = grads(getattr(reference, op), low, weights, **flags)
    for i, (g, w) in enumerate(zip(got, want)):
        bound = forward if dtype == torch.float32 else max(2 * rms(plain[i], w), forward)
        assert rms(g, w) <= bound, ("output", i)
    for i, name in enumerate(arguments):
        bound = gradient if dtype == torch.float32 else max(3 * rms(plain_grads[i], want_grads[i]), gradient)
        assert got_grads[i].shape == arguments[name].shape
        assert got_grads[i].dtype == low[name].dtype
        assert rms(got_grads[i], want_grads[i]) <= bound, f"gradient of {name}"
