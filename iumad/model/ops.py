"""Plain PyTorch stand-ins with the signatures of `iumad_kernels`, until the kernels are in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: str = "symmetric",
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution of x (B, D, H, W) with weight (D, 1, k, k), and SiLU if asked."""
    assert padding == "symmetric"
    y = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1])
    return F.silu(y) if activation == "silu" else y


class KLBottleneck(NamedTuple):
    """Loss and its parts, scalars."""

    total: Tensor
    kl: Tensor
    fused_ce: Tensor
    bottleneck_ce: Tensor


def kl_bottleneck(
    fused_logits: Tensor,
    bottleneck_logits: Tensor,
    labels: Tensor,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    detach_teacher: bool = True,
) -> KLBottleneck:
    """KL[P(Y|fused) || P(Y|bottleneck)] and the cross-entropy of both heads."""
    teacher = fused_logits.detach() if detach_teacher else fused_logits
    log_teacher, log_student = teacher.log_softmax(-1), bottleneck_logits.log_softmax(-1)
    kl = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    fused_ce, ce = F.cross_entropy(fused_logits, labels), F.cross_entropy(bottleneck_logits, labels)
    return KLBottleneck(kl_weight * kl + ce_weight * (fused_ce + ce), kl, fused_ce, ce)


def anomaly_map(features: Tensor, reference: Tensor, size: int, *, pool: int = 16) -> tuple[Tensor, Tensor]:
    """Distance of (B, C, G, G) features upsampled to (B, size, size), and its largest window mean (B)."""
    distance = torch.linalg.vector_norm(features - reference, dim=1, keepdim=True)
    full = F.interpolate(distance, size=(size, size), mode="bilinear", align_corners=True)
    return full.squeeze(1), F.avg_pool2d(full, pool, stride=1).amax(dim=(1, 2, 3))
