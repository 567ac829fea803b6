"""Divergence of two linear heads, in plain PyTorch: the logits of all rows at once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from iumad_kernels.reference.kl_bottleneck import kl_divergence


def fused_linear_kl(
    features_t: Tensor,
    weight_t: Tensor,
    features_s: Tensor,
    weight_s: Tensor,
    *,
    bias_t: Tensor | None = None,
    bias_s: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.0,
    reduction: str = "batchmean",
    detach_teacher: bool = False,
) -> Tensor:
    """The definition of :func:`iumad_kernels.fused_linear_kl`; same arguments (but for the chunks), shapes and results."""
    return kl_divergence(
        F.linear(features_s, weight_s, bias_s),
        F.linear(features_t, weight_t, bias_t),
        temperature=temperature,
        beta=beta,
        reduction=reduction,
        detach_teacher=detach_teacher,
    )
