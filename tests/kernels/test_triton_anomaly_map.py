"""Triton's anomaly map, through the public function, against the float64 definition."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import iumad_kernels
from iumad_kernels import reference, triton

# batch, channels, h, w, size, pool, sigma
SHAPES: dict[str, tuple[int, int, int, int, Any, int, float]] = {
    "odd": (2, 17, 4, 5, (13, 18), 5, 0.0),
    "odd_smoothed": (2, 7, 4, 3, (13, 10), 5, 1.3),
    "many_channels": (1, 70, 2, 3, 8, 4, 0.0),
    "wide_gaussian": (1, 3, 4, 3, (9, 11), 3, 6.0),  # reaches beyond the mirrored image
    "one_location": (2, 5, 1, 1, 8, 3, 0.0),
    "one_pixel": (2, 5, 6, 7, 1, 1, 0.0),
    "whole_window": (1, 5, 6, 7, (20, 20), 20, 0.0),
    "smaller": (1, 4, 9, 11, (4, 5), 1, 0.0),  # most features reach no pixel of the map
    "no_images": (0, 3, 4, 4, 9, 2, 0.0),
    "no_channels": (2, 0, 4, 4, 9, 2, 1.0),
}


def inputs(name: str, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    batch, channels, h, w = SHAPES[name][:4]
    generator = torch.Generator().manual_seed(0)

    def grid() -> Tensor:
        if layout == "channels_last":
            return torch.randn(batch, h, w, channels, generator=generator).permute(0, 3, 1, 2).to(dtype)
        if layout == "sliced":
            return torch.randn(batch, channels + 1, h + 2, 2 * w, generator=generator).to(dtype)[
                :, 1:, 1:-1, ::2
            ]
        if layout == "expanded":
            return torch.randn(1, 1, h, w, generator=generator).to(dtype).expand(batch, channels, h, w)
        return torch.randn(batch, channels, h, w, generator=generator).to(dtype)

    return {"features": grid().requires_grad_(), "reference": grid().requires_grad_()}


def compare(agree, name: str, given: dict[str, Tensor]) -> None:
    size, pool, sigma = SHAPES[name][4:]
    agree(
        functools.partial(iumad_kernels.anomaly_map, size=size, pool=pool, sigma=sigma),
        functools.partial(reference.anomaly_map, size=size, pool=pool, sigma=sigma),
        **given,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(agree, name):
    compare(agree, name, inputs(name))


@pytest.mark.parametrize("name", ["odd", "many_channels"])
def test_channels_last(agree, name):
    compare(agree, name, inputs(name, "channels_last"))


@pytest.mark.parametrize("layout", ["sliced", "expanded"])
def test_any_strides(agree, layout):
    given = inputs("odd", layout)
    compare(agree, "odd", given | {"reference": inputs("odd", "channels_last")["reference"]})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(agree, dtype, layout):
    compare(agree, "odd_smoothed", inputs("odd_smoothed", layout, dtype))


def test_mixed_dtypes(agree):
    given = inputs("odd")
    compare(agree, "odd", given | {"reference": given["reference"].detach().bfloat16().requires_grad_()})


@pytest.mark.parametrize("needed", ["features", "reference"])
@pytest.mark.parametrize("part", [0, 1])
def test_gradient_of_one_result_to_one_input(triton_device, part, needed):
    size, pool, sigma = SHAPES["wide_gaussian"][4:]
    found = []
    for op, dtype, device in (
        (iumad_kernels.anomaly_map, torch.float32, triton_device),
        (reference.anomaly_map, torch.float64, torch.device("cpu")),
    ):
        given = {k: t.detach().to(device, dtype) for k, t in inputs("wide_gaussian").items()}
        given[needed].requires_grad_()
        result = op(**given, size=size, pool=pool, sigma=sigma)[part]
        found.append(torch.autograd.grad(result.square().sum(), given[needed])[0].double().cpu())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [-2.0, float("nan")])
def test_ties_go_to_the_first_window(triton_device, value):
    """Same-size grids, so the map is the distance; two equal peaks in two blocks of windows, and the zeros around them."""
    features = torch.zeros(1, 1, 5, 240, device=triton_device)
    features[0, 0, 0, 7] = 1.5
    features[0, 0, 1, 30] = features[0, 0, 4, 230] = value
    _, score, _, peak = torch.ops.iumad.anomaly_map(features, torch.zeros_like(features), 5, 240, 1, 0.0)
    full, _ = reference.anomaly_map(features.cpu(), torch.zeros(1, 1, 5, 240), (5, 240), pool=1)
    want = full.flatten().max(0)
    torch.testing.assert_close(score.cpu()[0], want.values, equal_nan=True)
    assert peak.item() == want.indices.item()


def test_gradient_at_zero_distance_is_zero(triton_device):
    features = torch.randn(2, 4, 3, 3, device=triton_device).requires_grad_()
    full, score = iumad_kernels.anomaly_map(features, features.detach().clone(), 16, pool=4)
    (grad,) = torch.autograd.grad(full.sum() + score.sum(), features)
    assert not full.any()
    assert not grad.any()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_hostile_values(agree, value):
    given = {k: t.detach() for k, t in inputs("odd").items()}
    given["features"][1, 3, 2, 3] = value
    compare(agree, "odd", given)


def test_same_bits_twice(triton_device):
    given = [t.detach().to(triton_device).requires_grad_() for t in inputs("wide_gaussian").values()]
    runs = []
    for _ in range(2):
        full, score = iumad_kernels.anomaly_map(*given, (13, 18), pool=7, sigma=1.0)
        runs.append([full, score, *torch.autograd.grad(full.square().sum() + score.sum(), given)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_other_sizes_give_the_same(agree):
    with triton.override("anomaly_map", BLOCK_P=8, BLOCK_C=4, num_warps=1):
        compare(agree, "odd", inputs("odd"))


def test_opcheck(triton_device):
    given = [t.detach().to(triton_device).requires_grad_() for t in inputs("wide_gaussian").values()]
    torch.library.opcheck(torch.ops.iumad.anomaly_map, (*given, 9, 8, 4, 1.5))
