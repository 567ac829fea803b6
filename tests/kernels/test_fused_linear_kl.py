"""fused_linear_kl against kl_divergence of torch's linear layers in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import iumad_kernels
from iumad_kernels import fused_linear_kl, reference


def tensors(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (3, 7)) -> list[Tensor]:
    """features_t, weight_t, bias_t, features_s, weight_s, bias_s for 33 classes; the widths differ."""
    shapes = [(*rows, 12), (33, 12), (33,), (*rows, 8), (33, 8), (33,)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def composed(ft, wt, bt, fs, ws, bs, **options) -> Tensor:
    return reference.kl_divergence(F.linear(fs, ws, bs), F.linear(ft, wt, bt), **options)


def fused(ft, wt, bt, fs, ws, bs, **options) -> Tensor:
    return fused_linear_kl(ft, wt, fs, ws, bias_t=bt, bias_s=bs, **options)


def rms_error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("chunk_rows", [1, 4, 21, None])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_values_and_gradients(chunk_rows, beta, reduction):
    given = tensors()
    twins = [t.detach().double().requires_grad_() for t in given]
    options = {"beta": beta, "reduction": reduction, "temperature": 2.0}
    out, expected = fused(*given, chunk_rows=chunk_rows, **options), composed(*twins, **options)
    assert rms_error(out, expected) <= 2e-6
    for got, want in zip(torch.autograd.grad(3 * out, given), torch.autograd.grad(3 * expected, twins)):
        assert rms_error(got, want) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_torch(dtype):
    given = tensors(dtype)
    plain = [t.detach().requires_grad_() for t in given]
    twins = [t.detach().double().requires_grad_() for t in given]
    out, torch_out, expected = fused(*given, chunk_rows=5), composed(*plain), composed(*twins)
    assert rms_error(out, expected) <= 2 * rms_error(torch_out, expected)
    for got, ordinary, want in zip(
        torch.autograd.grad(out, given),
        torch.autograd.grad(torch_out, plain),
        torch.autograd.grad(expected, twins),
    ):
        assert got.dtype == dtype
        assert rms_error(got, want) <= 3 * rms_error(ordinary, want)


def test_detached_teacher_and_absent_bias():
    ft, wt, bt, fs, ws, bs = given = tensors()
    expected = torch.autograd.grad(fused(*given), (fs, ws, bs))
    fused(*given, detach_teacher=True).backward()
    assert ft.grad is wt.grad is bt.grad is None
    for leaf, want in zip((fs, ws, bs), expected):
        torch.testing.assert_close(leaf.grad, want)
    torch.testing.assert_close(fused_linear_kl(ft, wt, fs, ws), composed(ft, wt, None, fs, ws, None))


def test_strides_and_single_row():
    given = tensors(rows=(5,))
    turned = [t.detach().t().contiguous().t().requires_grad_() if t.dim() == 2 else t for t in given]
    out, expected = fused(*turned, chunk_rows=2), composed(*given)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, turned), torch.autograd.grad(expected, given))
    ft, wt, bt, fs, ws, bs = tensors(rows=())
    torch.testing.assert_close(fused(ft, wt, bt, fs, ws, bs), composed(ft, wt, bt, fs, ws, bs))


def test_no_rows():
    given = tensors(rows=(0,))
    out = fused(*given)
    assert out.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(out, given))


def test_backward_twice_and_same_bits():
    given = tensors()
    out = fused(*given, chunk_rows=4)
    first = torch.autograd.grad(out, given, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, given)):
        assert torch.equal(a, b)
    for a, b in zip(first, torch.autograd.grad(fused(*given, chunk_rows=4), given)):
        assert torch.equal(a, b)


def test_gradcheck():
    given = [t.detach().double().requires_grad_() for t in tensors(rows=(5,))]
    assert torch.autograd.gradcheck(lambda *t: fused(*t, chunk_rows=2, beta=0.3), given)


def test_opcheck_and_compile():
    ft, wt, bt, fs, ws, bs = given = tensors(rows=(5,))
    arguments = (ft, wt, bt, fs.detach(), ws, None, 1.0, 0.0, 0.5, 2, True, True)
    torch.library.opcheck(torch.ops.iumad.fused_linear_kl.default, arguments)
    out = torch.compile(lambda *t: fused(*t, chunk_rows=2), fullgraph=True)(*given)
    torch.testing.assert_close(out, fused(*given))
    torch.testing.assert_close(torch.autograd.grad(out, given), torch.autograd.grad(fused(*given), given))


def test_reference_backend():
    given = tensors()
    with iumad_kernels.backend("reference"):
        expected = fused(*given)
        fused(*given, detach_teacher=True).backward()
    torch.testing.assert_close(fused(*given), expected)
    assert [t.grad is None for t in given] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weight_t": torch.zeros(33, 9)}, ValueError, "weight_t has shape"),
        ({"weight_s": torch.zeros(32, 8)}, ValueError, "weight_s has 32 classes, but weight_t has 33"),
        ({"features_s": torch.zeros(6, 8)}, ValueError, "features_s has rows"),
        ({"features_t": torch.zeros(5, 12).bfloat16()}, TypeError, "weight_t has dtype"),
        ({"features_t": [1.0]}, TypeError, "features_t must be a tensor"),
        ({"bias_s": torch.zeros(8)}, ValueError, "bias_s has shape"),
        ({"temperature": 0.0}, ValueError, "temperature = 0.0"),
        ({"beta": -0.1}, ValueError, "beta = -0.1"),
        ({"reduction": "none"}, ValueError, "reduction = 'none'"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows = 0"),
    ],
)
def test_bad_input(options, error, words):
    ft, wt, _, fs, ws, _ = (t.detach() for t in tensors(rows=(5,)))
    with pytest.raises(error, match=words):
        fused_linear_kl(**{"features_t": ft, "weight_t": wt, "features_s": fs, "weight_s": ws, **options})
