"""The definition of every op in plain PyTorch: slow, obvious, any device and floating dtype. All kernels are compared with it."""

from iumad_kernels.reference.cross_attention import cross_attention
from iumad_kernels.reference.gaussian_bottleneck import gaussian_bottleneck
from iumad_kernels.reference.kl_bottleneck import kl_bottleneck, kl_divergence
from iumad_kernels.reference.selective_scan import selective_scan, selective_scan_2d, selective_state_update

__all__ = [
    "cross_attention",
    "gaussian_bottleneck",
    "kl_bottleneck",
    "kl_divergence",
    "selective_scan",
    "selective_scan_2d",
    "selective_state_update",
]
