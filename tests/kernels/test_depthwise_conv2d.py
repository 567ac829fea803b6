"""depthwise_conv2d against its float64 reference, on every instruction set."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import iumad_kernels as ik
from iumad_kernels import _C, nn, reference

ISAS = _C.cpu_isas()
# batch, channels, H, W, kernel, stride, padding
SHAPES = {
    "project": (2, 128, 14, 14, 3, 1, "symmetric"),
    "odd": (3, 35, 37, 9, 5, 1, "symmetric"),
    "stride": (2, 20, 27, 30, 3, 2, "symmetric"),
    "tf_same": (2, 65, 30, 27, 5, 2, "tf_same"),
    "tf_same_wide": (1, 16, 5, 70, 3, 2, "tf_same"),
    "wide_kernel": (1, 7, 12, 33, 7, 1, "tf_same"),
    "kernel_over_image": (2, 5, 2, 3, 9, 2, "symmetric"),
    "pointwise": (1, 130, 6, 5, 1, 2, "symmetric"),
    "pixel": (2, 3, 1, 1, 3, 1, "symmetric"),
}


def rms(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def make(
    name: str, dtype: torch.dtype, layout: str, bias: bool = True
) -> tuple[list[Tensor | None], dict[str, Any]]:
    batch, channels, H, W, kernel, stride, padding = SHAPES[name]
    if layout == "channels_last":
        x = torch.randn(batch, H, W, channels).to(dtype).permute(0, 3, 1, 2)
    elif layout == "contiguous":
        x = torch.randn(batch, channels, H, W).to(dtype)
    elif layout == "sliced":  # a window of a larger channels-last tensor
        x = torch.randn(batch, H + 3, 2 * W, channels + 5).to(dtype).permute(0, 3, 1, 2)[:, 2:-3, 1:-2, ::2]
    elif layout == "transposed":
        x = torch.randn(channels, batch, W, H).to(dtype).permute(1, 0, 3, 2)
    else:
        x = torch.randn(batch, 1, H, 1).to(dtype).expand(batch, channels, H, W)
    weight = torch.randn(channels, 1, kernel, kernel).to(dtype)
    return [x, weight, torch.randn(channels).to(dtype) if bias else None], {
        "stride": stride,
        "padding": padding,
    }


def run(
    op: Any, inputs: list[Tensor | None], grad: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = op(*leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) if grad is None else grad
    return out.detach(), list(
        torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(out.dtype))
    )


def check(inputs: list[Tensor | None], options: dict[str, Any]) -> None:
    wide = [None if t is None else t.double() for t in inputs]
    want, want_grads = run(reference.depthwise_conv2d, wide, None, options)
    got, grads = run(ik.depthwise_conv2d, inputs, None, options)
    assert inputs[0] is not None
    dtype = inputs[0].dtype
    bounds, grad_bounds = 2e-6, [1e-5] * 3
    if dtype != torch.float32:  # what the same computation loses in plain PyTorch at that dtype
        weight, bias = inputs[1:]
        assert weight is not None
        plain, plain_grads = run(reference.depthwise_conv2d, inputs, None, options)
        bounds = 2 * rms(plain, want)
        grad_bounds = [3 * rms(p, w) for p, w in zip(plain_grads, want_grads)]
    assert got.dtype == dtype
    assert rms(got, want) <= bounds
    for name, g, w, bound in zip(("x", "weight", "bias"), grads, want_grads, grad_bounds):
        assert g.shape == w.shape
        assert rms(g, w) <= bound, f"gradient of {name}"


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("name", SHAPES)
def test_reference(name: str, layout: str, activation: str | None, isa: str) -> None:
    inputs, options = make(name, torch.float32, layout, bias=activation is not None)
    check(inputs, options | {"activation": activation})


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_half(layout: str, dtype: torch.dtype, isa: str) -> None:
    inputs, options = make("odd", dtype, layout)
    check(inputs, options | {"activation": "silu"})


def test_mixed_dtypes() -> None:
    (x, weight, bias), options = make("odd", torch.float32, "channels_last")
    assert x is not None
    check([x.bfloat16(), weight, bias], options)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_any_strides(layout: str, isa: str) -> None:
    for name in ("odd", "tf_same"):
        inputs, options = make(name, torch.float32, layout)
        x, weight, bias = inputs
        if layout == "sliced":
            assert x is not None
            weight = torch.randn(x.shape[1], 1, 3, 3).transpose(2, 3)
            bias = torch.randn(2 * x.shape[1])[::2]
        check([x, weight, bias], options | {"activation": "silu"})


def test_gradient_of_any_strides() -> None:
    (x, weight, bias), options = make("odd", torch.float32, "channels_last")
    assert x is not None
    want = run(ik.depthwise_conv2d, [x, weight, bias], torch.ones(x.shape), options)
    for grad in (
        torch.ones(()).expand(x.shape),
        torch.ones(x.shape).transpose(2, 3).contiguous().transpose(2, 3),
    ):
        got = run(ik.depthwise_conv2d, [x, weight, bias], grad, options)
        assert all(torch.equal(a, b) for a, b in zip(got[1], want[1]))


def test_layout_of_the_result() -> None:
    for layout, stride in itertools.product(("channels_last", "contiguous"), (1, 2)):
        (x, weight, bias), _ = make("project", torch.float32, layout)
        assert x is not None
        out = ik.depthwise_conv2d(x, weight, bias, stride=stride)
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert out.is_contiguous(memory_format=memory_format)


def test_matches_torch_modules() -> None:
    """What a PyTorch model computes: an oracle without our own reference."""
    conv = torch.nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=24)
    x = torch.randn(2, 24, 15, 18)
    got = ik.depthwise_conv2d(x, conv.weight, conv.bias, stride=2, activation="silu")
    assert rms(got, F.silu(conv(x))) < 1e-6


def test_tf_same_padding_by_hand() -> None:
    """TensorFlow's SAME for 4 pixels, k 3, stride 2: one zero after the last pixel, none before."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0] = torch.tensor([1.0, 10.0, 100.0])
    got = ik.depthwise_conv2d(x, weight, stride=2, padding="tf_same")
    assert got[0, 0, 0].tolist() == [321.0, 43.0]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_hostile_values(isa: str) -> None:
    """inf and NaN reach exactly the results they reach in the reference."""
    for value, activation in itertools.product((torch.inf, -torch.inf, torch.nan, 1e30), (None, "silu")):
        (x, weight, bias), options = make("odd", torch.float32, "channels_last")
        assert x is not None
        x = x.clone()
        x[1, 3, 20, 4] = value
        got, grads = run(ik.depthwise_conv2d, [x, weight, bias], None, options | {"activation": activation})
        want, want_grads = run(
            reference.depthwise_conv2d, [x, weight, bias], None, options | {"activation": activation}
        )
        for g, w in zip((got, *grads), (want, *want_grads)):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.usefixtures("fresh_nan")
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("name", ["project", "tf_same", "kernel_over_image"])
def test_same_bits(name: str, isa: str) -> None:
    """On every run, for any number of threads, whatever uninitialised memory holds."""
    results = []
    for threads in (1, 2, 2):
        inputs, options = make(name, torch.float32, "channels_last")
        torch.manual_seed(0)
        inputs = [None if t is None else torch.randn_like(t) for t in inputs]
        torch.set_num_threads(threads)
        try:
            out, grads = run(ik.depthwise_conv2d, inputs, None, options | {"activation": "silu"})
        finally:
            torch.set_num_threads(1)
        results.append([out, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_size_zero(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[1], 1, 3, 3, requires_grad=True)
    bias = torch.randn(shape[1], requires_grad=True)
    out = ik.depthwise_conv2d(x, weight, bias, stride=2, activation="silu")
    assert out.shape == (*shape[:2], -(-shape[2] // 2), -(-shape[3] // 2))
    out.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    assert not weight.grad.any()
    assert not bias.grad.any()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_gradcheck(kernel: int, activation: str | None, stride: int) -> None:
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: ik.depthwise_conv2d(*t, stride=stride, padding="tf_same", activation=activation),
        (x, weight, bias),
    )


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "sliced"])
def test_opcheck(layout: str) -> None:
    (x, weight, bias), _ = make("odd", torch.float32, layout)
    assert x is not None
    weight, bias = torch.randn(x.shape[1], 1, 5, 5), torch.randn(x.shape[1])
    for given in (bias, None):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, given)]
        torch.library.opcheck(
            torch.ops.iumad.depthwise_conv2d.default,
            (*leaves, None, None, 1, 2, 2, True),
            raise_exception=True,
        )


