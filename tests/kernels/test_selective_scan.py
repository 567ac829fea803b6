"""selective_scan, selective_scan_2d and selective_state_update on the CPU against their float64 definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import iumad_kernels
from iumad_kernels import _C, reference, selective_scan, selective_scan_2d, selective_state_update
from iumad_kernels.ops.scan_arguments import SCHEMES
from iumad_kernels.reference.selective_scan import scan_order

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


@ISAS
@pytest.mark.parametrize("states", [1, 3, 8, 16, 17, 64, 300])
@pytest.mark.parametrize("dim", [1, 3, 16, 17, 64])
def test_sizes(isa: str, dim: int, states: int) -> None:
    for length in (0, 1, 2, 16, 17, 49):
        compare(inputs(2, dim, length, states), delta_softplus=True)


@ISAS
@pytest.mark.parametrize(("dim", "length"), [(512, 196), (16, 1000)])
def test_long_and_wide(isa: str, dim: int, length: int) -> None:
    compare(inputs(1, dim, length, 16, optional="D"), delta_softplus=True)


@ISAS
@pytest.mark.parametrize("groups", [None, 1, 2, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_groups(isa: str, groups: int | None, reverse: bool) -> None:
    compare(inputs(2, 40, 21, 5, groups), delta_softplus=True, reverse=reverse)


def test_constant_beside_varying() -> None:
    for constant, other in (("B", "C"), ("C", "B")):
        arguments = inputs(2, 24, 19, 4, 2)
        arguments[constant] = torch.randn(24, 4, dtype=torch.float64)
        arguments[other] = torch.randn(2, 4, 19, dtype=torch.float64)
        compare(arguments)


@ISAS
@pytest.mark.parametrize(
    "flags", [{"delta_softplus": s, "reverse": r} for s in (False, True) for r in (False, True)]
)
@pytest.mark.parametrize(
    "optional", ["", "D", "z", "delta_bias", "initial_state", "D z delta_bias initial_state"]
)
def test_optional_arguments(isa: str, optional: str, flags: dict[str, bool]) -> None:
    arguments = inputs(2, 19, 18, 6, optional=optional)
    compare(arguments, **flags)


@ISAS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(isa: str, dtype: torch.dtype) -> None:
    for layout in (False, True):
        arguments = inputs(2, 33, 35, 16)
        if layout:
            arguments = {
                k: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 3 else t
                for k, t in arguments.items()
            }
        compare(arguments, dtype, delta_softplus=True)


def test_low_precision_input_with_float32_delta() -> None:
    t = {name: x.float() for name, x in inputs(2, 20, 30, 8).items()}
    t["u"], t["z"] = t["u"].bfloat16(), t["z"].bfloat16()
    want = reference.selective_scan(**{k: x.double() for k, x in t.items()}, delta_softplus=True)
    out = selective_scan(**t, delta_softplus=True)
    assert out.dtype == torch.bfloat16
    assert rms(out, want) < 4e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan(**t, delta_softplus=True), out)


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The same values under other strides."""
    big = torch.zeros(*(2 * n + 1 for n in t.shape), dtype=t.dtype)
    sliced = big[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)].copy_(t)
    return {
        "channels-last": t.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": sliced,
        "batch-last": t.movedim(0, -1).contiguous().movedim(-1, 0),
    }


@ISAS
@pytest.mark.parametrize("layout", ["channels-last", "sliced", "batch-last"])
def test_strides(isa: str, layout: str) -> None:
    arguments = inputs(3, 32, 37, 16)
    arguments = {name: layouts(t)[layout] if t.dim() == 3 else t for name, t in arguments.items()}
    compare(arguments, delta_softplus=True)


def test_expanded_inputs() -> None:
    arguments = inputs(2, 20, 17, 4)
    arguments["u"] = torch.randn(1, 20, 1, dtype=torch.float64).expand(2, 20, 17)
    arguments["A"] = -torch.rand(1, 4, dtype=torch.float64).expand(20, 4)
    arguments["B"] = torch.randn(1, 4, 1, dtype=torch.float64).expand(2, 4, 17)
    compare(arguments, delta_softplus=True)


def test_output_has_the_layout_of_u() -> None:
    t = {name: x.float() for name, x in inputs(2, 12, 9, 4).items()}
    for name, u in layouts(t["u"]).items():
        out = selective_scan(**{**t, "u": u})
        if name != "sliced":
            assert out.stride() == u.stride(), name


@ISAS
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_channels_sharing_rows_of_delta(isa: str, rows: int) -> None:
    arguments = inputs(2, 36, 20, 5)
    arguments["delta"] = torch.randn(2, rows, 20, dtype=torch.float64)
    compare(arguments, delta_softplus=True)


