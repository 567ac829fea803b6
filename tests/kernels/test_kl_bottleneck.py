"""kl_bottleneck against the float64 reference, and the reference against F.kl_div and F.cross_entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kl_inputs import INF, MASKS, S, T, doubles, every_isa, logits, rms_error

import iumad_kernels
from iumad_kernels import kl_bottleneck, kl_divergence, reference


def test_reference_bottleneck_is_torch_losses():
    p, q = doubles(*logits(6, 10))
    labels = torch.randint(10, (6,))
    total, kl, p_ce, q_ce = reference.kl_bottleneck(p, q, labels, kl_weight=2.0, ce_weight=0.5, temperature=3)
    torch.testing.assert_close(p_ce, F.cross_entropy(p, labels))
    torch.testing.assert_close(q_ce, F.cross_entropy(q, labels))
    torch.testing.assert_close(total, 2 * kl + 0.5 * (p_ce + q_ce))


@every_isa
@pytest.mark.parametrize("detach_teacher", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
def test_bottleneck(isa, masked, temperature, detach_teacher):
    inputs, labels = logits(6, 40), torch.randint(40, (6,))
    options = {
        "kl_weight": 0.7,
        "ce_weight": 1.3,
        "temperature": temperature,
        "detach_teacher": detach_teacher,
    }
    if masked:
        mask = MASKS["elements, one row empty"]()
        options["mask"] = mask | (F.one_hot(labels, 40).bool() & mask.any(-1, keepdim=True))
    twins = doubles(*inputs)
    out = kl_bottleneck(*inputs, labels, **options)
    expected = reference.kl_bottleneck(*twins, labels, **options)
    for got, want in zip(out, expected):
        assert rms_error(got, want) <= 2e-6
    weights = (1.0, 0.5, 0.25, 2.0)  # every part is differentiable by itself
    sums = [sum(w * part for w, part in zip(weights, parts)) for parts in (out, expected)]
    for got, want in zip(torch.autograd.grad(sums[0], inputs), torch.autograd.grad(sums[1], twins)):
        assert rms_error(got, want) <= 1e-5


@every_isa
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("classes", [1600, 1003])
def test_bottleneck_with_gradients_too_large_for_the_caches(isa, classes, temperature):
    rows = 2_300_000 // classes
    inputs, labels = logits(rows, classes), torch.arange(rows) * 7 % classes
    labels[:2] = torch.tensor([0, classes - 1])
    twins, options = doubles(*inputs), {"temperature": temperature, "detach_teacher": False}
    got = torch.autograd.grad(kl_bottleneck(*inputs, labels, **options).total, inputs)
    expected = torch.autograd.grad(reference.kl_bottleneck(*twins, labels, **options)[0], twins)
    for a, b in zip(got, expected):
        assert rms_error(a, b) <= 1e-5
        rows_error = (a - b).norm(dim=1) / b.norm(dim=1)
        assert rows_error.max() <= 1e-4


def test_bottleneck_without_labels():
    p, q = logits(6, 10)
    loss = kl_bottleneck(p, q, kl_weight=2.0)
    assert loss.ce.item() == 0
    torch.testing.assert_close(loss.total, 2 * kl_divergence(q, p))
    loss.total.backward()
    assert p.grad is None or not p.grad.any()


def test_a_weight_of_zero_switches_an_infinite_term_off():
    q = torch.tensor([[0.0, -INF]], requires_grad=True)
    loss = kl_bottleneck(torch.zeros(1, 2), q, torch.tensor([0]), kl_weight=0.0)
    assert loss.kl.item() == INF
    assert loss.total.item() == pytest.approx(math.log(2))
    loss.total.backward()
    assert q.grad is not None
    assert torch.equal(q.grad, torch.zeros(1, 2))


def test_parts_and_total_are_differentiable_one_after_the_other():
    s, t = logits(6, 10)
    loss = kl_bottleneck(t, s, torch.arange(6), kl_weight=2.0, detach_teacher=False)
    kl = torch.autograd.grad(loss.kl, (s, t), retain_graph=True)
    ce = torch.autograd.grad(loss.ce, (s, t), retain_graph=True)
    total = torch.autograd.grad(loss.total, (s, t))
    torch.testing.assert_close(total, tuple(2 * a + b for a, b in zip(kl, ce)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradcheck_bottleneck(temperature):
    labels = torch.tensor([0, 6, 3, 3])
    assert torch.autograd.gradcheck(
        lambda p, q: tuple(kl_bottleneck(p, q, labels, temperature=temperature, detach_teacher=False)),
        doubles(*logits(4, 7)),
    )


def test_opcheck_bottleneck():
    p, q = logits(4, 7)
    labels = torch.tensor([0, 6, 3, 3])
    for arguments in (
        (p, q, labels, None, 1.0, 1.0, 1.0, False),
        (p.detach(), q, None, None, 2.0, 1.0, 0.0, True),
    ):
        torch.library.opcheck(torch.ops.iumad.kl_bottleneck.default, (*arguments, True))


LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"labels": LABELS + 7}, ValueError, r"labels\[0\] = 7, expected a class from 0 to 6"),
        ({"labels": torch.tensor([0, 1, -1, 2])}, ValueError, r"labels\[2\] = -1"),
        (
            {"labels": LABELS, "mask": torch.arange(7) > 0},
            ValueError,
            r"labels\[0\] = 0, a class that mask leaves out",
        ),
        ({"labels": LABELS[:3]}, ValueError, r"labels has shape \(3,\)"),
        ({"labels": LABELS.float()}, TypeError, "labels must be an int64 tensor"),
        ({"temperature": 0}, ValueError, "temperature = 0"),
        ({"bottleneck_logits": torch.zeros(3, 7)}, ValueError, "bottleneck_logits has shape"),
    ],
)
def test_bad_input_bottleneck(options, error, words, backend):
    with iumad_kernels.backend(backend), pytest.raises(error, match=words):
        kl_bottleneck(**{"fused_logits": T, "bottleneck_logits": S, **options})
