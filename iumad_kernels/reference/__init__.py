"""The definition of every op in plain PyTorch: slow, obvious, any device and floating dtype. All kernels are compared with it."""

from iumad_kernels.reference.anomaly_map import anomaly_map
from iumad_kernels.reference.causal_conv1d import causal_conv1d
from iumad_kernels.reference.cross_attention import cross_attention
from iumad_kernels.reference.depthwise_conv2d import depthwise_conv2d
from iumad_kernels.reference.fused_linear_kl import fused_linear_kl
from iumad_kernels.reference.gaussian_bottleneck import gaussian_bottleneck
from iumad_kernels.reference.kl_bottleneck import kl_bottleneck, kl_divergence
from iumad_kernels.reference.selective_scan import selective_scan, selective_scan_2d, selective_state_update

__all__ = [
    "anomaly_map",
    "causal_conv1d",
    "cross_attention",
    "depthwise_conv2d",
    "fused_linear_kl",
    "gaussian_bottleneck",
    "kl_bottleneck",
    "kl_divergence",
    "selective_scan",
    "selective_scan_2d",
    "selective_state_update",
]
