"""High-performance kernels for vision state-space models and information-bottleneck anomaly detection.

Each function is one op with several backends (C++ on the CPU, CUDA C++, Triton, plain PyTorch); :func:`backend_for`
tells
which one would run and why, :func:`backend` forces one.
"""

import torch as _torch  # noqa: F401  (must be loaded before the compiled part, which resolves its symbols in it)

try:
    from iumad_kernels import _C
except ImportError as error:
    raise ImportError(
        f"iumad_kernels' compiled part does not load into torch {_torch.__version__} ({error}). It is built for torch >= 2.10 by "
        "`pip install .` (or scripts/dev_build in a checkout): run that again in this environment."
    ) from error

from iumad_kernels.backend import backend, backend_for
from iumad_kernels.ops.anomaly_map import anomaly_map
from iumad_kernels.ops.causal_conv1d import causal_conv1d
from iumad_kernels.ops.cross_attention import cross_attention
from iumad_kernels.ops.depthwise_conv2d import depthwise_conv2d
from iumad_kernels.ops.fused_linear_kl import fused_linear_kl
from iumad_kernels.ops.gaussian_bottleneck import gaussian_bottleneck
from iumad_kernels.ops.kl_bottleneck import KLBottleneck, kl_bottleneck, kl_divergence
from iumad_kernels.ops.selective_scan import selective_scan
from iumad_kernels.ops.selective_scan_2d import selective_scan_2d
from iumad_kernels.ops.selective_state_update import selective_state_update
from iumad_kernels.version import __version__

build_info = _C.build_info

__all__ = [
    "KLBottleneck",
    "__version__",
    "anomaly_map",
    "backend",
    "backend_for",
    "build_info",
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
