"""GPU kernels in Triton for every op. Importing this package does not import Triton; the first call of an op does."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from iumad_kernels.triton.tuning import TUNABLE, override

__all__ = ["LAUNCHERS", "TUNABLE", "available", "launcher", "override", "register"]

# torch op -> module of this package and launcher in it
LAUNCHERS = {
    "selective_scan": ("selective_scan", "forward"),
    "selective_scan_backward": ("selective_scan_backward", "backward"),
    "selective_state_update": ("selective_scan", "update"),
    "cross_attention": ("cross_attention", "forward"),
    "cross_attention_backward": ("cross_attention_backward", "backward"),
    "kl_divergence": ("kl_bottleneck", "divergence"),
    "kl_bottleneck": ("kl_bottleneck", "bottleneck"),
    "kl_bottleneck_backward": ("kl_bottleneck", "backward"),
    "gaussian_bottleneck": ("gaussian_bottleneck", "forward"),
    "gaussian_bottleneck_backward": ("gaussian_bottleneck", "backward"),
    "depthwise_conv2d": ("depthwise_conv2d", "forward"),
    "depthwise_conv2d_backward": ("depthwise_conv2d", "backward"),
    "anomaly_map": ("anomaly_map", "forward"),
    "anomaly_map_backward": ("anomaly_map", "backward"),
}


def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def launcher(op: str) -> Any:
    """The function that runs the torch op ``op`` in Triton; imports Triton."""
    module, function = LAUNCHERS[op]
    return getattr(import_module(f"iumad_kernels.triton.{module}"), function)


def register(
    key: str = "CUDA", *, skip: Collection[str] = (), replace: bool = False
) -> torch.library.Library:
    """Make torch.ops.iumad.* run in Triton for tensors of the dispatch key ``key``, except the ops in ``skip``.

    ``replace`` allows ops that have a kernel for that key already; theirs come back when the returned object is destroyed.
    """
    library = torch.library.Library("iumad", "IMPL")

    def implementation(op: str) -> Any:
        def run(*args: Any) -> Any:
            return launcher(op)(*args)

        return run

    for op in LAUNCHERS:
        if op not in skip:
            library.impl(op, implementation(op), key, allow_override=replace)
    return library
