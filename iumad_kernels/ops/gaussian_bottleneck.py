"""The variational information bottleneck: a reparameterised Gaussian sample and its KL from the prior."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from iumad_kernels import reference
from iumad_kernels.backend import implement, select
from iumad_kernels.ops.checks import check_floating
from iumad_kernels.ops.derivatives import differentiable_op, gradient_op
from iumad_kernels.ops.seeds import check_seed, seed_tensor

implement("gaussian_bottleneck", "cpu")


def gaussian_bottleneck(
    mu: Tensor, logvar: Tensor, *, seed: int | Tensor, prior: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Reparameterised sample of N(mu, exp(logvar)) and its KL divergence from the prior, in one pass.

    ``sample = mu + exp(logvar / 2) eps``, ``kl = 1/2 sum ((exp(logvar) + (mu - m)^2) / s^2 - 1 - logvar + 2 log s)``, in nats.

    Args:
        mu, logvar: (..., dim), same shape, any strides, dtypes may differ.
        seed: names the noise: an int or an int64 scalar tensor (a tensor keeps a compiled graph from being specialised on it).
            eps is a function of seed and position alone (Philox, Box-Muller; iumad_kernels/reference/philox.py), the same for
            every dtype, layout, thread count and backend up to rounding; |eps| < 5.77. Two calls need two seeds.
        prior: mean m and standard deviation s of the prior.

    Returns:
        sample (..., dim) in mu's dtype and layout, and kl (...) in float32 (float64 for float64). Both are differentiable once,
        to mu and logvar.

    Computed in float32 (float64 for float64). For backward mu and logvar are kept; the noise is drawn again. Forward reads both
    once and writes the sample. Raises TypeError or ValueError naming the argument.
    Source: Alemi et al., arXiv 1612.00410, equation 17.

    >>> sample, kl = gaussian_bottleneck(torch.zeros(2, 3), torch.zeros(2, 3), seed=7)
    >>> sample.shape, kl
    (torch.Size([2, 3]), tensor([0., 0.]))
    """
    op = "gaussian_bottleneck"
    for name, t in (("mu", mu), ("logvar", logvar)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    check_floating(op, mu=mu, logvar=logvar)
    if mu.shape != logvar.shape:
        raise ValueError(
            f"{op}: logvar has shape {tuple(logvar.shape)}, expected that of mu, {tuple(mu.shape)}"
        )
    if not 1 <= mu.dim() <= 7:
        raise ValueError(f"{op}: mu has shape {tuple(mu.shape)}, expected (..., dim) of at most 7 dimensions")
    mean, std = prior
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"{op}: prior = {prior}, expected a finite mean and a standard deviation > 0")
    check_seed(op, seed, mu.device)
    if select(op, mu.device) == "reference":
        return reference.gaussian_bottleneck(mu, logvar, seed=seed, prior=prior)
    return _gaussian_bottleneck(mu, logvar, seed_tensor(seed, mu.device), mean, std)


@torch.library.register_fake("iumad::gaussian_bottleneck")
def _fake(
    mu: Tensor, logvar: Tensor, seed: Tensor, prior_mean: float, prior_std: float
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(mu.dtype, torch.float32)
    return torch.empty_like(mu), mu.new_empty(mu.shape[:-1], dtype=compute)


@torch.library.register_fake("iumad::gaussian_bottleneck_backward")
def _fake_backward(
    grad_sample: Tensor | None, grad_kl: Tensor | None, mu: Tensor, logvar: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mu), torch.empty_like(logvar)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mu, logvar, seed, *ctx.prior = inputs
    ctx.save_for_backward(mu, logvar, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_sample: Tensor | None, grad_kl: Tensor | None) -> tuple[Any, ...]:
    gradients = _gradients(grad_sample, grad_kl, *ctx.saved_tensors, *ctx.prior)
    return *gradients, None, None, None


_gradients = gradient_op("gaussian_bottleneck_backward")
_gaussian_bottleneck = differentiable_op(
    torch.ops.iumad.gaussian_bottleneck.default, _setup_context, _backward
)