@ISAS
def test_adversarial_values(isa: str) -> None:
    """Strong decays, steps above and below softplus' threshold, length equal to N: cases that break peers."""
    t = inputs(2, 20, 16, 16)
    t["A"] = -torch.arange(1.0, 17, dtype=torch.float64).repeat(20, 1)
    for delta in (1.0, 20.0, 30.0, -30.0):
        t["delta"] = delta + torch.rand_like(t["delta"])
        compare(t, delta_softplus=True)
        compare(t)


@ISAS
def test_infinite_and_nan_values_propagate(isa: str) -> None:
    for name in ("u", "B", "C", "delta", "z"):
        for value in (float("inf"), float("-inf"), float("nan")):
            t = inputs(1, 3, 20, 4)
            t[name].view(-1)[7] = value
            low = {k: x.float() for k, x in t.items()}
            got, want = (
                selective_scan(**low, delta_softplus=True),
                reference.selective_scan(**low, delta_softplus=True),
            )
            assert torch.equal(got.isnan(), want.isnan()), (name, value)
            assert torch.equal(got.isinf(), want.isinf()), (name, value)


@ISAS
def test_decays_whose_exponent_overflows_are_zero(isa: str) -> None:
    t = {k: x.float() for k, x in inputs(1, 16, 20, 4).items()}
    t["delta"], t["A"] = torch.full_like(t["delta"], 100), torch.full_like(t["A"], -1e38)
    assert (
        rms(selective_scan(**t), reference.selective_scan(**{k: x.double() for k, x in t.items()})) <= FORWARD
    )


@ISAS
def test_exponential_error(isa: str) -> None:
    """exp(dt A) alone: one token, state 1, no input."""
    x = torch.cat([torch.linspace(-80, 0, 20000), -torch.logspace(-8, 0, 1000)]).view(1, -1, 1)
    dim = x.shape[1]
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    out = selective_scan(
        torch.zeros(1, dim, 1), x, torch.ones(dim, 1), zero, one, initial_state=torch.ones(1, dim, 1)
    )
    want = x.double().exp()
    # A log2(e) is rounded, and so is its product with dt.
    bound = 2e-7 + 1.2e-7 * x.abs().double()
    assert ((out.double() - want).abs() <= bound * want + 1e-37).all()


@ISAS
def test_softplus_error(isa: str) -> None:
    x = torch.linspace(-40, 40, 20001).view(1, -1, 1)
    dim = x.shape[1]
    one = torch.ones(1, 1, 1)
    out = selective_scan(torch.ones(1, dim, 1), x, torch.zeros(dim, 1), one, one, delta_softplus=True)
    want = torch.nn.functional.softplus(x.double())
    bound = 4e-7 + 1.3e-7 * (-x.double()).clamp_min(0)
    assert ((out.double() - want).abs() <= bound * want).all()


@ISAS
def test_same_bits_for_any_thread_count_and_run(isa: str) -> None:
    t = {name: x.float() for name, x in inputs(3, 80, 50, 16, 2).items()}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            outputs, gradients = grads(
                selective_scan,
                t,
                [torch.ones(1, dtype=torch.float64)] * 2,
                delta_softplus=True,
                return_last_state=True,
            )
            results.append([*outputs, *gradients])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


GRADCHECK = [
    {"optional": "", "groups": None},
    {"optional": "D z", "groups": 2},
    {"optional": "delta_bias initial_state"},
    {"optional": "D z delta_bias initial_state", "groups": 1},
]


@pytest.mark.parametrize("case", GRADCHECK)
@pytest.mark.parametrize(
    "flags", [{"delta_softplus": s, "reverse": r} for s in (False, True) for r in (False, True)]
)
def test_gradcheck(case: dict[str, Any], flags: dict[str, bool]) -> None:
    arguments = inputs(2, 4, 5, 3, **case)
    names = list(arguments)

    def function(*tensors: Tensor) -> Any:
        return selective_scan(**dict(zip(names, tensors)), return_last_state=True, **flags)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in arguments.values()])


def test_length_beyond_one_tile_gradcheck() -> None:
    arguments = inputs(1, 2, 35, 2)
    names = list(arguments)
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan(**dict(zip(names, t)), delta_softplus=True),
        [t.requires_grad_() for t in arguments.values()],
    )


