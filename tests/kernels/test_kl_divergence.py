"""kl_divergence against the float64 reference, and the reference against F.kl_div."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kl_inputs import INF, MASKS, S, T, doubles, every_isa, logits, rms_error
from torch import Tensor

import iumad_kernels
from iumad_kernels import _C, kl_bottleneck, kl_divergence, reference

SHAPES = [(6, 10), (1, 1), (5, 3, 77), (3, 1271), (17,), (7, 64)]
BETAS = [0.0, 1.0, 0.3]
every_beta = pytest.mark.parametrize("beta", BETAS)


def gradients(loss: Tensor, inputs: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad((loss * weights).sum(), inputs)


def check(inputs: tuple[Tensor, Tensor], value: float = 2e-6, gradient: float = 1e-5, **options) -> None:
    """Value and both gradients against the reference in float64."""
    twins = doubles(*inputs)
    out, expected = kl_divergence(*inputs, **options), reference.kl_divergence(*twins, **options)
    assert out.shape == expected.shape
    assert rms_error(out, expected) <= value
    for got, want in zip(gradients(out, inputs), gradients(expected, twins)):
        assert rms_error(got, want) <= gradient


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_reference_is_torch_kl_div(reduction):
    s, t = doubles(*logits(6, 10))
    expected = F.kl_div((s / 3).log_softmax(-1), (t / 3).softmax(-1), reduction=reduction)
    torch.testing.assert_close(reference.kl_divergence(s, t, temperature=3, reduction=reduction), expected)
    reverse = reference.kl_divergence(t, s, temperature=3, beta=1, reduction=reduction)
    torch.testing.assert_close(reverse, expected)


def test_reference_jensen_shannon_is_its_definition():
    s, t = doubles(*logits(6, 10))
    P, Q, b = t.softmax(-1), s.softmax(-1), 0.3
    M = b * P + (1 - b) * Q
    expected = b * (P * (P / M).log()).sum(-1) + (1 - b) * (Q * (Q / M).log()).sum(-1)
    torch.testing.assert_close(reference.kl_divergence(s, t, beta=b, reduction="none"), expected)


@every_isa
@every_beta
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(isa, shape, beta):
    inputs = logits(*shape)
    for reduction in ("none", "sum", "mean", "batchmean"):
        check(inputs, beta=beta, reduction=reduction, temperature=1.7)


@every_isa
@every_beta
def test_float64(isa, beta):
    check(logits(5, 203, dtype=torch.float64), 1e-13, 1e-12, beta=beta)


@every_isa
@every_beta
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)]
)
def test_half_precision(isa, dtypes, beta):
    inputs = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(logits(9, 133), dtypes)]
    twins = doubles(*inputs)
    out, expected = kl_divergence(*inputs, beta=beta), reference.kl_divergence(*twins, beta=beta)
    assert out.dtype == torch.float32
    assert rms_error(out, expected) <= 2e-6
    for got, want, dtype in zip(gradients(out, inputs), gradients(expected, twins), dtypes):
        assert got.dtype == dtype
        rounding = rms_error(want.to(dtype), want)  # the error of rounding the exact gradient once
        assert rms_error(got, want) <= 1.01 * rounding + 1e-5


@every_isa
def test_large_many_and_equal_logits(isa):
    check(logits(4, 50, scale=3000.0))
    check(logits(2, 32000))
    s, _ = logits(4, 50)
    assert torch.equal(kl_divergence(s, s.detach().clone(), reduction="none"), torch.zeros(4))


LAYOUTS = {
    "transposed": lambda: torch.randn(33, 7).t(),
    "sliced": lambda: torch.randn(7, 50)[:, 3:36],
    "stepped": lambda: torch.randn(7, 66)[:, ::2],
    "expanded rows": lambda: torch.randn(1, 33).expand(7, 33),
    "expanded classes": lambda: torch.randn(7, 1).expand(7, 33),
    "permuted": lambda: torch.randn(5, 33, 4, 7).permute(3, 0, 2, 1)[:, 1:4],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    s = LAYOUTS[layout]().detach().requires_grad_()
    t = torch.randn(s.shape).requires_grad_()
    check((s, t))
    check((t, s), reduction="none")


def test_sum_passes_an_expanded_gradient_to_unreduced_rows():
    s, t = logits(2, 3, 10)
    got = torch.autograd.grad(kl_divergence(s, t, reduction="none").sum(), (s, t))
    torch.testing.assert_close(got, torch.autograd.grad(kl_divergence(s, t, reduction="sum"), (s, t)))


@pytest.mark.usefixtures("fresh_nan")
def test_nothing_is_left_unwritten():
    s, t = logits(4, 37)
    check((s, t))
    check((s.detach().t().requires_grad_(), t.detach().t().requires_grad_()), reduction="none")


@every_beta
def test_same_bits_on_every_run_and_thread_count(beta):
    s, t = logits(301, 129)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        loss = kl_divergence(s, t, beta=beta)
        return [loss, *torch.autograd.grad(loss, (s, t))]

    threads = torch.get_num_threads()
    try:
        for a, b, c in zip(run(1), run(1), run(2)):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
    finally:
        torch.set_num_threads(threads)


HOSTILE = {  # student row, teacher row
    "both masked": ([1.0, -INF, 2.0], [0.5, -INF, 1.0]),
    "teacher lacks a class": ([1.0, 3.0, 2.0], [0.5, -INF, 1.0]),
    "student lacks a class": ([1.0, -INF, 2.0], [0.5, 3.0, 1.0]),
    "student lacks an underflowing class": ([1.0, -INF, 2.0], [0.5, -300.0, 1.0]),
    "disjoint": ([1.0, -INF, -INF], [-INF, 3.0, 1.0]),
    "no student": ([-INF] * 3, [0.5, 3.0, 1.0]),
    "no teacher": ([0.5, 3.0, 1.0], [-INF] * 3),
    "nothing": ([-INF] * 3, [-INF] * 3),
}


@every_isa
@every_beta
@pytest.mark.parametrize("case", HOSTILE)
def test_infinite_logits(isa, case, beta):
    # Beside an ordinary row, in part of a vector and in several.
    for repeats in (1, 11):
        rows = [torch.tensor([row, [0.0, 1.0, 2.0]]).repeat(1, repeats) for row in HOSTILE[case]]
        inputs = [row.requires_grad_() for row in rows]
        twins = doubles(*inputs)
        out = kl_divergence(*inputs, beta=beta, reduction="none")
        expected = reference.kl_divergence(*twins, beta=beta, reduction="none")
        assert not out.isnan().any()
        torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=1e-6)
        for got, want in zip(gradients(out, inputs), gradients(expected, twins)):
            assert not got.isnan().any()
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_infinite_values_are_the_true_ones():
    def value(case: str, beta: float) -> float:
        return kl_divergence(*(torch.tensor([row]) for row in HOSTILE[case]), beta=beta).item()

    for case in ("student lacks a class", "student lacks an underflowing class", "disjoint", "no student"):
        assert value(case, 0) == INF
    for case in ("teacher lacks a class", "disjoint", "no teacher"):
        assert value(case, 1) == INF
    teacher, student = torch.tensor([0.5, 1.0]).softmax(0), torch.tensor([1.0, 3.0, 2.0]).softmax(0)[[0, 2]]
    expected = (teacher * (teacher / student).log()).sum().item()
    assert value("teacher lacks a class", 0) == pytest.approx(expected, rel=1e-6)
    assert value("disjoint", 0.5) == pytest.approx(math.log(2))
    assert value("nothing", 0) == value("no teacher", 0) == 0


@every_isa
@every_beta
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_nan_and_plus_inf_give_nan_in_their_row_only(isa, bad, beta):
    s, t = logits(2, 21)
    with torch.no_grad():
        s[0, 20] = bad
    out = kl_divergence(s, t, beta=beta, reduction="none")
    ds, dt = torch.autograd.grad(out.sum(), (s, t))
    for x in (out, ds[:, 0], dt[:, 0]):
        assert x.isnan().tolist() == [True, False]


@every_isa
@every_beta
@pytest.mark.parametrize("mask", MASKS)
def test_masks(isa, mask, beta):
    inputs, chosen = logits(6, 40), MASKS[mask]()
    for reduction in ("none", "sum", "mean", "batchmean"):
        check(inputs, mask=chosen, beta=beta, reduction=reduction)


def test_masked_classes_are_as_if_they_were_not_there():
    s, t = logits(6, 40)
    mask = MASKS["classes"]()
    with torch.no_grad():
        s[:, 0], t[:, 3] = math.nan, INF  # not even their values are looked at
    out = kl_divergence(s, t, mask=mask, reduction="mean")
    torch.testing.assert_close(out, kl_divergence(s[:, mask], t[:, mask], reduction="mean"))
    for gradient in torch.autograd.grad(out, (s, t)):
        assert torch.equal(gradient[:, ~mask], torch.zeros(6, 14))


@pytest.mark.parametrize("shape", [(0, 10), (4, 0), (0, 0), (2, 0, 5)], ids=str)
def test_size_zero(shape):
    s, t = logits(*shape)
    for reduction in ("sum", "mean", "batchmean"):
        assert kl_divergence(s, t, reduction=reduction).item() == 0
    rows = kl_divergence(s, t, reduction="none")
    assert torch.equal(rows, torch.zeros(shape[:-1]))
    assert torch.autograd.grad(rows.sum(), s)[0].shape == shape
    assert kl_bottleneck(s, t).total.item() == 0


def test_only_the_asked_gradients():
    s, t = logits(6, 10)
    expected = torch.autograd.grad(kl_divergence(s, t), (s, t))
    assert torch.equal(torch.autograd.grad(kl_divergence(s, t.detach()), s)[0], expected[0])
    assert torch.equal(torch.autograd.grad(kl_divergence(s.detach(), t), t)[0], expected[1])
    kl_divergence(s, t, detach_teacher=True).backward()
    assert t.grad is None
    assert s.grad is not None
    assert not kl_divergence(s.detach(), t.detach()).requires_grad


def test_backward_twice():
    s, t = logits(6, 10)
    for unscaled in (kl_divergence(s, t), kl_bottleneck(s, t, torch.arange(6), detach_teacher=False).total):
        loss = 3 * unscaled
        first = torch.autograd.grad(loss, (s, t), retain_graph=True)
        kept = [g.clone() for g in first]
        torch.testing.assert_close(torch.autograd.grad(loss, (s, t)), first)
        assert all(
            torch.equal(a, b) for a, b in zip(first, kept)
        )  # the second time must not touch the first one's


def test_half_precision_survives_small_gradients():
    s, t = (x.detach().half().requires_grad_() for x in logits(4000, 4))
    scaled = torch.autograd.grad(2**14 * kl_divergence(s, t), s)[0]
    twin = s.detach().double().requires_grad_()
    want = torch.autograd.grad(2**14 * reference.kl_divergence(twin, t.detach().double()), twin)[0]
    assert rms_error(scaled, want) <= 1e-3


@every_beta
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(beta, reduction, masked):
    mask = torch.rand(4, 7) > 0.3 if masked else None
    assert torch.autograd.gradcheck(
        lambda s, t: kl_divergence(s, t, beta=beta, reduction=reduction, mask=mask, temperature=1.5),
        doubles(*logits(4, 7)),
    )


@pytest.mark.parametrize("reduction", [0, 3])
def test_opcheck_divergence(reduction):
    s, t = logits(4, 7)
    mask = torch.rand(4, 7) > 0.3
    for arguments in (
        (t, s, None, 1.0, 0.0),
        (t.detach(), s, mask, 2.0, 0.3),
        (t.detach().t(), s.t(), None, 1.0, 0.0),
    ):
        torch.library.opcheck(torch.ops.iumad.kl_divergence.default, (*arguments, reduction, True))


def test_compile_and_export():
    s, t = logits(4, 7)
    labels = torch.tensor([0, 6, 3, 3])

    class Loss(torch.nn.Module):
        def forward(self, s: Tensor, t: Tensor) -> Tensor:
            return kl_divergence(s, t, beta=0.3) + kl_bottleneck(t, s, labels, temperature=2.0).total

    expected = Loss()(s, t)
    out = torch.compile(Loss(), fullgraph=True)(s, t)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, (s, t)), torch.autograd.grad(expected, (s, t)))
    program = torch.export.export(Loss(), (s.detach(), t.detach()))
    torch.testing.assert_close(program.module()(s.detach(), t.detach()), expected.detach())


def test_autocast_changes_nothing():
    s, t = logits(4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kl_divergence(s, t)
    assert torch.equal(inside, kl_divergence(s, t))


def test_reference_backend():
    s, t = logits(4, 7)
    labels = torch.tensor([0, 6, 3, 3])
    with iumad_kernels.backend("reference"):
        expected = kl_divergence(s, t), kl_bottleneck(t, s, labels)
    torch.testing.assert_close((kl_divergence(s, t), kl_bottleneck(t, s, labels)), expected)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, "temperature = 0.0"),
        ({"temperature": -1}, ValueError, "temperature = -1"),
        ({"temperature": INF}, ValueError, "temperature = inf"),
        ({"temperature": math.nan}, ValueError, "temperature = nan"),
        ({"beta": 1.5}, ValueError, "beta = 1.5"),
        ({"reduction": "average"}, ValueError, "reduction = 'average'"),
        ({"mask": torch.ones(4, 7)}, TypeError, "mask must be a bool tensor"),
        ({"mask": [True]}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask has shape \(4,\)"),
        ({"mask": torch.ones(1, 4, 7, dtype=torch.bool)}, ValueError, r"mask has shape \(1, 4, 7\)"),
        ({"teacher_logits": torch.zeros(4, 8)}, ValueError, "teacher_logits has shape"),
        ({"student_logits": torch.zeros(4, 7).long()}, TypeError, "student_logits has dtype torch.int64"),
        ({"teacher_logits": torch.zeros(4, 7).double()}, TypeError, "teacher_logits has dtype torch.float64"),
        ({"student_logits": None}, TypeError, "student_logits must be a tensor"),
        (
            {"student_logits": torch.zeros(()), "teacher_logits": torch.zeros(())},
            ValueError,
            "expected .*classes",
        ),
    ],
)
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        kl_divergence(**{"student_logits": S, "teacher_logits": T, **options})


@pytest.mark.parametrize("isa", _C.cpu_isas(), indirect=True)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_logits_masked_with_the_lowest_number(beta: float, isa: str) -> None:
    """x - max times log2(e) overflows: the class has probability 0, not NaN."""
    logits = torch.randn(2, 3, 40)
    logits[:, :, ::3] = torch.finfo(torch.float32).min
    student, teacher = (t.clone().requires_grad_() for t in logits)
    loss = kl_divergence(student, teacher, beta=beta)
    got = torch.autograd.grad(loss, (student, teacher))
    masked = [t.double().masked_fill(t < -1e30, -torch.inf).requires_grad_() for t in logits]
    want_loss = reference.kl_divergence(*masked, beta=beta)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-6)
    for g, w in zip(got, torch.autograd.grad(want_loss, masked)):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-6)


def test_backward_without_saved_statistics_is_refused() -> None:
    p, q = torch.randn(2, 4, 5).requires_grad_().unbind()
    loss, _ = torch.ops.iumad.kl_divergence(p, q, None, 1.0, 0.0, 3, False)
    with pytest.raises(RuntimeError, match="save_stats=True"):
        loss.backward()


@every_isa
@every_beta
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1600, 1003])
def test_gradients_too_large_for_the_caches_have_the_same_bits(
    isa: str, classes: int, student: torch.dtype, reduction: str, beta: float
) -> None:
    """They are stored past them, row by row where the row starts at a vector (of 1003 floats few rows do), unless they have to be
    converted first."""
    s, t = logits((2_300_000 if student == torch.float32 else 4_300_000) // classes, classes)
    both = (s.to(student), t)

    def of_first_rows(rows: int) -> tuple[Tensor, ...]:
        inputs = [t.detach()[:rows].requires_grad_() for t in both]
        return torch.autograd.grad(kl_divergence(*inputs, beta=beta, reduction=reduction).sum(), inputs)

    for many, few in zip(of_first_rows(len(both[0])), of_first_rows(9)):
        assert many.isfinite().all()
        assert torch.equal(many[:9], few)
