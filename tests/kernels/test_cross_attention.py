"""cross_attention against its float64 reference, on every instruction set and bfloat16 matrix unit."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import iumad_kernels as ik
from iumad_kernels import _C, reference
from iumad_kernels.reference.philox import dropout_keep, philox

ISAS = _C.cpu_isas()
HALVES = (torch.bfloat16, torch.float16)


def rms(got: Tensor, want: Tensor) -> float:
    difference = (got.double() - want.double()).norm()
    return (difference / want.double().norm().clamp_min(1e-30)).item()


def masks(kind: str | None, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    if kind is None:
        return None
    if kind == "bool":
        mask = torch.rand(batch, 1, queries, keys) > 0.3
        mask[:, :, queries // 2] = False  # a query that sees nothing
        return mask
    shape = {
        "full": (batch, heads, queries, keys),
        "plane": (queries, keys),
        "head": (heads, queries, keys),
        "keys": (batch, 1, 1, keys),
    }[kind]
    mask = torch.randn(shape)
    return mask.masked_fill(torch.rand(shape) < 0.1, -torch.inf)


# (batch, heads, key heads, Lq, Lk, E, Ev), mask, dropout, causal, weights
CASES = {
    "project": ((2, 4, 4, 196, 196, 32, 32), None, 0.0, False, False),
    "dropout": ((2, 4, 2, 101, 140, 32, 24), None, 0.2, False, False),
    "odd": ((2, 3, 3, 37, 53, 17, 9), None, 0.0, False, False),
    "single": ((1, 1, 1, 1, 1, 1, 1), None, 0.0, False, False),
    "one_query": ((2, 4, 2, 1, 300, 64, 64), None, 0.0, False, False),
    "grouped_causal": ((2, 6, 2, 150, 97, 24, 40), None, 0.0, True, False),
    "bool": ((2, 2, 2, 50, 70, 16, 16), "bool", 0.0, False, True),
    "full_mask_dropout": ((2, 4, 2, 37, 53, 17, 9), "full", 0.3, False, True),
    "plane_mask": ((3, 2, 2, 33, 65, 8, 8), "plane", 0.0, True, False),
    "head_mask": ((2, 4, 4, 33, 65, 8, 8), "head", 0.1, False, False),
    "keys_mask": ((2, 2, 1, 300, 40, 8, 8), "keys", 0.0, False, False),
    "online": ((1, 2, 2, 70, 1500, 40, 24), "plane", 0.2, False, False),
    "online_causal": ((1, 2, 1, 1300, 1100, 16, 16), None, 0.0, True, False),
    "long_weights": ((1, 2, 2, 20, 1100, 16, 16), "bool", 0.2, False, True),
}


def make(name: str, dtype: torch.dtype) -> tuple[list[Tensor], dict]:
    (batch, heads, key_heads, queries, keys, dim, value_dim), kind, dropout, causal, weights = CASES[name]
    tensors = [
        torch.randn(batch, queries, heads, dim).transpose(
            1, 2
        ),  # features with stride 1, tokens before heads
        torch.randn(batch, key_heads, keys, dim),
        torch.randn(batch, key_heads, value_dim, keys).transpose(2, 3),  # features strided
    ]
    mask = masks(kind, batch, heads, queries, keys)
    inputs = [t.to(dtype) for t in tensors]
    if mask is not None:
        inputs.append(mask if mask.dtype == torch.bool else mask.to(dtype))
    return inputs, {"dropout_p": dropout, "is_causal": causal, "need_weights": weights, "seed": 7}


def plain(query, key, value, mask=None, *, dropout_p, is_causal, need_weights, seed):
    """The same formulas, every step in the dtype of the inputs."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[2:], dtype=torch.bool).tril(), -torch.inf)
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(unseen, 0).softmax(-1).masked_fill(unseen, 0)
    if dropout_p:
        weights = (
            weights * dropout_keep(seed, dropout_p, tuple(weights.shape), weights.device) / (1 - dropout_p)
        )
    out = weights @ value
    return (out, weights.mean(1)) if need_weights else out


