"""Triton's depthwise and causal convolutions, through the public functions, against the float64 definition."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import iumad_kernels
from iumad_kernels import reference, triton

# batch, channels, H, W, kernel, stride, padding
SHAPES = {
    "small": (2, 5, 6, 7, 3, 1, "symmetric"),
    "many_channels": (1, 70, 5, 4, 3, 2, "symmetric"),
    "many_pixels": (1, 2, 19, 57, 3, 1, "symmetric"),
    "tf_same": (2, 3, 8, 9, 5, 2, "tf_same"),
    "kernel_over_image": (1, 4, 2, 3, 9, 2, "symmetric"),  # 81 taps: two blocks of them
    "pointwise": (1, 6, 3, 5, 1, 2, "symmetric"),
    "pixel": (1, 3, 1, 1, 3, 1, "symmetric"),
    "no_images": (0, 3, 4, 4, 3, 1, "symmetric"),
}


def tensors(name: str, layout: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    batch, channels, H, W, kernel, *_ = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if layout == "channels_last":
        x = noise(batch, H, W, channels).permute(0, 3, 1, 2)
    elif layout == "sliced":
        x = noise(batch, H + 3, 2 * W, channels + 5).permute(0, 3, 1, 2)[:, 2:-3, 1:-2, ::2]
    elif layout == "transposed":
        x = noise(channels, batch, W, H).permute(1, 0, 3, 2)
    else:
        x = noise(batch, channels, H, W)
    weight, bias = noise(channels, 1, kernel, kernel).transpose(2, 3), noise(2 * channels)[::2]
    return {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}


def compare(agree, op: str, given: dict[str, Any], **flags: Any) -> None:
    agree(
        functools.partial(getattr(iumad_kernels, op), **flags),
        functools.partial(getattr(reference, op), **flags),
        **given,
    )


def compare_grid(agree, name: str, given: dict[str, Any], activation: str | None = "silu") -> None:
    stride, padding = SHAPES[name][5:]
    compare(agree, "depthwise_conv2d", given, stride=stride, padding=padding, activation=activation)


@pytest.mark.parametrize(("layout", "activation"), [("channels_last", "silu"), ("contiguous", None)])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(agree, name, layout, activation):
    given = tensors(name, layout)
    compare_grid(agree, name, given if activation else given | {"bias": None}, activation)


@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (2, 3, 0, 4)])
def test_size_zero(triton_device, shape):
    """Which torch's own convolution, the definition's, does not know."""
    leaves = [
        torch.randn(*s, device=triton_device).requires_grad_()
        for s in (shape, (shape[1], 1, 3, 3), shape[1:2])
    ]
    out = iumad_kernels.depthwise_conv2d(*leaves, stride=2, activation="silu")
    assert out.shape == (*shape[:2], shape[2] // 2, 2)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, leaves))


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_any_strides(agree, layout):
    compare_grid(agree, "small", tensors("small", layout) if layout == "transposed" else sliced())


def sliced() -> dict[str, Tensor]:
    given = {k: t.detach() for k, t in tensors("small", "sliced").items()}
    channels = given["x"].shape[1]
    given["weight"], given["bias"] = given["weight"][:channels], given["bias"][:channels]
    return {k: t.requires_grad_() for k, t in given.items()}


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(agree, dtype, layout):
    compare_grid(agree, "small", tensors("small", layout, dtype))


def test_mixed_dtypes(agree):
    given = tensors("small", "channels_last")
    compare_grid(agree, "small", given | {"x": given["x"].detach().bfloat16().requires_grad_()})


def test_hostile_values(agree):
    given = {k: t.detach() for k, t in tensors("small", "contiguous").items()}
    for place, value in enumerate((float("nan"), float("inf"), -float("inf"), 1e30)):
        given["x"][0, place, 3, 4] = value
    compare_grid(agree, "small", given)


def sequence(
    batch: int,
    dim: int,
    length: int,
    width: int,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, dim, length) if layout == "contiguous" else (batch, length, dim)
    x = torch.randn(*shape, generator=generator).to(dtype)
    x = x if layout == "contiguous" else x.transpose(1, 2)
    weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((dim, width), (dim,)))
    return {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}


def states(given: dict[str, Any]) -> Tensor:
    (batch, dim, _), width = given["x"].shape, given["weight"].shape[1]
    return torch.randn(batch, dim, width - 1, generator=torch.Generator().manual_seed(2)).requires_grad_()


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("length", "width"), [(9, 4), (1, 3), (2, 4), (70, 2), (5, 1), (3, 7)])
def test_causal(agree, length, width, layout, with_states):
    given = sequence(2, 5, length, width, layout)
    if with_states and width > 1:
        given["initial_states"] = states(given)
    compare(
        agree, "causal_conv1d", given, activation="silu" if length % 2 else None, return_final_states=True
    )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_packed_sequences(agree, layout, activation):
    given = sequence(2, 5, 12, 4, layout)
    given["seq_idx"] = torch.tensor([[0] * 5 + [1] * 2 + [2] * 5, [-1] * 3 + [0] * 7 + [-1] * 2])
    compare(agree, "causal_conv1d", given, activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_causal_dtypes(agree, dtype):
    given = sequence(1, 5, 19, 4, "channels_last", dtype)
    given["initial_states"] = states(given).detach().to(dtype).requires_grad_()
    compare(agree, "causal_conv1d", given, activation="silu")


def test_same_bits_twice(triton_device):
    given = [
        t.detach().to(triton_device).requires_grad_()
        for t in tensors("many_channels", "channels_last").values()
    ]
    first, second = (
        torch.autograd.grad(iumad_kernels.depthwise_conv2d(*given, activation="silu").square().sum(), given)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_other_sizes_give_the_same(agree):
    with (
        triton.override("depthwise_conv2d", BLOCK_P=16, BLOCK_C=4),
        triton.override("depthwise_conv2d_backward", BLOCK_P=16, BLOCK_C=4, num_warps=1),
    ):
        compare_grid(agree, "small", tensors("small", "channels_last"))


def test_opcheck(triton_device):
    given = {
        k: t.detach().to(triton_device).requires_grad_() for k, t in tensors("small", "channels_last").items()
    }
    torch.library.opcheck(torch.ops.iumad.depthwise_conv2d, (*given.values(), None, None, 1, 1, 1, True))
    row = {k: t.detach().to(triton_device).requires_grad_() for k, t in sequence(2, 3, 5, 4).items()}
    x, weight, bias = row["x"].unsqueeze(2), row["weight"][:, None, None], row["bias"]
    before = torch.randn(2, 3, 1, 3, device=triton_device).requires_grad_()
    torch.library.opcheck(torch.ops.iumad.depthwise_conv2d, (x, weight, bias, before, None, 1, 0, 3, True))