def op_arguments(dtype: torch.dtype = torch.float32, scheme: str = "row") -> tuple[Any, ...]:
    K = {"row": 1, "cross": 4, "es2d": 4}[scheme]
    tensors = [
        torch.randn(2, 20, 3, 17),
        torch.randn(2, K, 20, 3, 17),
        -torch.rand(K, 20, 5),
        torch.randn(2, K, 2, 3, 17, 5),
        torch.randn(2, K, 2, 3, 17, 5),
        torch.randn(K, 20),
        torch.randn(2, 20, 3, 17) if K == 1 else None,
        torch.randn(K, 20),
        torch.randn(2, K, 20, 5) if K == 1 else None,
    ]
    return (
        tuple(None if t is None else t.to(dtype).requires_grad_() for t in tensors),
        SCHEMES.index(scheme),
        2,
        True,
        True,
    )


@pytest.mark.parametrize("scheme", ["row", "cross", "es2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(scheme: str, dtype: torch.dtype) -> None:
    tensors, *rest = op_arguments(dtype, scheme)
    torch.library.opcheck(torch.ops.iumad.selective_scan.default, (*tensors, *rest))
    torch.library.opcheck(torch.ops.iumad.selective_scan.default, (*tensors, *rest, False))
    detached = [None if t is None else t.detach() for t in tensors]
    out, last, tile_states = torch.ops.iumad.selective_scan(*detached, *rest)
    arguments = (
        torch.randn_like(out),
        torch.randn_like(last),
        *detached[:8],
        tile_states,
        *rest[:3],
        detached[8] is not None,
    )
    torch.library.opcheck(torch.ops.iumad.selective_scan_backward.default, arguments)


def test_opcheck_update() -> None:
    arguments = (
        torch.randn(2, 1, 20, 5),
        torch.randn(2, 20, 1, 1),
        torch.randn(2, 1, 20, 1, 1),
        -torch.rand(1, 20, 5),
        torch.randn(2, 1, 2, 1, 1, 5),
        torch.randn(2, 1, 2, 1, 1, 5),
        torch.randn(1, 20),
        None,
        None,
        True,
    )
    torch.library.opcheck(torch.ops.iumad.selective_state_update.default, arguments)


def test_compiles_without_graph_breaks_and_exports() -> None:
    t = {name: x.float() for name, x in inputs(2, 12, 20, 4).items()}

    class Scan(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
            out = selective_scan(u.sin(), delta, A, B, C, D, delta_softplus=True)
            return selective_scan_2d(
                out.unflatten(2, (4, 5)),
                delta.unflatten(2, (4, 5)),
                A,
                B[:, 0].unflatten(2, (4, 5)),
                C[:, 0].unflatten(2, (4, 5)),
            )

    arguments = tuple(t[name].requires_grad_() for name in ("u", "delta", "A", "B", "C", "D"))
    want = Scan()(*arguments)
    got = torch.compile(Scan(), fullgraph=True)(*arguments)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(got.sum(), arguments), torch.autograd.grad(want.sum(), arguments)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    exported = torch.export.export(Scan(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), want, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    batch, length, states = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (0, 40), (1, 20)))
    groups = data.draw(st.sampled_from([None, 1, 2, 3]))
    dim = data.draw(st.integers(1, 12)) * (groups or 1)
    optional = " ".join(data.draw(st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_state"]))))
    compare(
        inputs(batch, dim, length, states, groups, optional),
        delta_softplus=data.draw(st.booleans()),
        reverse=data.draw(st.booleans()),
    )


# ---- two dimensions ---------------------------------------------------------------------------------------------------------


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


@ISAS
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("scheme", "step"),
    [("es2d", 1), ("es2d", 2), ("es2d", 3), ("cross", 2), ("row", 2), ("bidirectional", 2)],
)
def test_2d(isa: str, scheme: str, step: int, shared: bool) -> None:
    for H, W in ((1, 1), (4, 4), (5, 7), (2, 9), (0, 3)):
        arguments = grid_inputs(scheme, step, H, W, shared=shared, groups=1 if shared else 2)
        compare(arguments, op="selective_scan_2d", scheme=scheme, step=step, delta_softplus=True)


@ISAS
@pytest.mark.parametrize("scheme", ["es2d", "cross"])
def test_2d_channels_last_and_low_precision(isa: str, scheme: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for shared in (False, True):
            arguments = grid_inputs(scheme, 2, 9, 14, dim=32, states=16, shared=shared)
            arguments = {
                n: t.movedim(-3, -1).contiguous().movedim(-1, -3) if t.dim() >= 4 else t
                for n, t in arguments.items()
            }
            compare(arguments, dtype, op="selective_scan_2d", scheme=scheme, delta_softplus=True)


@pytest.mark.parametrize("scheme", ["es2d", "cross", "bidirectional", "row"])
def test_2d_gradcheck(scheme: str) -> None:
    arguments = grid_inputs(scheme, 2, 3, 4, dim=2, states=2, shared=scheme == "cross")
    names = list(arguments)
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan_2d(**dict(zip(names, t)), scheme=scheme, delta_softplus=True),
        [t.requires_grad_() for t in arguments.values()],
    )


@pytest.mark.parametrize(("H", "W"), [(4, 6), (5, 7), (1, 2)])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_es2d_visits_every_pixel_once(H: int, W: int, step: int) -> None:
    visited = torch.cat(scan_order("es2d", H, W, step))
    assert visited.sort().values.equal(torch.arange(H * W))


def test_es2d_of_a_sequence_is_the_scan_of_every_pth_token() -> None:
    t = grid_inputs("row", 1, 1, 24, shared=True)
    out = selective_scan_2d(**t, scheme="es2d", step=3)
    every = {name: x[..., 0, :] if x.dim() == 4 else x for name, x in t.items()}
    for j in range(3):
        part = {name: x[..., j::3] if x.dim() == 3 else x for name, x in every.items()}
        torch.testing.assert_close(out[:, :, 0, j::3], selective_scan(**part))


# ---- one token ----------------------------------------------------------------------------------------------------------------


@ISAS
@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize("full", [False, True])
def test_state_update(isa: str, heads: int | None, groups: int | None, full: bool) -> None:
    batch, dim, N = 3, 20, 7
    channels = (dim,) if heads is None else (heads, dim)
    projection = (batch, N) if groups is None else (batch, groups, N)
    arguments = {
        "x": torch.randn(batch, *channels),
        "dt": torch.randn(batch, *channels),
        "A": -torch.rand(*channels, N),
        "B": torch.randn(*projection),
        "C": torch.randn(*projection),
        "D": torch.randn(*channels) if full else None,
        "z": torch.randn(batch, *channels) if full else None,
        "dt_bias": torch.randn(*channels) if full else None,
        "dt_softplus": full,
    }
    state = torch.randn(batch, *channels, N)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    want_state = state.double()
    want = reference.selective_state_update(want_state, **wide)
    got = selective_state_update(state, **arguments)
    assert rms(got, want) <= FORWARD
    assert rms(state, want_state) <= FORWARD


def test_state_update_in_any_memory() -> None:
    """Tied parameters (stride 0), a state that cannot be viewed flat, a bfloat16 state, rows picked by index."""
    batch, heads, dim, N = 2, 3, 4, 5
    x = torch.randn(batch, heads, dim)
    dt = torch.rand(batch, heads, 1).expand(batch, heads, dim)
    A = -torch.rand(heads, 1, 1).expand(heads, dim, N)
    B, C = torch.randn(batch, N), torch.randn(batch, N)
    for state in (
        torch.randn(batch, dim, heads, N).transpose(1, 2),
        torch.randn(batch, heads, dim, N, dtype=torch.bfloat16),
    ):
        want_state = state.double()
        want = reference.selective_state_update(
            want_state, x.double(), dt.double(), A.double(), B.double(), C.double()
        )
        got = selective_state_update(state, x, dt, A, B, C)
        assert rms(got, want) <= 1e-2 if state.dtype == torch.bfloat16 else FORWARD
        assert rms(state, want_state) <= (5e-3 if state.dtype == torch.bfloat16 else FORWARD)
    pool = torch.randn(6, heads, dim, N)
    untouched, index = pool.clone(), torch.tensor([4, 1])
    rows = pool[index].clone()
    want = selective_state_update(rows, x, dt, A, B, C)
    got = selective_state_update(pool, x, dt, A, B, C, state_batch_indices=index)
    assert torch.equal(got, want)
    assert torch.equal(pool[index], rows)
    assert torch.equal(pool[[0, 2, 3, 5]], untouched[[0, 2, 3, 5]])


def test_steps_equal_the_scan() -> None:
    t = {name: x.float() for name, x in inputs(2, 20, 9, 4).items()}
    out, last = selective_scan(**t, delta_softplus=True, return_last_state=True)
    state = t["initial_state"].clone()
    for i in range(9):
        y = selective_state_update(
            state,
            t["u"][..., i],
            t["delta"][..., i],
            t["A"],
            t["B"][..., i],
            t["C"][..., i],
            t["D"],
            t["z"][..., i],
            t["delta_bias"],
            True,
        )
        torch.testing.assert_close(y, out[..., i])
    torch.testing.assert_close(state, last)


# ---- robustness ----------------------------------------------------------------------------------------------------


def test_every_output_is_written() -> None:
    """Uninitialised memory filled with NaN: whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        compare(inputs(2, 17, 33, 3), delta_softplus=True)
        for scheme in ("es2d", "cross", "bidirectional"):
            compare(grid_inputs(scheme, 2, 5, 3), op="selective_scan_2d", scheme=scheme)
            compare(
                grid_inputs(scheme, 2, 5, 3, shared=True),
                torch.bfloat16,
                op="selective_scan_2d",
                scheme=scheme,
            )
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_are_left_alone() -> None:
    t = {name: x.float() for name, x in inputs(2, 18, 20, 4).items()}
    copies = {name: x.clone() for name, x in t.items()}
    grads(selective_scan, t, [], delta_softplus=True)
    assert all(torch.equal(t[name], copies[name]) for name in t)


BAD = [
    ({"u": torch.randn(2, 8)}, ValueError, "u has shape"),
    ({"delta": torch.randn(2, 3, 5)}, ValueError, "rows of delta = 3 must divide dim = 8"),
    ({"delta": torch.randn(2, 8, 4)}, ValueError, "delta has shape"),
    ({"A": -torch.rand(8, 0)}, ValueError, "N = 0"),
    ({"A": torch.randn(8, 4, dtype=torch.complex64)}, TypeError, "A has dtype torch.complex64"),
    ({"u": torch.ones(2, 8, 5, dtype=torch.int64)}, TypeError, "u has dtype torch.int64"),
    ({"B": torch.randn(2, 3, 4, 5)}, ValueError, "groups of B = 3 must divide dim = 8"),
    ({"B": torch.randn(2, 2, 4, 5), "C": torch.randn(2, 4, 4, 5)}, ValueError, "B has 2 groups but C has 4"),
    ({"C": torch.randn(2, 5, 5)}, ValueError, "C has shape"),
    ({"D": torch.randn(7)}, ValueError, "D has shape"),
    ({"z": torch.randn(2, 8, 6)}, ValueError, "z has shape"),
    ({"delta_bias": torch.randn(8, 1)}, ValueError, "delta_bias has shape"),
    ({"initial_state": torch.randn(2, 8, 3)}, ValueError, "initial_state has shape"),
    ({"D": torch.randn(8, dtype=torch.float64)}, TypeError, "float64 cannot be mixed"),
    ({"B": torch.randn(2, 4, 5, device="meta")}, ValueError, "B is on meta, but u is on cpu"),
    ({"A": [1.0]}, TypeError, "A must be a tensor, got list"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good = {
        "u": torch.randn(2, 8, 5),
        "delta": torch.randn(2, 8, 5),
        "A": -torch.rand(8, 4),
        "B": torch.randn(2, 4, 5),
        "C": torch.randn(2, 4, 5),
    }
    selective_scan(**good)
    with pytest.raises(kind, match=message.replace("(", r"\(")):
        selective_scan(**{**good, **change})


def test_bad_input_2d_and_update() -> None:
    t = {name: x.float() for name, x in grid_inputs("cross", 2, 4, 4).items()}
    with pytest.raises(ValueError, match="scheme = 'spiral'"):
        selective_scan_2d(**t, scheme="spiral")
    with pytest.raises(ValueError, match="step = 0"):
        selective_scan_2d(**t, scheme="es2d", step=0)
    with pytest.raises(ValueError, match="delta has shape"):
        selective_scan_2d(**t, scheme="bidirectional")
    state, x = torch.zeros(2, 4, 3), torch.ones(2, 4)
    with pytest.raises(ValueError, match="A has shape"):
        selective_state_update(state, x, x, -torch.ones(4, 2), torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="not differentiable"):
        selective_state_update(
            state, x.requires_grad_(), x, -torch.ones(4, 3), torch.ones(2, 3), torch.ones(2, 3)
        )


def test_backward_twice_is_refused_clearly() -> None:
    t = {name: x.requires_grad_() for name, x in inputs(1, 2, 3, 2).items()}
    (gradient,) = torch.autograd.grad(selective_scan(**t).sum(), t["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan_backward"):
        gradient.sum().backward()


def test_no_state_is_saved_without_gradients() -> None:
    tensors, *rest = op_arguments()
    with torch.no_grad():
        out, last_state, tile_states = torch.ops.iumad.selective_scan(*tensors, *rest[:-1], False)
        alone, *empty = torch.ops.iumad.selective_scan(*tensors, *rest[:-1], False, False)
    assert tile_states.numel() == 0
    assert last_state.numel() > 0
    assert [t.numel() for t in empty] == [0, 0]
    assert torch.equal(alone, out)
