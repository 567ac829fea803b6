"""Triton without a GPU: its interpreter runs the kernels on CPU tensors. It has to be chosen before anything imports Triton."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def fresh_nan() -> Iterator[None]:
    """Results are NaN before the kernels write them: what they forget shows."""
    from iumad_kernels import _C

    _C.fill_new_tensors(True)
    yield
    _C.fill_new_tensors(False)


@pytest.fixture(scope="module")
def triton_device() -> Iterator[torch.device]:
    """Inside the test torch.ops.iumad.* run in Triton: on the GPU where there is one, otherwise interpreted. Gives the device."""
    pytest.importorskip("triton")
    from iumad_kernels.triton import register

    key = "CUDA" if torch.cuda.is_available() else "CPU"
    # Fills torch.empty with NaN: what a kernel forgets to write is seen.
    torch.use_deterministic_algorithms(True)
    library = register(key, replace=True)
    yield torch.device(key.lower())
    library._destroy()
    torch.use_deterministic_algorithms(False)


def error(got: Tensor, want: Tensor) -> float:
    """RMS ratio to ``want`` in float64; infinite where one is finite and the other is not."""
    got, want = got.double().cpu(), want.double().cpu()
    if not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    got, want = got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


Outputs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def _outputs(f: Callable[..., Any], given: dict[str, Any]) -> Outputs:
    result = f(**given)
    result = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator).to(r) for r in result]
    leaves = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
    used = [(r, g) for r, g in zip(result, grads) if r.requires_grad]
    if not leaves or not used:
        return result, ()
    found = torch.autograd.grad(
        [r for r, _ in used], leaves, [g for _, g in used], allow_unused=True, materialize_grads=True
    )
    return result, found


def _convert(t: Any, dtype: torch.dtype | None, device: torch.device) -> Any:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        return t.to(device) if isinstance(t, Tensor) else t
    # The whole storage moves, and the strides stay: they are part of the test.
    storage = t.detach().as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    moved = storage.to(device, dtype or t.dtype, copy=True)
    return moved.as_strided(t.shape, t.stride(), t.storage_offset()).requires_grad_(t.requires_grad)


def agreement(device: torch.device, *, interpreted: bool = False) -> Callable[..., None]:
    """agree(op, reference, **tensors): values and gradients of op on the device are as close to float64 as they must be.

    float32: 2e-6 forward, 1e-5 gradients. 16-bit: at most 2 and 3 times the error of the reference at that dtype; twice that for
    bfloat16 in the interpreter, which cuts off the digits that a GPU rounds. What is no floating tensor is passed through.
    """

    def check(op: Callable[..., Any], reference: Callable[..., Any], /, **tensors: Any) -> None:
        cpu = torch.device("cpu")
        got, got_grads = _outputs(op, {k: _convert(t, None, device) for k, t in tensors.items()})
        want, want_grads = _outputs(
            reference, {k: _convert(t, torch.float64, cpu) for k, t in tensors.items()}
        )
        dtypes = {t.dtype for t in tensors.values() if isinstance(t, Tensor)}
        bounds: Any = ([2e-6] * len(want), [1e-5] * len(want_grads))
        if dtypes & {torch.bfloat16, torch.float16}:
            factor = 2 if interpreted and torch.bfloat16 in dtypes else 1
            plain, plain_grads = _outputs(reference, {k: _convert(t, None, cpu) for k, t in tensors.items()})
            bounds = (
                [factor * 2 * error(p, w) + 2e-6 for p, w in zip(plain, want)],
                [factor * 3 * error(p, w) + 1e-5 for p, w in zip(plain_grads, want_grads)],
            )
        leaves = [k for k, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad]
        for i, (g, w, bound) in enumerate(zip(got, want, bounds[0])):
            assert g.shape == w.shape
            assert error(g, w) <= bound, f"output {i}"
        for name, g, w, bound in zip(leaves, got_grads, want_grads, bounds[1]):
            assert g.shape == w.shape
            assert error(g, w) <= bound, f"gradient of {name}"

    return check


@pytest.fixture
def agree(triton_device: torch.device) -> Callable[..., None]:
    """:func:`agreement` of the Triton kernels."""
    return agreement(triton_device, interpreted=triton_device.type == "cpu")


@pytest.fixture(params=["cpu", "cuda"])
def agree_on(request: pytest.FixtureRequest) -> Callable[..., None]:
    """:func:`agreement` of the kernels that users get on a CPU and on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    return agreement(torch.device(request.param))
