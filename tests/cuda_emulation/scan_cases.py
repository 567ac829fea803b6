"""The CUDA selective scan, run by the emulator through the library's public functions, against the float64 reference.

Not collected by a plain ``pytest``: test_cuda_emulation.py runs this file in a process that has AddressSanitizer preloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import iumad_kernels
from build import build_ops
from iumad_kernels import reference
from iumad_kernels.ops import selective_scan as op
from iumad_kernels.ops.derivatives import differentiable_op
from iumad_kernels.reference.selective_scan import scan_order

LENGTH_LAST, CHANNELS_LAST, SLICED = "length-last", "channels-last", "sliced"
OWN_OPS = torch.ops.iumad
FORWARD, REVERSE, SHUFFLED = 0, 1, 2  # emulation::Order


@pytest.fixture(scope="session")
def emulated_scan() -> Callable[..., Any]:
    """The emulated op with its derivative."""
    torch.ops.load_library(str(build_ops()))
    for name, fake in (("", op._fake), ("_backward", op._fake_backward)):
        torch.library.register_fake(f"iumad_emulated::selective_scan{name}", fake)
    torch.library.register_fake("iumad_emulated::selective_state_update", op._fake_update)
    return differentiable_op(torch.ops.iumad_emulated.selective_scan.default, op._setup_context, op._backward)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch, emulated_scan: Callable[..., Any]) -> None:
    """Sends the public functions to the emulated kernels."""
    monkeypatch.setattr(torch.ops, "iumad", torch.ops.iumad_emulated)
    monkeypatch.setattr(op, "_scan", emulated_scan)
    monkeypatch.setattr(op, "_gradients", torch.ops.iumad_emulated.selective_scan_backward)
    torch.ops.iumad_emulated.set_order(FORWARD)


@pytest.fixture
def many_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that few long rows do not fill: 32 lanes a channel."""
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", "1000")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values (batch, dim, ...) in another memory layout."""
    if layout == LENGTH_LAST:
        return t.contiguous()
    if layout == CHANNELS_LAST:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)  # neither has stride 1
    wide[..., 1::2] = t
    return wide[..., 1::2]


def error(value: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        assert value.shape == expected.shape
        return 0.0
    difference = (value.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-30)).item()


def values_and_gradients(
    function: Callable[..., object], arguments: dict[str, Tensor | None], flags: dict[str, object]
) -> dict[str, Tensor]:
    inputs = {
        name: None if t is None else t.detach().requires_grad_()  # keeps the strides
        for name, t in arguments.items()
    }
    results = function(**inputs, **flags)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, dtype=torch.float64, generator=generator) for r in results]
    sum(((r.double() * w).sum() for r, w in zip(results, weights)), torch.zeros(())).backward()
    found = {f"result {i}": r.detach() for i, r in enumerate(results)}
    for name, t in inputs.items():
        if t is not None:
            assert t.grad is not None, name
            assert t.grad.dtype == t.dtype, name
            found[f"gradient of {name}"] = t.grad
    return found


def check(function: Callable[..., object], arguments: dict[str, Tensor | None], **flags: object) -> None:
    """Values and gradients against the reference in float64, within the project's tolerances.

    float32: 2e-6, gradients 1e-5. 16 bits: twice, gradients three times, the error of the reference at that dtype.
    """
    definition = getattr(reference, function.__name__)
    wide = {name: None if t is None else t.double() for name, t in arguments.items()}
    exact = values_and_gradients(definition, wide, flags)
    plain = values_and_gradients(definition, arguments, flags)
    ours = values_and_gradients(function, arguments, flags)
    is_double = ours["result 0"].dtype == torch.float64
    for name, value in exact.items():
        gradient = name.startswith("gradient")
        floor = 1e-12 if is_double else 1e-5 if gradient else 2e-6
        limit = max(floor, (3 if gradient else 2) * error(plain[name], value))
        assert error(ours[name], value) <= limit, name


