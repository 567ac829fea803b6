"""gaussian_bottleneck against the reference, torch.distributions, and the statistics of its noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as divergence

import iumad_kernels
from iumad_kernels import _C, gaussian_bottleneck, reference
from iumad_kernels.reference.philox import normals

every_isa = pytest.mark.parametrize("isa", _C.cpu_isas(), indirect=True)
SEED = 2**63 + 12345  # more than an int64 holds
PRIOR = (0.3, 1.7)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype).requires_grad_()


def rms_error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / (expected.double().norm() or 1.0)).item()


def results(function, mu: Tensor, logvar: Tensor) -> list[Tensor]:
    """Sample, KL, and the gradients of a weighted sum of both."""
    sample, kl = function(mu, logvar, seed=SEED, prior=PRIOR)
    weights = (torch.arange(sample.numel()) % 7 - 3).view(sample.shape) / 4  # exact in every dtype
    row_weights = torch.linspace(0.5, 1.5, kl.numel(), dtype=torch.float64).view(kl.shape)
    loss = (sample * weights).sum() + (kl * row_weights).sum()
    return [sample, kl, *torch.autograd.grad(loss, (mu, logvar))]


def test_reference_is_torch_distributions():
    mu, logvar = (t.double() for t in inputs(5, 130))
    sample, kl = reference.gaussian_bottleneck(mu, logvar, seed=SEED, prior=PRIOR)
    expected = divergence(Normal(mu, (logvar / 2).exp()), Normal(*PRIOR)).sum(-1)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(sample, mu + (logvar / 2).exp() * normals(SEED, (5, 130), mu.device))


def test_noise_is_standard_normal():
    from scipy import stats

    eps, _ = gaussian_bottleneck(torch.zeros(500, 640), torch.zeros(500, 640), seed=3)
    assert stats.kstest(eps.double().flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(eps.double().flatten().numpy())) < 0.03
    assert abs(torch.corrcoef(eps[:, :64].double().t()).fill_diagonal_(0)).max() < 0.25
    other, _ = gaussian_bottleneck(torch.zeros(500, 640), torch.zeros(500, 640), seed=4)
    assert abs(torch.corrcoef(torch.stack((eps.flatten(), other.flatten())))[0, 1]) < 0.01


@every_isa
@pytest.mark.parametrize("shape", [(5, 130), (3, 2, 64), (7,), (2, 1), (1, 3000)], ids=str)
def test_values_and_gradients(isa, shape):
    mu, logvar = inputs(*shape)
    twins = [t.detach().double().requires_grad_() for t in (mu, logvar)]
    expected = results(reference.gaussian_bottleneck, *twins)
    for got, want in zip(results(gaussian_bottleneck, mu, logvar), expected):
        assert rms_error(got, want) <= 2e-6
    for got, want in zip(results(gaussian_bottleneck, *twins), expected):
        assert rms_error(got, want) <= 1e-13


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(isa, dtype):
    mu, logvar = inputs(5, 130, dtype=dtype)
    twins = [t.detach().double().requires_grad_() for t in (mu, logvar)]
    got, expected = results(gaussian_bottleneck, mu, logvar), results(reference.gaussian_bottleneck, *twins)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype, dtype]
    for out, want in zip(got, expected):
        assert rms_error(out, want) <= 1.01 * rms_error(want.to(out.dtype), want) + 2e-6


def test_strides_threads_and_seeds_as_tensors_change_nothing():
    mu, logvar = (t.detach() for t in inputs(300, 70))
    sample, kl = gaussian_bottleneck(mu, logvar, seed=SEED)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            again, kl_again = gaussian_bottleneck(mu.t().contiguous().t(), logvar, seed=SEED)
            assert torch.equal(sample, again)
            assert torch.equal(kl, kl_again)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sample, gaussian_bottleneck(mu, logvar, seed=torch.tensor(SEED - 2**64))[0])
    assert not torch.equal(sample, gaussian_bottleneck(mu, logvar, seed=SEED + 1)[0])


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)], ids=str)
def test_size_zero(shape):
    mu, logvar = inputs(*shape)
    sample, kl = gaussian_bottleneck(mu, logvar, seed=1)
    assert sample.shape == shape
    assert torch.equal(kl, torch.zeros(shape[0]))
    assert torch.autograd.grad(sample.sum() + kl.sum(), mu)[0].shape == shape


@every_isa
def test_hostile_values(isa):
    mu = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [0.0, 0.0], [0.0, 0.0]])
    logvar = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-math.inf, 0.0], [200.0, 0.0]])
    for got, want in zip(
        gaussian_bottleneck(mu, logvar, seed=1), reference.gaussian_bottleneck(mu, logvar, seed=1)
    ):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_only_one_output_used():
    mu, logvar = inputs(4, 6)
    sample, kl = gaussian_bottleneck(mu, logvar, seed=1)
    dmu, dlogvar = torch.autograd.grad(kl.sum(), (mu, logvar), retain_graph=True)
    torch.testing.assert_close(dmu, mu)
    torch.testing.assert_close(dlogvar, (logvar.exp() - 1) / 2)
    torch.testing.assert_close(torch.autograd.grad(sample.sum(), mu)[0], torch.ones(4, 6))


def test_gradcheck():
    mu, logvar = (t.detach().double().requires_grad_() for t in inputs(3, 5))
    assert torch.autograd.gradcheck(
        lambda m, v: gaussian_bottleneck(m, v, seed=SEED, prior=PRIOR), (mu, logvar)
    )


def test_opcheck_and_compile():
    mu, logvar = inputs(3, 5)
    torch.library.opcheck(
        torch.ops.iumad.gaussian_bottleneck.default, (mu, logvar, torch.tensor(7), 0.0, 1.0)
    )

    def loss(mu: Tensor, logvar: Tensor, seed: Tensor) -> Tensor:
        sample, kl = gaussian_bottleneck(mu, logvar, seed=seed)
        return sample.square().sum() + kl.mean()

    compiled = torch.compile(loss, fullgraph=True)
    for seed in (torch.tensor(1), torch.tensor(2)):
        torch.testing.assert_close(compiled(mu, logvar, seed), loss(mu, logvar, seed))


def test_reference_backend():
    mu, logvar = inputs(3, 70)
    with iumad_kernels.backend("reference"):
        expected = gaussian_bottleneck(mu, logvar, seed=9)
    torch.testing.assert_close(gaussian_bottleneck(mu, logvar, seed=9), expected)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"logvar": torch.zeros(3, 4)}, ValueError, "logvar has shape"),
        ({"mu": torch.zeros(3, 5).long()}, TypeError, "mu has dtype torch.int64"),
        ({"mu": None}, TypeError, "mu must be a tensor"),
        ({"prior": (0.0, 0.0)}, ValueError, "prior ="),
        ({"prior": (math.nan, 1.0)}, ValueError, "prior ="),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, TypeError, "seed must be an int"),
    ],
)
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        gaussian_bottleneck(**{"mu": torch.zeros(3, 5), "logvar": torch.zeros(3, 5), "seed": 1, **options})
