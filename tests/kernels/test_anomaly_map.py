"""anomaly_map against its float64 reference and scipy, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import scipy.ndimage
import torch
from torch import Tensor

import iumad_kernels as ik
from iumad_kernels import _C, nn, reference

ISAS = _C.cpu_isas()
# batch, channels, h, w, size, pool, sigma
SHAPES: dict[str, tuple[int, int, int, int, Any, int, float]] = {
    "project": (3, 272, 14, 14, 224, 16, 0.0),
    "smoothed": (2, 40, 14, 14, 224, 16, 4.0),
    "odd": (2, 17, 5, 9, (37, 53), 7, 0.0),
    "odd_smoothed": (2, 17, 9, 5, (37, 53), 5, 1.3),
    "wide_gaussian": (1, 3, 4, 3, (9, 11), 3, 6.0),  # reaches beyond the mirrored image
    "one_location": (2, 5, 1, 1, 8, 3, 0.0),
    "one_pixel": (2, 5, 6, 7, 1, 1, 0.0),
    "whole_window": (1, 5, 6, 7, (20, 20), 20, 0.0),
    "smaller": (1, 8, 40, 50, (30, 20), 1, 0.0),
    "large": (1, 70, 30, 21, (90, 77), 12, 2.0),
}
LAYOUTS = ("contiguous", "channels_last", "mixed", "sliced", "transposed", "expanded")


def rms(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def make(
    name: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[list[Tensor], dict]:
    batch, channels, h, w, size, pool, sigma = SHAPES[name]

    def grid(layout: str) -> Tensor:
        if layout == "channels_last":
            return torch.randn(batch, h, w, channels).permute(0, 3, 1, 2).to(dtype)
        if layout == "sliced":
            return torch.randn(batch, channels + 1, h + 2, 2 * w).to(dtype)[:, 1:, 1:-1, ::2]
        if layout == "transposed":
            return torch.randn(channels, batch, w, h).to(dtype).permute(1, 0, 3, 2)
        if layout == "expanded":
            return torch.randn(1, 1, h, w).to(dtype).expand(batch, channels, h, w)
        return torch.randn(batch, channels, h, w).to(dtype)

    both = ("contiguous", "channels_last") if layout == "mixed" else (layout, layout)
    return [grid(one) for one in both], {"size": size, "pool": pool, "sigma": sigma}


def run(op: Any, inputs: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = op(*leaves, **options)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    return [out.detach() for out in outputs], list(torch.autograd.grad(outputs, leaves, grads))


def check(inputs: list[Tensor], options: dict[str, Any]) -> None:
    want, want_grads = run(reference.anomaly_map, [t.double() for t in inputs], options)
    got, grads = run(ik.anomaly_map, inputs, options)
    exact = inputs[0].dtype == torch.float32
    plain_grads = run(reference.anomaly_map, inputs, options)[1]
    assert all(out.dtype == torch.float32 for out in got)
    for name, g, w in zip(("map", "score"), got, want):
        assert g.shape == w.shape
        assert rms(g, w) <= 2e-6, name
    for name, g, w, p in zip(("features", "reference"), grads, want_grads, plain_grads):
        assert rms(g, w) <= (1e-5 if exact else 3 * rms(p, w)), f"gradient of {name}"


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("name", SHAPES)
def test_reference(name: str, isa: str) -> None:
    check(*make(name))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("name", ["odd", "large"])
def test_any_strides(name: str, layout: str, isa: str) -> None:
    check(*make(name, layout=layout))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_half(layout: str, dtype: torch.dtype, isa: str) -> None:
    check(*make("large", dtype, layout))


def test_mixed_dtypes() -> None:
    (features, reference_grid), options = make("large")
    check([features.bfloat16(), reference_grid], options)


def test_smoothing_is_scipys() -> None:
    (features, reference_grid), options = make("smoothed")
    sharp, _ = ik.anomaly_map(features, reference_grid, options["size"])
    smooth, score = ik.anomaly_map(features, reference_grid, options["size"], sigma=4.0)
    want = scipy.ndimage.gaussian_filter(sharp.double().numpy(), (0, 4, 4))
    numpy.testing.assert_allclose(smooth, want, rtol=1e-5)
    windows = numpy.lib.stride_tricks.sliding_window_view(want, (16, 16), axis=(1, 2))
    numpy.testing.assert_allclose(score, windows.mean((3, 4)).max((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_ties_go_to_the_first_window(isa: str) -> None:
    """Same-size grids, so the map is the distance; two equal peaks and the zeros around them."""
    features = torch.zeros(1, 1, 20, 40)
    features[0, 0, 4, 30] = features[0, 0, 12, 3] = -2.0
    features.requires_grad_()
    _, score = ik.anomaly_map(features, torch.zeros(1, 1, 20, 40), (20, 40), pool=1)
    (grad,) = torch.autograd.grad(score, features)
    want = torch.zeros(1, 1, 20, 40)
    want[0, 0, 4, 30] = -1.0  # d |x| / dx at the first peak; nothing at the second
    assert score == 2.0
    assert torch.equal(grad, want)


def test_gradient_at_zero_distance_is_zero() -> None:
    features = torch.randn(2, 4, 3, 3).requires_grad_()
    full, score = ik.anomaly_map(features, features.detach().clone(), 16, pool=4)
    (grad,) = torch.autograd.grad(full.sum() + score.sum(), features)
    assert not full.any()
    assert not grad.any()


@pytest.mark.parametrize("part", ["map", "score"])
def test_gradient_of_one_result(part: str) -> None:
    inputs, options = make("large")
    index = ("map", "score").index(part)
    grads = []
    for op, dtype in ((ik.anomaly_map, torch.float32), (reference.anomaly_map, torch.float64)):
        features = inputs[0].to(dtype).requires_grad_()
        grads.append(
            torch.autograd.grad(op(features, inputs[1].to(dtype), **options)[index].sum(), features)[0]
        )
    assert rms(*grads) <= 1e-5


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_hostile_values(value: float, isa: str) -> None:
    """inf and NaN reach the map and score they reach in the reference; other images stay clean."""
    for name in ("project", "odd"):
        inputs, options = make(name)
        inputs[0][1, 3, 2, 3] = value
        got, want = ik.anomaly_map(*inputs, **options), reference.anomaly_map(*inputs, **options)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.usefixtures("fresh_nan")
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits(layout: str, isa: str) -> None:
    """On every run, for any number of threads, whatever uninitialised memory holds."""
    inputs, options = make("large", layout=layout)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        try:
            outputs, grads = run(ik.anomaly_map, inputs, options)
        finally:
            torch.set_num_threads(1)
        results.append([*outputs, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_size_zero(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, requires_grad=True)
    full, score = ik.anomaly_map(features, torch.randn(shape), 16, pool=4)
    assert full.shape == (shape[0], 16, 16)
    assert score.shape == shape[:1]
    assert not full.any()
    (full.sum() + score.sum()).backward()
    assert features.grad is not None


@pytest.mark.parametrize("sigma", [0.0, 1.1])
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_gradcheck(which: tuple[bool, bool], sigma: float) -> None:
    inputs = [torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=needed) for needed in which]
    assert torch.autograd.gradcheck(lambda *t: ik.anomaly_map(*t, (9, 8), pool=3, sigma=sigma), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    inputs, _ = make("odd", layout=layout)
    leaves = [t.clone().requires_grad_() if layout != "expanded" else t for t in inputs]
    torch.library.opcheck(torch.ops.iumad.anomaly_map.default, (*leaves, 37, 53, 7, 1.5))


def test_compile() -> None:
    inputs, options = make("odd")

    def f(features: Tensor, other: Tensor) -> Tensor:
        full, score = ik.anomaly_map(features * 2, other, **options)
        return full.mean() + score.sum()

    leaves = [t.requires_grad_() for t in inputs]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), f(*leaves)
    assert torch.equal(got, want)
    for g, w in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)):
        assert torch.equal(g, w)


def test_reference_backend() -> None:
    inputs, options = make("odd")
    with ik.backend("reference"):
        got = ik.anomaly_map(*inputs, **options)
    assert all(torch.equal(g, w) for g, w in zip(got, reference.anomaly_map(*inputs, **options)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": torch.zeros(3, 4, 4)}, ValueError, r"features has shape \(3, 4, 4\)"),
        ({"reference": torch.zeros(2, 3, 4, 5)}, ValueError, r"reference has shape \(2, 3, 4, 5\), expected"),
        ({"reference": torch.zeros(2, 3, 4, 4).double()}, TypeError, "reference has dtype torch.float64"),
        ({"features": torch.zeros(2, 3, 4, 4).int()}, TypeError, "features has dtype torch.int32"),
        ({"features": torch.zeros(2, 3, 0, 4), "reference": torch.zeros(2, 3, 0, 4)}, ValueError, "h >= 1"),
        ({"size": 0}, ValueError, "size = 0"),
        ({"size": (20, -1)}, ValueError, r"size = \(20, -1\)"),
        ({"pool": 0}, ValueError, "pool = 0, expected 1 <= pool <= 20"),
        ({"pool": 21}, ValueError, "pool = 21, expected 1 <= pool <= 20"),
        ({"sigma": -1.0}, ValueError, "sigma = -1.0"),
        ({"sigma": float("nan")}, ValueError, "sigma = nan"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    grid = torch.zeros(2, 3, 4, 4)
    arguments: dict[str, Any] = {"features": grid, "reference": grid, "size": (20, 30), "pool": 16}
    with pytest.raises(error, match=message):
        ik.anomaly_map(**(arguments | changes))


def test_module() -> None:
    inputs, options = make("odd_smoothed")
    size = options.pop("size")
    got, want = nn.AnomalyMap(size, **options)(*inputs), ik.anomaly_map(*inputs, size, **options)
    assert all(torch.equal(g, w) for g, w in zip(got, want))