def sequence(
    batch: int,
    dim: int,
    states: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = LENGTH_LAST,
    B: str = "varying",
    C: str = "varying",
    groups: int = 0,
    delta_rows: int = 0,
    absent: tuple[str, ...] = (),
) -> dict[str, Tensor | None]:
    """Arguments of selective_scan; parameters stay float32 beside 16-bit inputs, as in a model."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def tokens(rows: int = dim) -> Tensor:
        return laid_out(torch.randn(batch, rows, length).to(dtype), layout)

    def projection(form: str) -> Tensor:
        if form == "constant":
            return torch.randn(dim, states, dtype=wide)
        shape = (batch, groups, states, length) if groups else (batch, states, length)
        return torch.randn(shape).to(dtype)

    arguments: dict[str, Tensor | None] = {
        "u": tokens(),
        "delta": tokens(delta_rows or dim),
        "A": -torch.rand(dim, states, dtype=wide) * 4,
        "B": projection(B),
        "C": projection(C),
        "D": torch.randn(dim, dtype=wide),
        "z": tokens(),
        "delta_bias": torch.randn(dim, dtype=wide),
        "initial_state": torch.randn(batch, dim, states, dtype=wide),
    }
    return {name: None if name in absent else t for name, t in arguments.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [LENGTH_LAST, CHANNELS_LAST, SLICED])
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str) -> None:
    arguments = sequence(2, 40, 5, 77, dtype=dtype, layout=layout)
    flags = {"delta_softplus": True, "return_last_state": True}
    check(iumad_kernels.selective_scan, arguments, **flags)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 150])
def test_lengths(length: int) -> None:
    arguments = sequence(1, 3, 16, length)
    check(iumad_kernels.selective_scan, arguments, delta_softplus=True, return_last_state=True)


@pytest.mark.parametrize("states", [1, 3, 8, 9, 17, 40])
@pytest.mark.parametrize("reverse", [False, True])
def test_states(states: int, reverse: bool) -> None:
    arguments = sequence(1, 5, states, 70)
    flags = {"delta_softplus": True, "return_last_state": True, "reverse": reverse}
    check(iumad_kernels.selective_scan, arguments, **flags)


@pytest.mark.parametrize("B", ["varying", "constant"])
@pytest.mark.parametrize("C", ["varying", "constant"])
@pytest.mark.parametrize("lanes", [8, 32])
def test_projections(B: str, C: str, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", "1000" if lanes == 32 else "1")
    arguments = sequence(1, 6, 3, 300, B=B, C=C)
    check(iumad_kernels.selective_scan, arguments, delta_softplus=True, return_last_state=True)


@pytest.mark.parametrize(("dim", "groups", "delta_rows"), [(12, 4, 0), (70, 2, 7), (33, 1, 1)])
def test_groups_and_shared_delta(dim: int, groups: int, delta_rows: int) -> None:
    arguments = sequence(2, dim, 4, 66, groups=groups, delta_rows=delta_rows)
    check(iumad_kernels.selective_scan, arguments, delta_softplus=True)


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "initial_state"])
def test_optional_arguments(absent: str) -> None:
    arguments = sequence(1, 4, 3, 20, absent=(absent,))
    if absent == "delta_bias":
        arguments["delta"] = torch.rand(1, 4, 20)
    flags = {"delta_softplus": absent != "delta_bias", "return_last_state": absent != "D"}
    check(iumad_kernels.selective_scan, arguments, **flags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [LENGTH_LAST, CHANNELS_LAST])
@pytest.mark.usefixtures("many_multiprocessors")
def test_long_rows(dtype: torch.dtype, layout: str) -> None:
    """32 lanes a channel; several tiles of 256 tokens."""
    arguments = sequence(1, 7, 5, 530, dtype=dtype, layout=layout)
    flags = {"delta_softplus": True, "return_last_state": True}
    check(iumad_kernels.selective_scan, arguments, **flags)


@pytest.mark.parametrize(
    ("scheme", "step"), [("row", 1), ("bidirectional", 1), ("cross", 1), ("es2d", 2), ("es2d", 3)]
)
@pytest.mark.parametrize("layout", [LENGTH_LAST, CHANNELS_LAST])
@pytest.mark.parametrize("shared", [True, False])
def test_grids(scheme: str, step: int, layout: str, shared: bool) -> None:
    """Odd sizes; B, C, delta and the parameters shared by all directions or one slice each."""
    K = len(scan_order(scheme, 1, 1, step))
    batch, dim, states, H, W = 1, 9, 3, 9, 11
    k = () if shared else (K,)
    arguments: dict[str, Tensor | None] = {
        "u": laid_out(torch.randn(batch, dim, H, W), layout),
        "delta": torch.randn(batch, *k, dim, H, W),
        "A": -torch.rand(*k, dim, states),
        "B": torch.randn(batch, *k, states, H, W),
        "C": torch.randn(batch, *k, states, H, W),
        "D": torch.randn(*k, dim),
        "delta_bias": torch.randn(*k, dim),
    }
    flags = {"delta_softplus": True, "scheme": scheme, "step": step}
    check(iumad_kernels.selective_scan_2d, arguments, **flags)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["es2d", "cross"])
def test_grids_in_16_bits(dtype: torch.dtype, scheme: str) -> None:
    """Directions that meet add up in float32: one rounding. A grid of one row; delta shared by groups of channels."""
    B, C = (torch.randn(2, 2, 4, 6, 7) for _ in range(2))
    arguments: dict[str, Tensor | None] = {
        "u": torch.randn(2, 34, 6, 7).to(dtype),
        "delta": torch.randn(2, 2, 6, 7).to(dtype),
        "A": -torch.rand(34, 4),
        "B": B[:, :1].expand(2, 4, 4, 6, 7),
        "C": C[:, :1].expand(2, 4, 4, 6, 7),
    }
    flags = {"delta_softplus": True, "scheme": scheme}
    check(iumad_kernels.selective_scan_2d, arguments, **flags)


@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 9), (9, 1), (2, 3)])
@pytest.mark.parametrize("scheme", ["cross", "es2d"])
def test_narrow_grids(H: int, W: int, scheme: str) -> None:
    """Grids on which es2d has directions without a pixel."""
    p = torch.randn(1, 2, H, W)
    arguments = {
        "u": torch.randn(1, 3, H, W),
        "delta": torch.rand(1, 3, H, W),
        "A": -torch.rand(3, 2),
        "B": p,
        "C": p,
    }
    check(iumad_kernels.selective_scan_2d, arguments, scheme=scheme, step=3)


@pytest.mark.parametrize(("batch", "dim", "length"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(batch: int, dim: int, length: int) -> None:
    arguments = sequence(batch, dim, 2, length)
    inputs = {name: t.requires_grad_() for name, t in arguments.items() if t is not None}
    out, last = iumad_kernels.selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    assert out.shape == (batch, dim, length)
    assert length or torch.equal(last, inputs["initial_state"])
    (out.sum() + last.sum()).backward()
    for name, t in inputs.items():
        assert t.grad is not None
        assert torch.equal(t.grad, torch.full_like(t, float(name == "initial_state" and not length))), name


def test_expanded_inputs() -> None:
    """Stride 0 along batch, channels and tokens."""
    arguments = sequence(2, 6, 3, 20)
    arguments["u"] = torch.randn(1, 6, 1).expand(2, 6, 20)
    arguments["delta"] = torch.rand(1, 1, 20).expand(2, 6, 20)
    inputs = {name: t for name, t in arguments.items() if t is not None}
    result = iumad_kernels.selective_scan(**inputs)
    expected = reference.selective_scan(**{name: t.double() for name, t in inputs.items()})
    assert isinstance(result, Tensor)
    assert isinstance(expected, Tensor)
    assert error(result, expected) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "N"), [((15,), 6), ((3, 5), 16), ((39,), 19)]
)  # 32 channels a block; vectors of states
def test_state_update(dtype: torch.dtype, channels: tuple[int, ...], N: int) -> None:
    state = laid_out(torch.randn(2, *channels, N).to(dtype), SLICED if N == 19 else LENGTH_LAST)
    x, dt, z = (torch.randn(2, *channels).to(dtype) for _ in range(3))
    A, B, C = -torch.rand(*channels, N), torch.randn(2, 3, N), torch.randn(2, 3, N)
    D = torch.randn(channels)
    exact = state.double()
    result = iumad_kernels.selective_state_update(state, x, dt, A, B, C, D, z, D, True)
    wide = (t.double() for t in (x, dt, A, B, C, D, z, D))
    expected = reference.selective_state_update(exact, *wide, True)
    assert error(result, expected) <= (3e-3 if dtype == torch.bfloat16 else 2e-6)
    assert error(state, exact) <= (3e-3 if dtype == torch.bfloat16 else 2e-6)


OPS = ("selective_scan", "selective_scan_backward", "selective_state_update")


@pytest.mark.parametrize("name", OPS)
def test_emulated_schemas_are_the_ops_own(name: str) -> None:
    emulated, own = (getattr(ops, name).default._schema for ops in (torch.ops.iumad_emulated, OWN_OPS))
    assert str(emulated).partition("(")[2] == str(own).partition("(")[2]


@pytest.mark.parametrize("scheme", ["sequence", "row", "cross", "es2d"])
def test_opcheck(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake kernel and autograd of the CUDA ops against what they do; the saved states have CUDA's shape."""
    monkeypatch.setattr(op, "_runs_in_cuda", lambda device: True)
    if scheme == "sequence":
        u, grad, delta = torch.rand(3, 2, 3, 99).unbind()
        A, D, bias = -torch.rand(3, 5), torch.randn(3), torch.randn(3)
        B, C = torch.randn(2, 2, 99, 5).mT.unbind()
        scheme = "row"
    else:
        K = {"row": 1, "cross": 4, "es2d": 4}[scheme]
        u, grad = torch.randn(2, 2, 3, 9, 11).unbind()
        delta, A, D = torch.rand(2, K, 3, 9, 11), -torch.rand(K, 3, 5), torch.randn(K, 3)
        B, C = torch.randn(2, 2, K, 1, 9, 11, 5).unbind()
        bias = None
    flags = (op.SCHEMES.index(scheme), 2 if scheme == "es2d" else 1, True)
    inputs = [None if t is None else t.requires_grad_() for t in (u, delta, A, B, C, D, None, bias)]
    torch.library.opcheck(torch.ops.iumad_emulated.selective_scan.default, (*inputs, None, *flags, True))
    inputs = [None if t is None else t.detach() for t in inputs]
    states = torch.ops.iumad_emulated.selective_scan(*inputs, None, *flags, True)[2]
    arguments = (grad, None, *inputs, states, *flags, False)
    torch.library.opcheck(torch.ops.iumad_emulated.selective_scan_backward.default, arguments)


