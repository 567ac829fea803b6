"""Autocast for the ops that are matrix products; the others compute in float32 anyway and take their tensors as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_autocast_dtype(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as torch's own matrix products would take them; float64 and what is no floating tensor stays."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    # Elsewhere the reference runs, whose operators see to it themselves (and torch 2.10 cannot trace is_autocast_available).
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
