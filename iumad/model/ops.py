"""Plain PyTorch stand-ins with the signatures of `iumad_kernels`, until the kernels are in place."""

from __future__ import annotations

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


def anomaly_map(features: Tensor, reference: Tensor, size: int, *, pool: int = 16) -> tuple[Tensor, Tensor]:
    """Distance of (B, C, G, G) features upsampled to (B, size, size), and its largest window mean (B)."""
    distance = torch.linalg.vector_norm(features - reference, dim=1, keepdim=True)
    full = F.interpolate(distance, size=(size, size), mode="bilinear", align_corners=True)
    return full.squeeze(1), F.avg_pool2d(full, pool, stride=1).amax(dim=(1, 2, 3))
