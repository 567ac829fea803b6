"""Seeds of the random numbers that ops draw by position: an int, or an int64 scalar tensor that tracing need not look into."""

from __future__ import annotations

import torch
from torch import Tensor

from iumad_kernels.reference.philox import signed64


def check_seed(op: str, seed: int | Tensor, device: torch.device) -> None:
    """An int, or an int64 tensor of one element on ``device``."""
    if isinstance(seed, int):
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"{op}: seed must be an int or an int64 tensor of one element, got {seed!r}")
    if seed.device != device:
        raise ValueError(f"{op}: seed is on {seed.device}, but the inputs are on {device}")


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed's 64 bits as a tensor."""
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), signed64(seed), dtype=torch.int64, device=device)
