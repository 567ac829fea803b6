"""What every op promises alike: no second derivatives; autocast, vmap and torch.jit.trace work; shapes are known without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import iumad_kernels as kernels

Op = Callable[..., Any]

_labels = torch.arange(4)
# op: how it is called on its differentiable tensors, and their shapes.
OPS: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "selective_scan": (kernels.selective_scan, [(2, 4, 6), (2, 4, 6), (4, 3), (2, 3, 6), (2, 3, 6)]),
    "selective_scan_2d": (
        lambda u, delta, A, B, C: kernels.selective_scan_2d(u, delta, A, B, C, scheme="row"),
        [(2, 4, 3, 5), (2, 1, 4, 3, 5), (1, 4, 3), (2, 1, 3, 3, 5), (2, 1, 3, 3, 5)],
    ),
    "cross_attention": (kernels.cross_attention, [(1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8)]),
    "cross_attention, mask": (
        lambda q, k, v, mask: kernels.cross_attention(q, k, v, mask, need_weights=True),
        [(1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8), (5, 6)],
    ),
    "kl_divergence": (kernels.kl_divergence, [(4, 5), (4, 5)]),
    "kl_divergence, weighted": (lambda p, q: 0.5 * kernels.kl_divergence(p, q), [(4, 5), (4, 5)]),
    "kl_divergence, by row": (
        lambda p, q: kernels.kl_divergence(p, q, reduction="none"),
        [(4, 5), (4, 5)],
    ),
    "kl_bottleneck": (lambda p, q: kernels.kl_bottleneck(p, q, _labels).total, [(4, 5), (4, 5)]),
    "kl_bottleneck, one part": (lambda p, q: kernels.kl_bottleneck(p, q, _labels).ce, [(4, 5), (4, 5)]),
    "fused_linear_kl": (kernels.fused_linear_kl, [(4, 5), (6, 5), (4, 5), (6, 5)]),
    "gaussian_bottleneck": (
        lambda mu, logvar: kernels.gaussian_bottleneck(mu, logvar, seed=1),
        [(4, 5), (4, 5)],
    ),
    "depthwise_conv2d": (
        lambda x, w, b: kernels.depthwise_conv2d(x, w, b, activation="silu"),
        [(2, 3, 4, 4), (3, 1, 3, 3), (3,)],
    ),
    "causal_conv1d": (
        lambda x, w, b: kernels.causal_conv1d(x, w, b, activation="silu"),
        [(2, 3, 7), (3, 3), (3,)],
    ),
    "anomaly_map": (
        lambda f, r: kernels.anomaly_map(f, r, 9, pool=3),
        [(2, 3, 4, 4), (2, 3, 4, 4)],
    ),
}

every_op = pytest.mark.parametrize("name", OPS)


def leaves(name: str, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator).to(device).requires_grad_() for s in OPS[name][1]]


def total(result: Any) -> Tensor:
    return result.square().sum() if isinstance(result, Tensor) else sum(r.square().sum() for r in result)


@every_op
def test_second_derivatives_are_refused_in_a_sentence(name: str) -> None:
    """Not zeros, not None: whichever way they are asked for, and from the gradient of each tensor alone."""
    tensors = leaves(name)
    for i in range(len(tensors)):
        gradients = torch.autograd.grad(total(OPS[name][0](*tensors)), tensors, create_graph=True)
        with pytest.raises(
            RuntimeError, match=r'no derivative of its own: .*iumad_kernels.backend\("reference"\)'
        ):
            torch.autograd.grad(gradients[i].square().sum(), tensors, allow_unused=True)


@every_op
def test_second_derivatives_of_the_reference(name: str) -> None:
    """What the message advises works."""
    tensors = [t.detach().double().requires_grad_() for t in leaves(name)]
    with kernels.backend("reference"):
        gradients = torch.autograd.grad(total(OPS[name][0](*tensors)), tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)
    assert all(g.isfinite().all() for g in second)
    assert any(g.abs().max() > 0 for g in second)


@every_op
def test_create_graph_gives_the_same_gradients(name: str) -> None:
    tensors = leaves(name)
    plain = torch.autograd.grad(total(OPS[name][0](*tensors)), tensors)
    graph = torch.autograd.grad(total(OPS[name][0](*tensors)), tensors, create_graph=True)
    for a, b in zip(plain, graph):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


@every_op
def test_autocast(name: str) -> None:
    """Under autocast gradients keep the dtype of their tensor, and the values are those of float32 up to bfloat16."""
    tensors = leaves(name)
    want = total(OPS[name][0](*tensors))
    with torch.autocast("cpu", torch.bfloat16):
        got = total(OPS[name][0](*tensors))
    torch.testing.assert_close(got.float(), want, rtol=5e-2, atol=5e-2)
    for t, gradient in zip(tensors, torch.autograd.grad(got, tensors)):
        assert gradient.dtype == t.dtype
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", sorted(OPS.keys() - {"fused_linear_kl"}))
def test_vmap(name: str) -> None:
    """Mapped calls get the gradients of a loop over them (not fused_linear_kl: its op returns a list, which torch cannot map)."""
    stacked = [torch.stack([t, 0.5 * t]).detach().requires_grad_() for t in leaves(name)]
    mapped = total(torch.vmap(OPS[name][0])(*stacked))
    looped = sum(total(OPS[name][0](*(t[i] for t in stacked))) for i in range(2))
    torch.testing.assert_close(mapped, looped)
    for a, b in zip(torch.autograd.grad(mapped, stacked), torch.autograd.grad(looped, stacked)):
        torch.testing.assert_close(a, b)


@every_op
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_trace_holds_the_op(name: str) -> None:
    """torch.jit.trace, and what exports by it, records ops of torch.ops.iumad although the tensors require gradients."""
    # Not checked against a second trace: that is made without gradients, and flags tell an op whether to keep what they read.
    traced = torch.jit.trace(OPS[name][0], tuple(leaves(name)), check_trace=False)
    assert "iumad::" in str(traced.graph)
    torch.testing.assert_close(total(traced(*leaves(name))), total(OPS[name][0](*leaves(name))))


@every_op
def test_shapes_without_data(name: str) -> None:
    """Fake tensors give the shapes, dtypes and strides of the real results."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    want = OPS[name][0](*leaves(name))
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the labels
    fake = [mode.from_tensor(t) for t in leaves(name)]
    with mode:
        got = OPS[name][0](*fake)
    pairs = [(got, want)] if isinstance(want, Tensor) else list(zip(got, want))
    for a, b in pairs:
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_autocast_takes_features_that_it_has_cast_beside_weights_that_it_has_not() -> None:
    features_t, weight_t, features_s, weight_s = leaves("fused_linear_kl")
    with torch.autocast("cpu", torch.bfloat16):
        loss = kernels.fused_linear_kl(features_t.bfloat16(), weight_t, features_s, weight_s)
    torch.testing.assert_close(
        loss, kernels.fused_linear_kl(features_t, weight_t, features_s, weight_s), rtol=5e-2, atol=5e-2
    )
