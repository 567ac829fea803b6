"""Triton's variational bottleneck, through the public function, against the float64 definition; the noise must be the CPU's."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import iumad_kernels
from iumad_kernels import reference, triton

FLAGS = {"seed": 2**63 + 12345, "prior": (0.3, 1.7)}  # a seed with the highest bit set


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mu, logvar = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    return mu.requires_grad_(), logvar.requires_grad_()


def compare(agree, mu: Tensor, logvar: Tensor) -> None:
    agree(
        functools.partial(iumad_kernels.gaussian_bottleneck, **FLAGS),
        functools.partial(reference.gaussian_bottleneck, **FLAGS),
        mu=mu,
        logvar=logvar,
    )


@pytest.mark.parametrize("shape", [(5, 130), (3, 2, 64), (7,), (2, 1), (1, 2100), (0, 4), (3, 0)], ids=str)
def test_shapes(agree, shape):
    compare(agree, *inputs(*shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(agree, dtype):
    compare(agree, *inputs(3, 70, dtype=dtype))


def test_mixed_dtypes(agree):
    mu, logvar = inputs(3, 70)
    compare(agree, mu.detach().bfloat16().requires_grad_(), logvar)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_any_strides(agree, layout):
    mu, logvar = (t.detach() for t in inputs(2, 6, 70))
    change = {
        "sliced": lambda t: t[:, ::2, 3:65:3],
        "transposed": lambda t: t.transpose(1, 2),
        "expanded": lambda t: t[:, :1].expand(2, 6, 70),
    }[layout]
    compare(agree, change(mu).requires_grad_(), change(logvar).requires_grad_())


def test_the_noise_is_the_definitions(triton_device):
    """20 000 normals, each to float32's rounding: also where -log u is tiny and where it is largest."""
    zeros = torch.zeros(20, 1000, device=triton_device)
    eps, _ = iumad_kernels.gaussian_bottleneck(zeros, zeros, seed=-5)
    want = reference.philox.normals(-5, (20, 1000), torch.device("cpu"))
    assert (eps.double().cpu() - want).abs().max() < 1e-6


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_result(triton_device, output):
    found = []
    for function, dtype in (
        (iumad_kernels.gaussian_bottleneck, torch.float32),
        (reference.gaussian_bottleneck, torch.float64),
    ):
        leaves = [t.detach().to(triton_device, dtype).requires_grad_() for t in inputs(3, 20)]
        found.append(torch.autograd.grad(function(*leaves, **FLAGS)[output].square().sum(), leaves))
    for got, want in zip(*found):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_hostile_values(agree):
    mu, logvar = (t.detach() for t in inputs(6, 5))
    mu[0, 1], mu[1, 2] = float("nan"), float("inf")
    logvar[2, 0], logvar[3, 1], logvar[4, 2] = float("nan"), float("inf"), -float("inf")
    compare(agree, mu, logvar)


def test_other_sizes_give_the_same(agree):
    with triton.override("gaussian_bottleneck", BLOCK_R=2, BLOCK_K=16, num_warps=1):
        compare(agree, *inputs(5, 130))


def test_opcheck(triton_device):
    args = (*(t.to(triton_device) for t in inputs(3, 4)), torch.tensor(5, device=triton_device), 0.0, 1.0)
    torch.library.opcheck(torch.ops.iumad.gaussian_bottleneck, args)
