"""The sizes each op's kernels run with are functions of the shapes; here they can be overridden. Does not import Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# torch op -> what can be set. Blocks are powers of two; what is not listed follows from the shapes or the random stream.
TUNABLE = {
    "selective_scan": ("BLOCK_D", "num_warps"),
    "selective_scan_backward": ("BLOCK_D", "num_warps"),
    "cross_attention": ("BLOCK_Q", "num_warps", "num_stages"),
    "cross_attention_backward": ("BLOCK_Q", "num_warps", "num_stages"),
    "kl_bottleneck": ("BLOCK", "num_warps"),
    "gaussian_bottleneck": ("BLOCK_R", "BLOCK_K", "num_warps"),
    "depthwise_conv2d": ("BLOCK_P", "BLOCK_C", "num_warps"),
    "depthwise_conv2d_backward": ("BLOCK_P", "BLOCK_C", "num_warps"),
    "anomaly_map": ("BLOCK_P", "BLOCK_C", "num_warps"),
}
_overrides: dict[str, dict[str, int]] = {}


@contextmanager
def override(op: str, **sizes: int) -> Iterator[None]:
    """Run the Triton kernels of ``op`` (a key of ``TUNABLE``) with these sizes inside the block (process-wide, all threads).

    Results are deterministic for given sizes; other sizes add up in another order. Raises ValueError naming what cannot be set.

    >>> with override("depthwise_conv2d", BLOCK_P=32, num_warps=2):
    ...     pass
    """
    if op not in TUNABLE:
        raise ValueError(f"override: unknown op {op!r}: one of {', '.join(TUNABLE)}")
    for name, value in sizes.items():
        if name not in TUNABLE[op]:
            raise ValueError(f"override: {op} has no {name!r} to set: {', '.join(TUNABLE[op])}")
        if not isinstance(value, int) or value < 1 or value & (value - 1) and name != "num_stages":
            raise ValueError(f"override: {name} = {value!r}, expected a power of two")
    previous = _overrides.get(op)
    _overrides[op] = {**(previous or {}), **sizes}
    try:
        yield
    finally:
        _overrides.pop(op)
        if previous is not None:
            _overrides[op] = previous


def tuned(op: str, sizes: dict[str, int]) -> dict[str, int]:
    """``sizes`` of a launch, with what is overridden for ``op``."""
    return {name: _overrides.get(op, {}).get(name, value) for name, value in sizes.items()}
