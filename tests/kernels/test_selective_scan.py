"""selective_scan on the CPU against its float64 definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_inputs import FORWARD, ISAS, compare, grads, inputs, rms
from torch import Tensor

from iumad_kernels import _C, reference, selective_scan


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
@pytest.mark.parametrize("states", [3, 16, 37])
def test_low_precision(isa: str, dtype: torch.dtype, states: int) -> None:
    compare_low_precision(dtype, states)


def compare_low_precision(dtype: torch.dtype, states: int) -> None:
    """With a gate and without, when results are stored by the recurrence itself; with the last state and without, when
    bfloat16 takes coarser exponentials."""
    for optional in ("D delta_bias", "D z delta_bias initial_state"):
        arguments = inputs(2, 33, 35, states, optional=optional)
        for last in (False, True):
            compare(arguments, dtype, delta_softplus=True, return_last_state=last)
            compare(laid_out(arguments, "channels-last"), dtype, delta_softplus=True, return_last_state=last)


@pytest.mark.parametrize("bf16_unit", _C.cpu_bf16_units(), indirect=True)
@pytest.mark.parametrize("states", [3, 16, 37])
def test_bfloat16_units(bf16_unit: str, states: int) -> None:
    compare_low_precision(torch.bfloat16, states)


@pytest.mark.parametrize("bf16_unit", _C.cpu_bf16_units(), indirect=True)
def test_bfloat16_units_give_the_same_bits(bf16_unit: str) -> None:
    arguments = laid_out(inputs(2, 48, 35, 16, optional="D delta_bias"), "channels-last")
    low = {name: t.bfloat16() if t.dim() == 3 else t.float() for name, t in arguments.items()}

    def run() -> list[Tensor]:
        out, gradients = grads(selective_scan, low, [torch.ones(2, 48, 35)], delta_softplus=True)
        return [*out, *gradients]

    got = run()
    _C.set_cpu_bf16("none")
    assert all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))


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


def laid_out(arguments: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Those with tokens under the strides of ``layout``."""
    return {name: layouts(t)[layout] if t.dim() == 3 else t for name, t in arguments.items()}


@ISAS
@pytest.mark.parametrize("layout", ["channels-last", "sliced", "batch-last"])
def test_strides(isa: str, layout: str) -> None:
    compare(laid_out(inputs(3, 32, 37, 16), layout), delta_softplus=True)


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


def one_decay(exponent: float) -> dict[str, Tensor]:
    """Arguments of moderate decays but for one, e^exponent."""
    t = inputs(1, 33, 100, 16, optional="D")
    t["A"] = -torch.rand_like(t["A"])
    t["A"][20, 3] = exponent / 8
    t["delta"] = t["delta"].abs() / 100
    t["delta"][0, 20, 50] = 8
    return t


@ISAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exponent", [-84, -166, -277, -1040, -1e30])
def test_decays_outside_the_common_range(isa: str, dtype: torch.dtype, exponent: float) -> None:
    """Where they are taken for moderate, 2^n shifted into its place is huge from the second on; the last, with AVX-512, NaN."""
    t = one_decay(exponent)
    for last in (False, True):
        compare(t, dtype, return_last_state=last)
        compare(laid_out(t, "channels-last"), dtype, return_last_state=last)


@ISAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exponent", [82, 86, 1000])
def test_states_that_grow(isa: str, dtype: torch.dtype, exponent: float) -> None:
    """To a number, or past the largest one. The relative error of e^x is that of x times x."""
    parameters = torch.promote_types(dtype, torch.float32)
    low = {name: x.to(dtype if x.dim() == 3 else parameters) for name, x in one_decay(exponent).items()}
    got = selective_scan(**low).double()
    want = reference.selective_scan(**{name: x.double() for name, x in low.items()})
    if exponent == 1000:
        assert torch.equal(got.isfinite(), want.isfinite())
        got, want = got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)
    assert rms(got, want) < (6e-3 if dtype == torch.bfloat16 else 5e-5)


@ISAS
@pytest.mark.parametrize("factor", [1.0, 1 + 2.0**-8, 1 - 2.0**-9])
def test_bfloat16_results_are_rounded_to_nearest_even(isa: str, factor: float) -> None:
    """D u alone, of every normal bfloat16 and NaN: as torch rounds it, ties included, which these factors make."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    u = every[~every.isinf() & ~(every.abs() < 2.0**-100)].view(
        1, -1, 1
    )  # a channel each, for NaN would spread
    dim, zero = u.shape[1], torch.zeros(1, 1, 1)
    D = torch.full((dim,), factor)
    out = selective_scan(u, torch.ones_like(u), -torch.ones(dim, 1), zero, zero, D)
    want = (u.float() * factor).bfloat16()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.nan_to_num(), want.nan_to_num())


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


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    batch, length, states = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (0, 40), (1, 20)))
    groups = data.draw(st.sampled_from([None, 1, 2, 3]))
    dim = data.draw(st.integers(1, 12)) * (groups or 1)
    optional = " ".join(data.draw(st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_state"]))))
    torch.manual_seed(0)  # what is drawn decides the values too: a failure can be repeated
    compare(
        inputs(batch, dim, length, states, groups, optional),
        delta_softplus=data.draw(st.booleans()),
        reverse=data.draw(st.booleans()),
    )


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


def test_every_output_is_written() -> None:
    """Uninitialised memory filled with NaN: whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        compare(inputs(2, 17, 33, 3), delta_softplus=True)
    finally:
        torch.use_deterministic_algorithms(False)