def run(function, inputs: list[Tensor], options: dict, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and the gradients of all floating inputs, for fixed output gradients."""
    inputs = [t if t.dtype == torch.bool else t.detach().to(dtype).requires_grad_() for t in inputs]
    outputs = function(*inputs, **options)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(t.shape, generator=generator).bfloat16().to(dtype) for t in outputs]
    floating = [t for t in inputs if t.requires_grad]
    return outputs + list(torch.autograd.grad(outputs, floating, grads))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(isa, dtype, case):
    inputs, options = make(case, dtype)
    got = run(ik.cross_attention, inputs, options, dtype)
    want = run(reference.cross_attention, inputs, options, torch.float64)
    outputs = 2 if options["need_weights"] else 1
    scale = 1 if dtype == torch.float32 else 1e-8
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        assert rms(a, b) <= (2e-6 if i < outputs else 1e-5) * scale, i


def check_half(dtype: torch.dtype, case: str) -> None:
    inputs, options = make(case, dtype)
    got = run(ik.cross_attention, inputs, options, dtype)
    want = run(reference.cross_attention, inputs, options, torch.float64)
    low = run(plain, inputs, options, dtype)
    outputs = 2 if options["need_weights"] else 1
    epsilon = torch.finfo(dtype).eps
    for i, (a, b, c) in enumerate(zip(got, want, low, strict=True)):
        assert a.dtype == dtype
        # A tiny case may be exact in plain PyTorch by luck: half a unit in the last place is always allowed.
        assert rms(a, b) <= max((2 if i < outputs else 3) * rms(c, b), epsilon / 2), i


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_float16(isa, case):
    check_half(torch.float16, case)


@pytest.mark.parametrize("isa", ISAS[:-1], indirect=True)
@pytest.mark.parametrize("case", ["project", "odd", "full_mask_dropout"])
def test_bfloat16_without_matrix_unit(isa, case):
    check_half(torch.bfloat16, case)


@pytest.mark.parametrize("bf16_unit", _C.cpu_bf16_units(), indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_bfloat16(bf16_unit, case):
    check_half(torch.bfloat16, case)


def test_bfloat16_units_are_off_below_avx512():
    before = _C.cpu_isa()
    try:
        _C.set_cpu_isa("baseline" if "baseline" in ISAS else ISAS[0])
        assert _C.cpu_bf16() == "none" or ISAS == ["avx512"]
    finally:
        _C.set_cpu_isa(before)
    with pytest.raises(ValueError, match="unknown bfloat16 matrix unit 'fast'"):
        _C.set_cpu_bf16("fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["project", "grouped_causal", "full_mask_dropout", "keys_mask", "online"])
def test_same_bits_for_any_thread_count_and_on_every_run(dtype, case):
    inputs, options = make(case, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            results.append(run(ik.cross_attention, inputs, options, dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("keys", [5, 64, 196, 1100])
def test_dropout_mask_is_the_references_bit_for_bit(isa, keys):
    query, key = torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, keys, 4)
    out = ik.cross_attention(
        query, key, torch.eye(keys).expand(2, 3, keys, keys), dropout_p=0.3, seed=2**63 + 5
    )
    assert torch.equal(out > 0, dropout_keep(5 - 2**63, 0.3, (2, 3, 7, keys), query.device))


def test_philox_known_answers():
    # The published vector for an all-zero counter and key (Random123's kat_vectors).
    assert philox(0, torch.tensor(0)).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    keep = dropout_keep(3, 0.25, (64, 1000), torch.device("cpu"))
    assert abs(keep.float().mean().item() - 0.75) < 0.01


def test_seed_comes_from_torchs_generator():
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 30, 8)
    torch.manual_seed(5)
    first, second = (ik.cross_attention(query, key, key, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(ik.cross_attention(query, key, key, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("mask", "causal"), [(None, False), (None, True), ("bool", False), ("full", False)])
def test_replaces_torchs_own(mask, causal):
    query, key, value = torch.randn(2, 4, 19, 16), torch.randn(2, 2, 31, 16), torch.randn(2, 2, 31, 8)
    bias = masks(mask, 2, 4, 19, 31)
    options = {"attn_mask": bias, "is_causal": causal, "scale": 0.3, "enable_gqa": True}
    torch.testing.assert_close(
        ik.cross_attention(query, key, value, **options),
        F.scaled_dot_product_attention(query, key, value, **options),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fully_masked_rows_give_zeros_and_zero_gradients(isa, dtype):
    inputs = [torch.randn(1, 2, 6, 8, dtype=dtype) for _ in range(3)]
    mask = torch.zeros(6, 6, dtype=dtype)
    mask[2] = -torch.inf
    mask[4, 3] = -torch.inf
    options = {"dropout_p": 0.0, "is_causal": False, "need_weights": True, "seed": None}
    out, weights, dquery, _, _, dmask = run(ik.cross_attention, [*inputs, mask], options, dtype)
    assert not out[:, :, 2].any()
    assert not weights[:, 2].any()
    assert not weights[:, 4, 3].any()
    assert not dquery[:, :, 2].any()
    assert not dmask[2].any()
    assert all(t.isfinite().all() for t in (out, weights, dquery, dmask))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_and_inf_propagate_as_in_the_reference(isa, dtype, bad, where):
    inputs = [torch.randn(1, 1, 20, 8).to(dtype) for _ in range(3)]
    inputs[where][0, 0, 3, 2] = bad
    got, want = ik.cross_attention(*inputs), reference.cross_attention(*(t.double() for t in inputs))
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())


def test_large_scores_do_not_overflow():
    query, key = torch.randn(1, 2, 40, 16) * 100, torch.randn(1, 2, 2000, 16) * 100
    got, want = (f(query, key, key) for f in (ik.cross_attention, reference.cross_attention))
    assert got.isfinite().all()
    assert rms(got, want) < 1e-3


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("size", [1.0, 1.3, 1.45, 8.0])
@pytest.mark.parametrize("values", [1e-25, 1.0, 1e17, 1e19, 1e30])
def test_softmax_without_maximum_agrees_at_its_limits(isa, dropout, size, values):
    query, key = torch.randn(1, 2, 40, 9) * size, torch.randn(1, 2, 70, 9) * size
    value = torch.randn(1, 2, 70, 9) * values
    got, want = (
        f(*(t.to(dtype) for t in (query, key, value)), dropout_p=dropout, seed=3)
        for f, dtype in ((ik.cross_attention, torch.float32), (reference.cross_attention, torch.float64))
    )
    assert rms(got / values, want / values) < 2e-6 * size


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)]
)
def test_empty(shape):
    batch, heads, queries, keys, dim = shape
    inputs = [torch.randn(batch, heads, n, dim, requires_grad=True) for n in (queries, keys, keys)]
    mask = torch.zeros(queries, keys, requires_grad=True)
    out, weights = ik.cross_attention(*inputs, mask, need_weights=True)
    assert out.shape == (batch, heads, queries, dim)
    assert weights.shape == (batch, queries, keys)
    grads = torch.autograd.grad(out.sum() + weights.sum(), [*inputs, mask])
    assert all(g.shape == t.shape and not g.isnan().any() for g, t in zip(grads, [*inputs, mask]))
    if keys == 0:
        assert not out.any()


@pytest.mark.parametrize("case", ["odd", "full_mask_dropout", "online"])
def test_every_element_is_written(case):
    inputs, options = make(case, torch.float32)
    want = run(ik.cross_attention, inputs, options, torch.float32)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        got = run(ik.cross_attention, inputs, options, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_expanded_and_sliced_inputs():
    wide = torch.randn(2, 3, 40, 3 * 16)
    query, key, value = wide.chunk(3, dim=3)
    got = ik.cross_attention(query[:, :, ::2], key[:, :1].expand(2, 3, 40, 16), value.flip(2))
    want = reference.cross_attention(query[:, :, ::2], key[:, :1].expand(2, 3, 40, 16), value.flip(2))
    assert rms(got, want) < 2e-6


@pytest.mark.parametrize(
    ("causal", "dropout", "weights"), list(itertools.product((False, True), (0.0, 0.3), (False, True)))
)
def test_gradcheck(causal, dropout, weights):
    inputs = [
        torch.randn(2, h, n, 3, dtype=torch.float64, requires_grad=True) for h, n in ((2, 5), (1, 6), (1, 6))
    ]
    for shape in ((5, 6), (2, 2, 5, 6), (2, 1, 1, 6)):
        mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda q, k, v, m: ik.cross_attention(q, k, v, m, dropout, causal, need_weights=weights, seed=1),
            (*inputs, mask),
        )


@pytest.mark.parametrize("case", ["odd", "bool", "full_mask_dropout"])
def test_opcheck(case):
    inputs, options = make(case, torch.float32)
    inputs = [t if t.dtype == torch.bool else t.detach().requires_grad_() for t in inputs]
    mask = inputs[3] if len(inputs) > 3 else None
    seed = torch.tensor(7) if options["dropout_p"] else None
    torch.library.opcheck(
        torch.ops.iumad.cross_attention.default,
        (*inputs[:3], mask, seed, options["dropout_p"], False, 0.3, options["need_weights"]),
    )


def test_compiles_in_one_graph():
    def attend(query, key, value, mask):
        return ik.cross_attention(query, key, value, mask, 0.2, need_weights=True, seed=4)

    inputs = [torch.randn(2, 2, n, 8, requires_grad=True) for n in (7, 9, 9)] + [
        torch.randn(7, 9, requires_grad=True)
    ]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    got, want = (
        torch.autograd.grad(sum(t.square().sum() for t in f(*inputs)), inputs) for f in (compiled, attend)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    random = torch.compile(
        lambda q, k: ik.cross_attention(q, k, k, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    assert random(*inputs[:2]).isfinite().all()  # a drawn seed is traced, too


def test_autocast_casts_as_torchs_own():
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = ik.cross_attention(query, key, key.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ik.cross_attention(*(t.bfloat16() for t in (query, key, key))))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.randn(3, 4, 8)}, ValueError, r"query has shape \(3, 4, 8\)"),
        ({"query": [1.0]}, TypeError, "query must be a tensor"),
        ({"key": torch.randn(2, 4, 6, 7)}, ValueError, r"key has shape \(2, 4, 6, 7\)"),
        ({"value": torch.randn(2, 4, 5, 8)}, ValueError, r"value has shape \(2, 4, 5, 8\)"),
        ({"value": torch.randn(2, 4, 6, 8).half()}, TypeError, "value has dtype torch.float16, expected torch.float32"),
        ({"key": torch.randn(2, 3, 6, 8), "value": torch.randn(2, 3, 6, 8)}, ValueError, "heads of key = 3 must divide"),
        ({"query": torch.ones(2, 4, 5, 8, dtype=torch.int64)}, TypeError, "query has dtype torch.int64"),
        ({"attn_mask": torch.zeros(5, 7)}, ValueError, r"attn_mask has shape \(5, 7\).*broadcasts to \(2, 4, 5, 6\)"),
        ({"attn_mask": torch.zeros(5, 6, dtype=torch.int32)}, TypeError, "attn_mask has dtype torch.int32"),
        ({"attn_mask": torch.zeros(5, 6).double()}, TypeError, "attn_mask.*float64 cannot be mixed"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p = 1.0, expected 0 <= dropout_p < 1"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p = -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p = nan"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"key": torch.randn(2, 4, 6, 8, device="meta")}, ValueError, "key is on meta, but query is on cpu"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {
        "query": torch.randn(2, 4, 5, 8),
        "key": torch.randn(2, 4, 6, 8),
        "value": torch.randn(2, 4, 6, 8),
    }
    with pytest.raises(error, match=message):
        ik.cross_attention(**{**arguments, **change})


def test_reference_backend_runs():
    inputs, options = make("full_mask_dropout", torch.float32)
    with ik.backend("reference"):
        got = ik.cross_attention(*inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, reference.cross_attention(*inputs, **options)))
