"""Triton divergences and bottleneck loss, through the public functions, against the float64 definition."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import iumad_kernels
from iumad_kernels import reference

INF = float("inf")


def logits(*shape: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = (scale * torch.randn(*shape, generator=g) for _ in range(2))
    return a.requires_grad_(), b.requires_grad_()


def divergence(agree, student: Tensor, teacher: Tensor, mask: Tensor | None = None, **flags: object) -> None:
    agree(
        functools.partial(iumad_kernels.kl_divergence, **flags),
        functools.partial(reference.kl_divergence, **flags),
        student_logits=student,
        teacher_logits=teacher,
        mask=mask,
    )


def bottleneck(
    agree, fused: Tensor, behind: Tensor, labels: Tensor | None, mask: Tensor | None = None, **flags: object
) -> None:
    agree(
        lambda **given: tuple(iumad_kernels.kl_bottleneck(**given, **flags)),
        functools.partial(reference.kl_bottleneck, **flags),
        fused_logits=fused,
        bottleneck_logits=behind,
        labels=labels,
        mask=mask,
    )


@pytest.mark.parametrize("shape", [(3, 10), (1, 1), (2, 3, 33), (2, 2500), (0, 4), (7,)])
def test_shapes(agree, shape):
    divergence(agree, *logits(*shape))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_divergences(agree, reduction, beta, masked):
    mask = torch.tensor([[True, False, True, True, True], [False] * 5, [True] * 5]) if masked else None
    divergence(agree, *logits(3, 5), mask, reduction=reduction, beta=beta, temperature=2.5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("side", ["student", "teacher", "both", "all of one"])
def test_classes_without_mass(agree, beta, side):
    student, teacher = (t.detach() for t in logits(2, 4, scale=1.0))
    if side in ("student", "both"):
        student[0, 1] = -INF
    if side in ("teacher", "both"):
        teacher[0, 1] = -INF
    if side == "all of one":
        teacher[0] = -INF
    divergence(agree, student.requires_grad_(), teacher.requires_grad_(), reduction="none", beta=beta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(agree, dtype):
    student, teacher = (t.detach().to(dtype).requires_grad_() for t in logits(3, 20))
    divergence(agree, student, teacher, temperature=0.7, beta=0.25)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("detach_teacher", [False, True])
def test_bottleneck(agree, labels, temperature, detach_teacher):
    flags = {"temperature": temperature, "detach_teacher": detach_teacher, "kl_weight": 0.7, "ce_weight": 1.3}
    bottleneck(agree, *logits(6, 10), torch.arange(6) if labels else None, **flags)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0)])
def test_weights_of_zero(agree, weights):
    bottleneck(agree, *logits(3, 5), torch.arange(3), kl_weight=weights[0], ce_weight=weights[1])


def test_bottleneck_with_classes_left_out(agree):
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True, False, True, True]])
    bottleneck(agree, *logits(3, 4), torch.tensor([1, 0, 2]), mask)


def test_any_strides(agree):
    fused, behind = (t.detach() for t in logits(6, 10))
    bottleneck(
        agree,
        fused[::2, ::3].requires_grad_(),
        behind.t()[:4, :3].t().requires_grad_(),
        torch.tensor([1, 0, 3]),
    )


def test_labels_outside_give_nan(triton_device):
    fused, behind = (t.detach().to(triton_device) for t in logits(2, 3))
    loss = iumad_kernels.kl_bottleneck(fused, behind, torch.tensor([0, 3], device=triton_device))
    assert loss.total.isnan()
    assert loss.kl.isfinite()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_two_linear_heads(agree, beta):
    """fused_linear_kl: torch's matrix products around these kernels, three rows at a time."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "features_t": (7, 6),
        "weight_t": (20, 6),
        "features_s": (7, 4),
        "weight_s": (20, 4),
        "bias_s": (20,),
    }
    given = {name: torch.randn(*shape, generator=g).requires_grad_() for name, shape in shapes.items()}

    def expected(features_t, weight_t, features_s, weight_s, bias_s):
        logits = features_s @ weight_s.t() + bias_s, features_t @ weight_t.t()
        return reference.kl_divergence(*logits, temperature=2.0, beta=beta)

    fused = functools.partial(iumad_kernels.fused_linear_kl, temperature=2.0, beta=beta, chunk_rows=3)
    agree(fused, expected, **given)


def test_opcheck(triton_device):
    p, q = (t.detach().to(triton_device).requires_grad_() for t in logits(3, 4))
    labels = torch.tensor([0, 1, 3], device=triton_device)
    torch.library.opcheck(torch.ops.iumad.kl_divergence, (p, q, None, 1.0, 0.0, 3, True))
    torch.library.opcheck(torch.ops.iumad.kl_bottleneck, (p, q, labels, None, 1.0, 1.0, 1.0, True, True))