def test_opcheck_update() -> None:
    state, A = torch.randn(2, 1, 3, 5), -torch.rand(1, 3, 5)
    token, projection = torch.rand(2, 3, 1, 1), torch.randn(2, 1, 1, 1, 1, 5)
    arguments = (state, token, token[:, None], A, projection, projection, None, token, None, True)
    torch.library.opcheck(torch.ops.iumad_emulated.selective_state_update.default, arguments)


@pytest.mark.parametrize("lanes", [8, 32])
def test_same_bits_in_any_order(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which threads run between barriers changes nothing, forward or backward."""
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", "1000" if lanes == 32 else "1")
    arguments = sequence(1, 35 if lanes == 8 else 5, 5, 260)
    bits = []
    for order in (FORWARD, REVERSE, SHUFFLED, SHUFFLED):
        torch.ops.iumad_emulated.set_order(order)
        flags = {"delta_softplus": True, "return_last_state": True}
        bits.append(values_and_gradients(iumad_kernels.selective_scan, arguments, flags))
    for other in bits[1:]:
        for name, value in other.items():
            assert torch.equal(value, bits[0][name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_hostile_values(name: str, value: float) -> None:
    """What the reference has finite is finite and equal; what it has not is not."""
    arguments = sequence(1, 3, 4, 90)
    hostile = arguments[name]
    assert hostile is not None
    hostile[(0,) * (hostile.dim() - 1)][hostile.shape[-1] // 2] = value
    inputs = {key: t for key, t in arguments.items() if t is not None}
    result = iumad_kernels.selective_scan(**inputs, delta_softplus=True)
    expected = reference.selective_scan(**inputs, delta_softplus=True)
    assert isinstance(result, Tensor)
    assert isinstance(expected, Tensor)
    finite = expected.isfinite()
    assert torch.equal(result.isfinite(), finite)
    assert error(result[finite], expected[finite]) <= 1e-5


def test_strong_decay() -> None:
    """A = -1..-16 with steps up to 20: cumulative decays underflow, which must not matter."""
    arguments = sequence(1, 2, 16, 100, absent=("delta_bias",))
    arguments["A"] = -torch.arange(1.0, 17.0).expand(2, 16).contiguous()
    arguments["delta"] = 1 + 19 * torch.rand(1, 2, 100)
    check(iumad_kernels.selective_scan, arguments, return_last_state=True)
