"""Plain PyTorch stand-ins with the signatures of `iumad_kernels`, until the kernels are in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Mamba's recurrence; u, delta (B, D, L), A (D, N), B, C (B, G, N, L), D and delta_bias (D)."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    groups = B.shape[1]
    u_t, delta_t, B_t, C_t = (x.movedim(-1, 0).contiguous() for x in (u, delta, B, C))
    state = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype, device=u.device)
    outputs = []
    for u_BD, delta_BD, B_BGN, C_BGN in zip(*(x.unbind(0) for x in (u_t, delta_t, B_t, C_t))):
        drive = (delta_BD * u_BD).unflatten(1, (groups, -1)).unsqueeze(-1) * B_BGN.unsqueeze(2)
        state = torch.exp(delta_BD.unsqueeze(-1) * A) * state + drive.flatten(1, 2)
        outputs.append((state.unflatten(1, (groups, -1)) @ C_BGN.unsqueeze(-1)).flatten(1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + u * D[:, None]
    return y if z is None else y * F.silu(z)


def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Scaled dot-product attention of (B, H, L, E) tensors."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p)


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


def kl_bottleneck(
    fused_logits: Tensor,
    bottleneck_logits: Tensor,
    labels: Tensor | None = None,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    detach_teacher: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL[P(Y|fused) || P(Y|bottleneck)] and, with labels, the cross-entropy of both heads."""
    teacher = fused_logits.detach() if detach_teacher else fused_logits
    log_teacher, log_student = teacher.log_softmax(-1), bottleneck_logits.log_softmax(-1)
    parts = {"kl": F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)}
    total = kl_weight * parts["kl"]
    if labels is not None:
        parts["ce"] = F.cross_entropy(fused_logits, labels) + F.cross_entropy(bottleneck_logits, labels)
        total = total + ce_weight * parts["ce"]
    return total, parts


def anomaly_map(features: Tensor, reference: Tensor, size: int, *, pool: int = 16) -> tuple[Tensor, Tensor]:
    """Distance of (B, C, G, G) features upsampled to (B, size, size), and its largest window mean (B)."""
    distance = torch.linalg.vector_norm(features - reference, dim=1, keepdim=True)
    full = F.interpolate(distance, size=(size, size), mode="bilinear", align_corners=True)
    return full.squeeze(1), F.avg_pool2d(full, pool, stride=1).amax(dim=(1, 2, 3))
