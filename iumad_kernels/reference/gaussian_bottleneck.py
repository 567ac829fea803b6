"""Variational bottleneck (Alemi et al., arXiv 1612.00410, equation 17) in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iumad_kernels.reference.philox import normals


def gaussian_bottleneck(
    mu: Tensor, logvar: Tensor, *, seed: Tensor | int, prior: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`iumad_kernels.gaussian_bottleneck`; same arguments, shapes and results."""
    dtype, compute = mu.dtype, torch.promote_types(mu.dtype, torch.float32)
    mean, std = prior
    mu, logvar = mu.to(compute), logvar.to(compute)
    eps = normals(seed, tuple(mu.shape), mu.device).to(compute)
    sample = mu + (logvar / 2).exp() * eps
    kl = 0.5 * ((logvar.exp() + (mu - mean) ** 2) / std**2 - 1 - logvar + 2 * math.log(std)).sum(-1)
    return sample.to(dtype), kl