def test_compile() -> None:
    (x, weight, bias), options = make("stride", torch.float32, "channels_last")

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ik.depthwise_conv2d(x * 2, weight, bias, **options, activation="silu") + 1

    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), f(*leaves)
    assert torch.equal(got, want)
    for g, w in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)):
        assert torch.equal(g, w)


def test_autocast_changes_nothing() -> None:
    inputs, options = make("stride", torch.float32, "channels_last")
    with torch.autocast("cpu", torch.bfloat16):
        got = ik.depthwise_conv2d(*inputs, **options)
    assert torch.equal(got, ik.depthwise_conv2d(*inputs, **options))


def test_reference_backend() -> None:
    inputs, options = make("stride", torch.float32, "channels_last")
    with ik.backend("reference"):
        got = ik.depthwise_conv2d(*inputs, **options)
    assert torch.equal(got, reference.depthwise_conv2d(*inputs, **options))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": torch.zeros(3, 4, 4)},
            ValueError,
            r"x has shape \(3, 4, 4\), expected .*batch, channels, H, W",
        ),
        ({"weight": torch.zeros(3, 3, 3)}, ValueError, r"weight has shape \(3, 3, 3\)"),
        ({"weight": torch.zeros(2, 1, 3, 3)}, ValueError, r"weight has shape \(2, 1, 3, 3\)"),
        ({"weight": torch.zeros(3, 1, 4, 4)}, ValueError, r"weight has shape \(3, 1, 4, 4\).*k odd"),
        ({"weight": torch.zeros(3, 1, 3, 5)}, ValueError, r"weight has shape \(3, 1, 3, 5\)"),
        ({"weight": torch.zeros(3, 1, 3, 3).double()}, TypeError, "weight has dtype torch.float64"),
        ({"weight": torch.zeros(3, 1, 3, 3).int()}, TypeError, "weight has dtype torch.int32"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\)"),
        ({"stride": 3}, ValueError, "stride = 3, expected 1 or 2"),
        ({"padding": "same"}, ValueError, "padding = 'same', expected one of 'symmetric', 'tf_same'"),
        ({"activation": "relu"}, ValueError, "activation = 'relu'"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 3, 4, 4),
        "weight": torch.zeros(3, 1, 3, 3),
        "bias": None,
    }
    with pytest.raises(error, match=message):
        ik.depthwise_conv2d(**(arguments | changes))


def test_module() -> None:
    module = nn.DepthwiseConv2d(8, 5, stride=2, padding="tf_same", activation="silu")
    x = torch.randn(2, 8, 9, 10)
    want = reference.depthwise_conv2d(
        x, module.weight, module.bias, stride=2, padding="tf_same", activation="silu"
    )
    assert rms(module(x), want) < 2e-6
    twin = torch.nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8)
    module.load_state_dict(twin.state_dict())
    module.padding = "symmetric"
    assert rms(module(x), F.silu(twin(x))) < 2e-6
    with pytest.raises(ValueError, match="kernel_size = 4"):
        nn.DepthwiseConv2d(8, 4)
