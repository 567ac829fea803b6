"""Which kernels run CUDA tensors: the compiled CUDA library where it was built and fits the GPU, Triton for every other op.

Decided once per process, when the first CUDA tensor arrives (importing the package touches neither CUDA nor Triton).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch

from iumad_kernels import _C, triton

# The torch ops in _cuda.so (csrc/torch/*_cuda.cpp).
CUDA_OPS = frozenset({"selective_scan", "selective_scan_backward", "selective_state_update"})
TRITON_CAPABILITY = 80  # bfloat16 and TF32 products, which the kernels use
REMEDIES = "install Triton (`pip install triton`), or rebuild iumad where nvcc is on the PATH (IUMAD_CUDA=on pip install .)"


class Gpu(NamedTuple):
    """The torch ops each GPU backend runs, and why the others do not (empty where they do)."""

    cuda_ops: frozenset[str]
    triton_ops: frozenset[str]
    cuda_missing: str
    triton_missing: str


@functools.cache
def activate() -> Gpu:
    """Load and register the GPU kernels of this installation."""
    cuda_missing = _load_cuda()
    cuda_ops = frozenset() if cuda_missing else CUDA_OPS
    if not torch.cuda.is_available():
        return Gpu(cuda_ops, frozenset(), cuda_missing, "torch finds no GPU")
    if not triton.available():
        return Gpu(cuda_ops, frozenset(), cuda_missing, f"Triton is not installed: {REMEDIES}")
    if older := _gpu_below(TRITON_CAPABILITY):
        return Gpu(cuda_ops, frozenset(), cuda_missing, f"Triton needs {older}")
    _registered.append(triton.register("CUDA", skip=cuda_ops))
    return Gpu(cuda_ops, frozenset(triton.LAUNCHERS) - cuda_ops, cuda_missing, "")


def _gpu_below(lowest: int) -> str:
    """Says so if a GPU of this machine has a compute capability below ``lowest`` (80 for 8.0); else nothing."""
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor < lowest:
            name = torch.cuda.get_device_name(index)
            return f"compute capability {lowest / 10} and newer, but {name} has {major}.{minor}"
    return ""


_registered: list[torch.library.Library] = []  # kept: a library's kernels go when it does


def _load_cuda() -> str:
    """Registers the ops of _cuda.so; returns why not, or nothing."""
    built = str(_C.build_info()["cuda_architectures"])
    library = Path(__file__).with_name("_cuda.so")
    if not built or not library.exists():
        return "the CUDA kernels were not built"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if older := _gpu_below(min(int(architecture) for architecture in built.split())):
        return f"the CUDA kernels are built for {older}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return (
            f"the CUDA kernels, built against torch {_C.build_info()['torch_headers']}, do not load ({error})"
        )
    return ""
