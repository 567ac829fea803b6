"""What the tests of the divergences share: logits, their float64 twins, and the comparison with the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from iumad_kernels import _C

INF = math.inf
every_isa = pytest.mark.parametrize("isa", _C.cpu_isas(), indirect=True)


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    a, b = ((scale * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2))
    return a, b


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def rms_error(out: Tensor, expected: Tensor) -> float:
    size = expected.double().norm().item()
    return (out.double() - expected.double()).norm().item() / (size or 1.0)


MASKS = {
    "classes": lambda: torch.arange(40) % 3 > 0,
    "rows": lambda: (torch.arange(6) % 2 > 0).unsqueeze(1),
    "elements": lambda: torch.rand(6, 40) > 0.3,
    "elements, one row empty": lambda: (torch.rand(6, 40) > 0.3) & (torch.arange(6) != 2).unsqueeze(1),
    "nothing": lambda: torch.zeros(1, dtype=torch.bool),
}
S = torch.zeros(4, 7)
T = torch.zeros(4, 7)
